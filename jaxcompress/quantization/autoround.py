"""AutoRound: rounding and ranges learned by the sign of a gradient, block after block."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.affine import Affine, check_bits, divide, groups_of
from jaxcompress.core.arrays.base import (
    CONTRACTED,
    KERNEL,
    ROWS,
    STORED,
    Array,
    CompressedArray,
    Dims,
    dense,
    register,
)
from jaxcompress.core.model import Model
from jaxcompress.layerwise.block_training import BlockTraining, train_blocks
from jaxcompress.models import linear_paths
from pallas_kernels.packing import pack

SMALLEST_RANGE = 0.5


@register
class LearnedRounding(CompressedArray):
    """A weight on an integer grid of which the rounding and the range of each group are learned.

    code = round(w / scale + offset), and the range of a group, from which its scale and its zero
    point follow, is [low * min w, high * max w]. The rounding lets gradients pass. What the model
    sees is, bit for bit, what `to_affine` stores.

    Attributes:
      weight: float `[*lead, N, K]`; it is not trained.
      offset: float32 `[*lead, N, K]`, in [-0.5, 0.5].
      low: float32 `[*lead, N, groups]`.
      high: likewise.
      bits: 1 to 8.
      symmetric: whether the zero is fixed in the middle of the codes. The code that has no
        counterpart then goes to the side of the largest weight: a scale may be negative.
    """

    roles = {
        "weight": (ROWS, CONTRACTED),
        "offset": (ROWS, CONTRACTED),
        "low": (ROWS, CONTRACTED),
        "high": (ROWS, CONTRACTED),
    }
    trains = {"offset": "weights", "low": "scales", "high": "scales"}

    weight: Array
    offset: Array
    low: Array
    high: Array
    bits: int = 4
    symmetric: bool = True
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return self.weight.shape[-1]

    @property
    def column_unit(self) -> int:
        """Whole groups, where there are several."""
        groups = self.low.shape[-1]
        return self.contracted // groups if groups > 1 else 1

    def decode(self) -> Array:
        """The points of the grid, `[*lead, N, K]` in the dtype of `weight`."""
        codes, scale, zero = self._rounded()
        grouped = codes.astype(scale.dtype) - zero.astype(scale.dtype)[..., None]
        return (grouped * scale[..., None]).reshape(self.weight.shape)

    def to_affine(self) -> Affine:
        """The array that is stored once training is over; decodes to the same bits."""
        codes, scale, zero = self._rounded()
        return Affine(
            pack(codes.reshape(self.weight.shape).astype(jnp.int32), self.bits),
            scale,
            None if self.symmetric else zero.astype(jnp.uint8),
            self.bits,
            -self.contracted % 32,
            self.dims,
            self.casts,
        )

    def _rounded(self) -> tuple[Array, Array, Array]:
        """Codes `[*lead, N, groups, G]`, scales and zero points `[*lead, N, groups]`."""
        dtype, levels = self.weight.dtype, 2**self.bits - 1
        grouped = self.weight.reshape(*self.low.shape, -1)
        lowest = jnp.minimum(grouped.min(-1), 0) * self.low
        highest = jnp.maximum(grouped.max(-1), 0) * self.high
        eps = jnp.finfo(dtype).eps
        if self.symmetric:
            middle = 2 ** (self.bits - 1)
            scale = jnp.where(highest < -lowest, -lowest, -highest) / middle
            scale = jnp.where(scale == 0, eps, scale).astype(dtype)
            zero = jnp.full_like(scale, middle)
        else:
            scale = (highest - lowest) / levels
            scale = jnp.where(scale == 0, eps, scale).astype(dtype)
            zero = jnp.clip(_round(-lowest / scale), 0, levels)
        steps = divide(grouped.astype(jnp.float32), scale[..., None].astype(jnp.float32))
        offset = self.offset.reshape(grouped.shape)
        codes = jnp.clip(_round(steps + offset) + zero[..., None], 0, levels)
        return codes, scale, zero


@jax.custom_jvp
def _round(x: Array) -> Array:
    """The nearest integer; its gradient is that of x."""
    return jnp.round(x)


@_round.defjvp
def _round_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return jnp.round(primals[0]), tangents[0]


def learned_rounding(
    matrix: Any, *, bits: int, group_size: int, symmetric: bool
) -> LearnedRounding:
    """The start: every weight of `[*lead, N, K]` to its nearest code, the range just covered."""
    weight = dense(matrix)
    groups = groups_of(weight.shape[-1], group_size)
    ones = jnp.ones((*weight.shape[:-1], groups), jnp.float32)
    zeros = jnp.zeros(weight.shape, jnp.float32)
    casts = (str(weight.dtype),)
    return LearnedRounding(weight, zeros, ones, ones, bits, symmetric, STORED, casts)


def signed_step(leaves: Any, gradients: Any, progress: Array, *, rate: float) -> Any:
    """Every number one step against the sign of its gradient; the step shrinks linearly to 0."""

    def of_leaf(leaf: LearnedRounding, slope: LearnedRounding) -> LearnedRounding:
        def moved(x: Array, d: Array, low: float, high: float) -> Array:
            return jnp.clip(x - rate * (1 - progress) * jnp.sign(d), low, high)

        return leaf.replace(
            offset=moved(leaf.offset, slope.offset, -0.5, 0.5),
            low=moved(leaf.low, slope.low, SMALLEST_RANGE, 1),
            high=moved(leaf.high, slope.high, SMALLEST_RANGE, 1),
        )

    return {path: of_leaf(leaf, gradients[path]) for path, leaf in leaves.items()}


def autoround(
    model: Model,
    *,
    calibration: Any,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    steps: int = 200,
    batch: int = 8,
    rate: float | None = None,
    random_seed: int = 0,
) -> Model:
    """AutoRound: rounding and ranges learned block by block from the sign of the gradient."""
    chosen = linear_paths(model)
    check_bits(bits)
    training = BlockTraining(
        partial(learned_rounding, bits=bits, group_size=group_size, symmetric=symmetric),
        partial(signed_step, rate=1 / max(steps, 1) if rate is None else rate),
        LearnedRounding.to_affine,
        steps,
        batch,
        random_seed,
    )
    found = train_blocks(model, chosen, calibration, training, what="autoround")
    return model.replace(params=found.params, notes=(*model.notes, *found.notes))
