"""What errors in the outputs of a matrix do to the model's: second moments of output gradients.

The outputs y = W x of a matrix get the gradient g at every token. With H = sum x x', G = sum g g'
makes the curvature of the model by the matrix about a Kronecker product (Martens and Grosse,
arXiv:1503.05671, section 3): a change D of W costs about tr(G D H D').
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import (
    CONTRACTED,
    INNER,
    KERNEL,
    ROWS,
    Array,
    CompressedArray,
    Dims,
    dense,
    register,
)
from jaxcompress.core.deferred import as_shapes
from jaxcompress.core.errors import InputError
from jaxcompress.core.losses import sum_over_chunks
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers.contractions import contractions
from jaxcompress.core.readers.lift import lift
from jaxcompress.layerwise.pieces import with_leaves
from jaxcompress.layerwise.problem import StoredMatrix

OUTPUT_MOMENT = "output_moment"  # its name as a statistic, which may be None
MOST_BYTES = 16 << 30  # of the moments of all matrices of a model


def output_moments(
    model: Model, paths: Collection[str], batches: Sequence[Any], *, seed: int = 0
) -> dict[str, Array]:
    """G of every matrix: the sum over tokens of g g', with labels that the model itself draws.

    Labels drawn from the model's own predictions make it the Fisher information, not that of the
    calibration text: fewer tokens estimate it well, and a text that the model fits well does not
    make it vanish.

    Args:
      model: one that gives logits.
      paths: of its matrices.
      batches: token ids `[samples, seq]` each, or tuples of inputs of which the last are labels,
        which are not looked at.
      seed: of the labels.

    Returns:
      By path, float32 `[*lead, N, N]`, N the rows of the stored matrix. Leaves that no matrix
      product reads (kernels of convolutions) are absent.

    Raises:
      InputError: an unknown path, or a gradient that is not finite.
    """
    known = dict(leaves_with_paths(model.params))
    dims = _dims(model, paths, batches[0])
    loss = _sampled_loss(model)

    def of_moments(moments: dict[str, Array], params: Any, batch: Any, key: Array) -> Array:
        leaves = dict(leaves_with_paths(params))
        tapped = {path: _tapped(leaves[path], dims[path], moments[path]) for path in paths}
        return loss(with_leaves(params, tapped), batch, key)

    @jax.jit
    def add(total: dict[str, Array], *given: Any) -> dict[str, Array]:
        return jax.tree.map(jnp.add, total, jax.grad(of_moments)(total, *given))

    total = {path: _no_moment(known[path], dims[path]) for path in paths}
    for i, batch in enumerate(batches):
        total = add(total, model.params, batch, jax.random.key(seed + i))
    for path, moment in total.items():
        if not bool(jnp.isfinite(moment).all()):
            raise InputError(f"{path}: the gradient of its outputs is not finite")
    return {path: moment for path, moment in total.items() if bool(moment.any())}


def obstacle(model: Model, paths: Collection[str], batch: Any) -> str | None:
    """Why there are no `output_moments`: no loss is known, or they are too large; else None."""
    if not getattr(model.config, "gives_logits", True):
        return "the model gives no logits"
    if not isinstance(batch, tuple) and not jnp.issubdtype(batch.dtype, jnp.integer):
        return "neither token ids nor labels are given"
    model = model.replace(params=as_shapes(model.params))
    leaves = dict(leaves_with_paths(model.params))
    dims = _dims(model, paths, batch)
    shapes = [jax.eval_shape(partial(_no_moment, dims=dims[p]), leaves[p]).shape for p in paths]
    size = 4 * sum(map(math.prod, shapes))
    return f"they would take {size / 2**30:.0f} GiB" if size > MOST_BYTES else None


def _dims(model: Model, paths: Collection[str], batch: Any) -> dict[str, Dims]:
    """How the axes of the matrices factor, as the program reads them."""
    known = dict(leaves_with_paths(model.params))
    if unknown := set(paths) - set(known):
        raise InputError(f"{min(unknown)}: no such parameter")
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch)
    axes = contractions(model.apply)(model.params, *_inputs(first))
    return {path: StoredMatrix.of(path, dense(known[path]), axes).dims for path in paths}


def _tapped(leaf: Any, dims: Dims, moment: Array) -> _Tapped:
    matrix = StoredMatrix(dense(leaf), dims).matrix()
    return _Tapped(matrix, moment, dims, (str(matrix.dtype),))


def _no_moment(leaf: Any, dims: Dims) -> Array:
    shape = jax.eval_shape(lambda x: StoredMatrix(dense(x), dims).matrix(), leaf).shape
    return jnp.zeros((*shape[:-1], shape[-2]), jnp.float32)


@register
class _Tapped(CompressedArray):
    """A matrix whose products have one more gradient: by `moment` it is that of the outputs.

    Attributes:
      weight: `[*lead, N, K]`.
      moment: `[*lead, N, N]`; its values do not matter.
    """

    roles = {"weight": (ROWS, CONTRACTED), "moment": (INNER, INNER)}

    weight: Array
    moment: Array
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return self.weight.shape[-1]

    def decode(self) -> Array:
        """The weight itself."""
        return self.weight

    def product(self, x: Array, over: str, **options: Any) -> Array:
        """`x` times the matrix."""
        outputs = super().product(x, over, **options)
        return _tap(outputs, self.moment) if over == "k" else outputs


@jax.custom_vjp
def _tap(outputs: Array, moment: Array) -> Array:
    """`outputs`; the gradient by `moment` is the sum of g g' over their gradients g."""
    return outputs


def _tap_forward(outputs: Array, moment: Array) -> tuple[Array, None]:
    return outputs, None


def _tap_backward(_: None, gradient: Array) -> tuple[Array, Array]:
    wide = gradient.astype(jnp.float32)
    return gradient, jnp.einsum("...mn,...mo->...no", wide, wide)


_tap.defvjp(_tap_forward, _tap_backward)


def _sampled_loss(model: Model) -> Callable[[Any, Any, Array], Array]:
    """`loss(params, batch, key)`: the sum of cross entropies with labels drawn from the logits."""
    walk = model.blocks
    if walk is None:
        apply = lift(model.apply)
        return lambda params, batch, key: _cross_entropy(apply(params, *_inputs(batch)), key)
    hidden, head = lift(walk.hidden), lift(walk.head)

    def loss(params: Any, batch: Any, key: Array) -> Array:
        def of_chunk(params: Any, states: Array, position: Array) -> Array:
            return _cross_entropy(head(params, states), jax.random.fold_in(key, position[0, 0]))

        states = hidden(params, *_inputs(batch))
        if not hasattr(states, "ndim") or states.ndim != 3:
            return _cross_entropy(head(params, states), key)
        positions = jnp.broadcast_to(jnp.arange(states.shape[1]), states.shape[:2])
        return sum_over_chunks(of_chunk, params, (states, positions))

    return loss


def _inputs(batch: Any) -> tuple[Any, ...]:
    return tuple(batch[:-1]) if isinstance(batch, (tuple, list)) else (batch,)


def _cross_entropy(logits: Array, key: Array) -> Array:
    logits = logits.astype(jnp.float32)
    labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1).sum()
