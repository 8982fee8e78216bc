"""Statistics of the gradient: what the loss on calibration data says of every weight.

All float32, in the shape of the leaf:

  gradient           of the mean loss over all data
  squared_gradient   mean over sequences of the square of a sequence's own gradient (the diagonal
                     of the empirical Fisher matrix)
  gradient_variance  over the batches, of the gradient of a batch
  hessian_gradient   H g: the Hessian of the mean loss times its gradient
  synflow            dR/d|w|: R the sum of the outputs of the network of absolute weights for an
                     input of ones (arXiv:2006.05467, equation 2)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import dense
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Blocks, Model
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.layerwise.losses import Loss, slope_of

Array = jax.Array
Leaves = dict[str, Array]  # by path

GRADIENTS = ("gradient", "squared_gradient", "gradient_variance", "hessian_gradient", "synflow")


def gradient_statistics(
    model: Model,
    paths: Collection[str],
    wanted: Collection[str],
    batches: Iterable[Any],
    loss: Loss | None = None,
) -> dict[str, dict[str, Array]]:
    """Statistics of the gradient by the given leaves.

    Memory is that of a training step without an optimizer: the activations of one batch, and some
    copies of the given leaves. With `squared_gradient` one sequence goes at a time.

    Args:
      model: its parameters may be compressed; of a compressed leaf, the gradient is that of the
        dense array in its place.
      paths: of leaves of `model.params`.
      wanted: names of `GRADIENTS`.
      batches: token ids `[samples, seq]` each, or tuples of images and labels, or whatever `loss`
        takes.
      loss: see `layerwise.losses`; None: the one that goes with the batches.

    Returns:
      `{path: {name: float32 array in the leaf's shape}}`.

    Raises:
      InputError: an unknown name or path, no batch, a single one where a variance is asked, or a
        statistic that overflows.
    """
    if unknown := set(wanted) - set(GRADIENTS):
        raise InputError(f"statistic {min(unknown)!r}: there are {', '.join(GRADIENTS)}")
    batches = list(batches)
    if len(batches) < 1 + ("gradient_variance" in wanted):
        raise InputError(
            f"calibration: {len(batches)} batches; gradients need one, their variance several"
        )
    function = _OfLeaves(loss or slope_of(model, batches[0]), model.params, paths)
    found: dict[str, Leaves] = {}
    if set(wanted) - {"synflow"}:
        found = _of_loss(function, frozenset(wanted), batches)
    if "synflow" in wanted:
        found["synflow"] = _synflow(model, paths, batches[0])
    for name in wanted:
        if not all(bool(jnp.isfinite(x).all()) for x in found[name].values()):
            raise InputError(f"{name}: overflows in this model, or its loss is not finite")
    return {path: {name: found[name][path] for name in wanted} for path in paths}


class _OfLeaves:
    """A loss as a function of some leaves, in float32, beside all the others.

    Attributes:
      leaves: the dense float32 arrays of the paths.
      others: buffers of the rest, given as arguments so that no program holds them.
    """

    def __init__(self, loss: Loss, params: Any, paths: Collection[str]) -> None:
        known = dict(leaves_with_paths(params))
        if unknown := set(paths) - set(known):
            raise InputError(f"{min(unknown)}: no such parameter")
        self.loss, self.dtypes = loss, {path: known[path].dtype for path in paths}
        self.leaves = {path: dense(known[path]).astype(jnp.float32) for path in paths}
        marked = map_with_paths(
            lambda path, leaf: _Place(path) if path in self.dtypes else leaf, params
        )
        self.buffers, self.tree = jax.tree.flatten(marked)
        self.others = [x for x in self.buffers if hasattr(x, "dtype")]

    def params(self, leaves: Mapping[str, Array], others: list[Array]) -> Any:
        """The parameters with these leaves."""
        rest = iter(others)

        def place(x: Any) -> Any:
            if isinstance(x, _Place):
                return leaves[x.path].astype(self.dtypes[x.path])
            return next(rest) if hasattr(x, "dtype") else x

        return jax.tree.unflatten(self.tree, [place(x) for x in self.buffers])

    def __call__(self, leaves: Leaves, others: list[Array], batch: Any) -> tuple[Array, Array]:
        return self.loss(self.params(leaves, others), batch)


class _Place:
    """Stands in a tree where a leaf goes."""

    def __init__(self, path: str) -> None:
        self.path = path


def _of_loss(function: _OfLeaves, wanted: frozenset[str], batches: list[Any]) -> dict[str, Leaves]:
    given = function.leaves, function.others

    def zeros() -> Leaves:
        return jax.tree.map(jnp.zeros_like, function.leaves)

    state: dict[str, Any] = {"total": zeros(), "count": jnp.float32(0)}
    if "squared_gradient" in wanted:
        state |= {"squares": zeros(), "sequences": jnp.float32(0)}
    if "gradient_variance" in wanted:
        state |= {"mean": zeros(), "deviations": zeros(), "batches": jnp.float32(0)}
    add_batch = jax.jit(partial(_add_batch, function), donate_argnums=0)
    for batch in batches:
        state = add_batch(state, *given, batch)
    found = {"gradient": _over(state["total"], state["count"])}
    if "squared_gradient" in wanted:
        found["squared_gradient"] = _over(state["squares"], state["sequences"])
    if "gradient_variance" in wanted:
        found["gradient_variance"] = _over(state["deviations"], state["batches"])
    if "hessian_gradient" in wanted:
        add_product = jax.jit(partial(_add_product, function), donate_argnums=0)
        total = zeros()
        for batch in batches:
            total = add_product(total, *given, batch, found["gradient"])
        found["hessian_gradient"] = _over(total, state["count"])
    return found


def _over(total: Leaves, count: Array) -> Leaves:
    return jax.tree.map(lambda x: x / count, total)


def _add_batch(
    function: _OfLeaves, state: dict[str, Any], leaves: Leaves, others: list[Array], batch: Any
) -> dict[str, Any]:
    """The running sums with one batch more."""
    gradient = jax.grad(function, has_aux=True)
    new = dict(state)
    if "squares" in state:

        def of_sequence(sums: Any, sequence: Any) -> tuple[Any, None]:
            total, count, squares = sums
            one = jax.tree.map(lambda x: x[None], sequence)
            own, n = gradient(leaves, others, one)
            squares = jax.tree.map(lambda s, g: s + jnp.square(g / n), squares, own)
            return (jax.tree.map(jnp.add, total, own), count + n, squares), None

        start = jax.tree.map(jnp.zeros_like, (state["total"], state["count"]))
        (total, count, new["squares"]), _ = jax.lax.scan(
            of_sequence, (*start, state["squares"]), batch
        )
        new["sequences"] = state["sequences"] + len(jax.tree.leaves(batch)[0])
    else:
        total, count = gradient(leaves, others, batch)
    new["total"] = jax.tree.map(jnp.add, state["total"], total)
    new["count"] = state["count"] + count
    if "mean" in state:  # Welford's update: no difference of two large numbers
        new["batches"] = state["batches"] + 1
        away = jax.tree.map(lambda g, m: g / count - m, total, state["mean"])
        new["mean"] = jax.tree.map(lambda m, a: m + a / new["batches"], state["mean"], away)
        new["deviations"] = jax.tree.map(
            lambda d, a: d + a * a * (1 - 1 / new["batches"]), state["deviations"], away
        )
    return new


def _add_product(
    function: _OfLeaves,
    total: Leaves,
    leaves: Leaves,
    others: list[Array],
    batch: Any,
    direction: Leaves,
) -> Leaves:
    """`total` and the Hessian of one batch's summed loss times a direction."""

    def gradient(leaves: Leaves) -> Leaves:
        return jax.grad(lambda x: function(x, others, batch)[0])(leaves)

    product = jax.jvp(gradient, (leaves,), (direction,))[1]
    return jax.tree.map(jnp.add, total, product)


def _synflow(model: Model, paths: Collection[str], batch: Any) -> Leaves:
    """dR/d|w| by the given leaves; of the batch, only the shape of a sample counts."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    one = jnp.asarray(inputs[:1])
    if not jnp.issubdtype(one.dtype, jnp.integer):
        flow = partial(_flow_of_values, model.apply, jnp.ones_like(one))
    elif model.blocks is not None:
        flow = partial(_flow_of_embeddings, model.blocks, one)
    else:
        raise InputError("synflow: token ids are no numbers to set to one; the model needs Blocks")

    def absolute(path: str, leaf: Any) -> Any:
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.abs(dense(leaf).astype(jnp.float32))

    function = _OfLeaves(
        lambda params, _: (flow(params), jnp.float32(1)),
        map_with_paths(absolute, model.params),
        paths,
    )
    gradient = jax.jit(jax.grad(lambda leaves, others: function(leaves, others, None)[0]))
    return gradient(function.leaves, function.others)


def _flow_of_values(apply: Callable[..., Any], ones: Array, params: Any) -> Array:
    return _sum(apply(params, ones))


def _flow_of_embeddings(walk: Blocks, ids: Array, params: Any) -> Array:
    """The flow from embeddings of ones, behind the table of embeddings."""
    hidden, tree = jax.tree.flatten(walk.embed(params, ids))
    state = jax.tree.unflatten(tree, [jnp.ones_like(hidden[0]), *hidden[1:]])
    for block in walk.of(params):
        state = walk.block(block, state)
    return _sum(walk.head(params, state))


def _sum(outputs: Any) -> Array:
    return sum((x.astype(jnp.float32).sum() for x in jax.tree.leaves(outputs)), jnp.float32(0))
