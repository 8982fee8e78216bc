"""How important each index of a group is: what stays when the lowest go.

Three kinds of score, all functions of sums over the calibration data:

- of weights: any of `pruning.scores`, gathered over the weights in which the group stands;
- of channels: what the weights that consume the group read there (`CHANNEL_SCORES`);
- of the whole group at once: attention entropy, the gradient of a gate, a draw.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import dense
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.core.readers.coupling import Group, Groups, Member
from jaxcompress.core.selection import nearest
from jaxcompress.layerwise.gradients import GRADIENTS, gradient_statistics
from jaxcompress.layerwise.losses import slope_of
from jaxcompress.layerwise.problem import StoredMatrix
from jaxcompress.pruning.scores import SCORES
from jaxcompress.pruning.structured.attention import attention_entropy
from jaxcompress.pruning.structured.data import Seen
from jaxcompress.pruning.structured.roles import per_step

Reduce = Literal["sum", "mean", "max", "l2"]

# Of what a consumer reads: the statistic needed, and the score from it and the count of rows.
CHANNEL_SCORES: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "activation": ("sum_abs", lambda total, count: total / count),
    "activation_l2": ("sum_squares", lambda total, count: jnp.sqrt(total)),
    # APoZ, the average percentage of zeros (Hu et al., arXiv:1607.03250): many zeros go first.
    "apoz": ("zeros", lambda total, count: 1 - total / count),
}
GROUP_SCORES = ("entropy", "entropy_reversed", "gate", "random")
NAMES = (*(name for name in SCORES if name != "random"), *CHANNEL_SCORES, *GROUP_SCORES)


def importance(
    seen: Seen,
    groups: Groups,
    chosen: Sequence[Group],
    score: str,
    reduce: Reduce = "sum",
    seed: int = 0,
) -> list[np.ndarray]:
    """The score of every index of each group; the larger, the more important.

    Args:
      seen: the dense network and its calibration data.
      groups: of the network, read at the shapes of one chunk of the data.
      chosen: some of them.
      score: one of `NAMES`.
      reduce: how scores of single weights, or channels, make that of an index: their "sum",
        "mean", "max", or "l2", the root of the sum of squares.
      seed: of the score "random".

    Returns:
      float64 `[size]` of each group; `[steps, size]` where it lives in a scan and each step may
      keep other indices.

    Raises:
      InputError: an unknown score, one that does not fit, or data that it needs and nobody gave.
    """
    if score not in NAMES:
        raise InputError(f"score {score!r}: unknown; {nearest(score, NAMES)}")
    if score == "random":
        rng = np.random.default_rng(seed)
        return [rng.random((g.steps, g.size) if per_step(g) else g.size) for g in chosen]
    if score not in SCORES or _statistics(score):
        seen.need(f"score {score}")
    if score.startswith("entropy"):
        found = attention_entropy(groups, chosen, seen.model.params, seen.data)
        return found if score == "entropy_reversed" else [-entropy for entropy in found]
    if score == "gate":
        return gate_gradients(seen, chosen)
    of = _channel_scores if score in CHANNEL_SCORES else _weight_scores
    return of(seen, chosen, score, reduce)


# ---------------------------------------------------------------------------- gathering


class _Gathered:
    """Sum, number, maximum and squares of everything that belongs to an index of a group."""

    def __init__(self, group: Group) -> None:
        self.group = group
        shape = (group.steps, group.size) if per_step(group) else (group.size,)
        self.total, self.count, self.squares = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.largest = np.full(shape, -np.inf)

    def add(self, values: jax.Array, axis: int, member: Member) -> None:
        """Take over an array, along whose axis `axis` the member's axis lies."""
        steps = per_step(self.group)
        found = _reduced(values, axis, steps)
        total, largest, squares = (np.asarray(x, np.float64) for x in found)
        each = values.size // total.size
        labels = self.group.labels(member)
        where = np.flatnonzero(labels >= 0)
        at: Any = (..., labels[where])
        np.add.at(self.total, at, total[..., where])
        np.add.at(self.squares, at, squares[..., where])
        np.maximum.at(self.largest, at, largest[..., where])
        np.add.at(self.count, at, each)

    def reduced(self, how: Reduce) -> np.ndarray:
        """One number for each index."""
        if not self.count.all():
            raise InputError(f"{self.group.name}: nothing that this score sees belongs to it")
        if how == "l2":
            return np.sqrt(self.squares)
        if how == "max":
            return self.largest
        return self.total / self.count if how == "mean" else self.total


@partial(jax.jit, static_argnums=(1, 2))
def _reduced(values: jax.Array, axis: int, steps: bool) -> tuple[jax.Array, ...]:
    values = jnp.moveaxis(values.astype(jnp.float32), axis, -1)
    rest = tuple(range(int(steps), values.ndim - 1))
    return values.sum(rest), values.max(rest), jnp.square(values).sum(rest)


# ---------------------------------------------------------------------------- scores of weights


def _statistics(score: str) -> list[str]:
    """What a score of single weights needs of the data."""
    given = inspect.signature(SCORES[score]).parameters.values()
    return [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD][1:]


def _weight_scores(
    seen: Seen, chosen: Sequence[Group], score: str, reduce: Reduce
) -> list[np.ndarray]:
    function, needed = SCORES[score], _statistics(score)
    leaves = dict(leaves_with_paths(seen.model.params))
    members = {g: [m for m in g.members if m.path in seen.axes] for g in chosen}
    paths = list(dict.fromkeys(m.path for of_group in members.values() for m in of_group))
    statistics = weight_statistics(seen, paths, needed)
    if needed:  # a table that is only looked up multiplies nothing
        paths = [path for path in paths if path in statistics]
    gathered = {g: _Gathered(g) for g in chosen}
    for path in paths:
        stored = StoredMatrix.of(path, leaves[path], {path: seen.axes[path]})
        matrix = dense(stored.matrix()).astype(jnp.float32)
        own = [statistics[path][name] for name in needed]
        scores = stored.put_back(function(matrix, *own))
        for group in chosen:
            for member in members[group]:
                if member.path == path:
                    gathered[group].add(scores, member.axis, member)
    return [gathered[g].reduced(reduce) for g in chosen]


def weight_statistics(
    seen: Seen, paths: Sequence[str], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """`{path: {name: statistic}}` as the scores of `pruning.scores` take them."""
    if not names:
        return {}
    data = seen.need(f"score from {', '.join(names)}")
    wanted = [name for name in names if name in GRADIENTS]
    found: dict[str, dict[str, Any]] = {path: {} for path in paths}
    others = [name for name in names if name not in GRADIENTS]
    if others:
        for path, statistics in seen.activations(paths, others).items():
            found[path] |= statistics
        found = {path: statistics for path, statistics in found.items() if statistics}
    if wanted:
        leaves = dict(leaves_with_paths(seen.model.params))
        by_leaf = gradient_statistics(seen.model, list(found), wanted, data.batches())
        for path, statistics in by_leaf.items():
            axes = {path: seen.axes[path]}
            dims = StoredMatrix.of(path, leaves[path], axes).dims
            found[path] |= {n: StoredMatrix(x, dims).matrix() for n, x in statistics.items()}
    return found


# ---------------------------------------------------------------------------- scores of channels


def consumers(seen: Seen, group: Group) -> list[Member]:
    """Where the group is the contracted axis of a weight."""
    return [m for m in group.members if m.axis in seen.axes.get(m.path, ())]


def _channel_scores(
    seen: Seen, chosen: Sequence[Group], score: str, reduce: Reduce
) -> list[np.ndarray]:
    name, function = CHANNEL_SCORES[score]
    members = {g: consumers(seen, g) for g in chosen}
    paths = list(dict.fromkeys(m.path for of_group in members.values() for m in of_group))
    leaves = dict(leaves_with_paths(seen.model.params))
    statistics = seen.activations(paths, [name])
    found = []
    for group in chosen:
        gathered = _Gathered(group)
        for member in members[group]:
            if member.path not in statistics:
                continue
            own, axes = statistics[member.path], seen.axes[member.path]
            values = function(own[name], own["count"][..., None])
            sizes = [leaves[member.path].shape[axis] for axis in axes]
            lead = values.ndim - 1
            values = values.reshape(*values.shape[:-1], *sizes)
            gathered.add(values, lead + axes.index(member.axis), member)
        found.append(gathered.reduced(reduce))
    return found


# ---------------------------------------------------------------------------- gates


def gate_gradients(seen: Seen, chosen: Sequence[Group]) -> list[np.ndarray]:
    """Mean over sequences of |dL/dg|, g a gate of 1 in front of what is read of each index.

    By the chain rule that is |sum of dL/da * a| over all entries a of the index: what the loss of
    a sequence would lose, to first order, without it.

    Source: Michel et al., "Are Sixteen Heads Really Better than One?", arXiv:1905.10650,
    equation 2; of filters: Molchanov et al., arXiv:1611.06440, equation 7.

    Args:
      seen: the dense network and its calibration data.
      chosen: groups that weights consume.
    """
    data = seen.need("gate")
    model = seen.model
    params = map_with_paths(lambda _, leaf: dense(leaf) if hasattr(leaf, "dtype") else leaf,
                            model.params)  # fmt: skip
    batches = data.batches()
    loss = slope_of(model, batches[0])
    where = [consumers(seen, group) for group in chosen]
    ones = [jnp.ones((g.steps, g.size) if per_step(g) else g.size) for g in chosen]
    buffers, tree = jax.tree.flatten(params)
    arrays = [x for x in buffers if hasattr(x, "dtype")]

    def gated(gates: list[jax.Array], arrays: list[jax.Array], sequence: Any) -> jax.Array:
        given = iter(arrays)
        made = jax.tree.unflatten(
            tree, [next(given) if hasattr(x, "dtype") else x for x in buffers]
        )
        factors: dict[str, list[jax.Array]] = {}
        shapes = {path: leaf.shape for path, leaf in leaves_with_paths(made)}
        for group, members, gate in zip(chosen, where, gates, strict=True):
            for member in members:
                factor = _factor(group, member, gate, len(shapes[member.path]))
                factors.setdefault(member.path, []).append(factor)

        def open_gates(path: str, leaf: Any) -> Any:
            for factor in factors.get(path, ()):
                leaf = (leaf * factor).astype(leaf.dtype)
            return leaf

        total, count = loss(map_with_paths(open_gates, made), sequence)
        return total / count

    @jax.jit
    def of_batch(arrays: list[jax.Array], batch: Any) -> list[jax.Array]:
        def step(total: Any, sequence: Any) -> tuple[Any, None]:
            one = jax.tree.map(lambda x: x[None], sequence)
            found = jax.grad(gated)(ones, arrays, one)
            return [t + jnp.abs(g) for t, g in zip(total, found, strict=True)], None

        return jax.lax.scan(step, [jnp.zeros_like(g) for g in ones], batch)[0]

    totals = [of_batch(arrays, batch) for batch in batches]
    samples = sum(len(jax.tree.leaves(batch)[0]) for batch in batches)
    return [np.sum([np.asarray(t, np.float64) for t in of], 0) / samples for of in zip(*totals)]


def _factor(group: Group, member: Member, gate: jax.Array, ndim: int) -> jax.Array:
    """The gate along the member's axis of a leaf; 1 where the group does not stand."""
    labels = group.labels(member)
    along = jnp.where(labels >= 0, gate[..., np.maximum(labels, 0)], 1)
    shape = [1] * ndim
    shape[member.axis] = len(labels)
    if gate.ndim == 2:
        shape[0] = len(gate)
    return along.reshape(shape)
