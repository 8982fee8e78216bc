"""Entropy of attention heads, found in any network's program."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy

from jaxcompress.core.arrays.base import dense
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers.coupling import Group, Groups
from jaxcompress.core.readers.coupling.atoms import Atom, Axis, labels
from jaxcompress.core.readers.coupling.program import Program, Record, Value
from jaxcompress.core.readers.coupling.semantics import PRODUCTS
from jaxcompress.core.readers.coupling.watch import Watcher
from jaxcompress.pruning.structured.data import Data
from jaxcompress.pruning.structured.roles import active_values, per_step


def attention_entropy(
    groups: Groups, heads: Sequence[Group], params: object, data: Data
) -> list[np.ndarray]:
    """Mean entropy of each head's attention probabilities, in nats.

    The probabilities are the operand of the product with the values that came from exponentials,
    normalized over the positions which that product sums over; heads of one group are averaged.

    Source: Voita et al., "Analyzing Multi-Head Self-Attention", arXiv:1905.09418, of confident
    heads; as a criterion: Michel et al., arXiv:1905.10650, section 5.

    Args:
      groups: of the network, read at the shapes of one chunk of the data.
      heads: some of them, of the kinds "heads" and "queries".
      params: of the network.
      data: calibration data.

    Returns:
      float64 `[size]` of each group, `[steps, size]` where it lives in a scan.

    Raises:
      InputError: no attention probabilities are found for one of the groups.
    """
    program = groups.program
    found = [_probabilities(program, group) for group in heads]
    watched = {value: _entropy_over(axes) for value, axes in found}
    watcher = Watcher(program, watched)
    arrays = [dense(leaf) for _, leaf in leaves_with_paths(params) if hasattr(leaf, "dtype")]

    @jax.jit
    def mean(arrays: list[jax.Array], inputs: tuple[jax.Array, ...]) -> list[jax.Array]:
        def chunk(inputs: tuple[jax.Array, ...]) -> list[jax.Array]:
            seen = watcher.observe([*arrays, *inputs])
            missing = [g.name for g, (value, _) in zip(heads, found) if value not in seen]
            if missing:
                raise InputError(
                    f"entropy: the attention of {missing[0]} lies in a branch or a while loop"
                )
            return [seen[value] for value, _ in found]

        return [x.mean(0) for x in jax.lax.map(chunk, inputs)]

    entropies = mean(arrays, data.inputs)
    return [
        _of_heads(np.asarray(entropy, np.float64), group, value, axes)
        for entropy, group, (value, axes) in zip(entropies, heads, found, strict=True)
    ]


def _entropy_over(axes: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    def entropy(p: jax.Array) -> jax.Array:
        p = p.astype(jnp.float32)
        p = p / jnp.maximum(p.sum(axes, keepdims=True), jnp.finfo(jnp.float32).tiny)
        return -xlogy(p, p).sum(axes)

    return entropy


def _of_heads(
    entropy: np.ndarray, group: Group, value: Value, summed: tuple[int, ...]
) -> np.ndarray:
    """Mean over everything but the head; a scan's steps lead."""
    axes = [axis for k, axis in enumerate(value.axes) if k not in summed]
    steps = entropy.ndim - len(axes)
    place = next(k for k, axis in enumerate(axes) if _stands(group.atom, axis))
    index = next(i for atom, _, i in labels(axes[place]) if atom is group.atom)
    entropy = np.moveaxis(entropy, steps + place, -1)
    rest = tuple(range(steps if per_step(group) else 0, entropy.ndim - 1))
    by_place = entropy.mean(rest)
    heads = [by_place[..., index == i].mean(-1) for i in range(group.size)]
    return np.stack(heads, -1)


def _stands(atom: Atom | None, axis: Axis) -> bool:
    return any(found is atom for found, _, _ in labels(axis))


def _probabilities(program: Program, group: Group) -> tuple[Value, tuple[int, ...]]:
    """The attention probabilities of a group of heads, and the axes that they sum to 1 over."""
    active = active_values(program)
    made_by = {value: record for record in program.records for value in record.results}
    weights = _leaves(program, program.parameters) - _leaves(program, program.inputs)
    for record in program.records:
        if record.primitive not in PRODUCTS or not all(v in active for v in record.operands[:2]):
            continue
        for i, value in enumerate(record.operands[:2]):
            summed = _contracted(record, i)
            over = {a for k in summed for a in program.places(value.axes[k])}
            # Positions are no axis of a weight; queries and keys are compared along one that is.
            positions = summed and not over & weights
            stands = group.atom in _leaves(program, [value])
            if positions and stands and _exponential(made_by, active, value):
                return value, summed
    raise InputError(
        f"entropy: no attention probabilities are found for {group.name}; use another score"
    )


def _leaves(program: Program, values: Sequence[Value]) -> set[Atom]:
    return {atom for value in values for axis in value.axes for atom in program.places(axis)}


def _contracted(record: Record, operand: int) -> tuple[int, ...]:
    pairs = [p for pair in record.contracted for p in (pair, pair.swapped())]
    return tuple(sorted({p.axis for p in pairs if p.operand == operand}))


def _exponential(made_by: dict[Value, Record], active: set[Value], value: Value) -> bool:
    """Whether a value was made of exponentials, with no product in between."""
    todo, seen = [value], {value}
    while todo:
        record = made_by.get(todo.pop())
        if record is None or record.primitive in PRODUCTS:
            continue
        if record.primitive in ("exp", "exp2"):
            return True
        new = [v for v in record.operands if v in active and v not in seen]
        seen.update(new)
        todo += new
    return False
