"""AutoRound: rounding and ranges learned by the sign of a gradient, block after block."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.selection import select
from jaxcompress.layerwise.block_training import BlockTraining, train_blocks
from jaxcompress.layerwise.calibrate import Calibration
from jaxcompress.models import linear_paths
from pallas_kernels.packing import pack

SMALLEST_RANGE = 0.5
DEFAULT_INCLUDE = "**/kernel"


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
            zero = _clipped(_round(-lowest / scale), levels)
        steps = divide(grouped.astype(jnp.float32), scale[..., None].astype(jnp.float32))
        offset = self.offset.reshape(grouped.shape)
        codes = _clipped(_round(steps + offset) + zero[..., None], levels)
        return codes, scale, zero


@jax.custom_jvp
def _round(x: Array) -> Array:
    """The nearest integer; its gradient is that of x."""
    return jnp.round(x)


@_round.defjvp
def _round_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return jnp.round(primals[0]), tangents[0]


def _clipped(codes: Array, most: int) -> Array:
    """Between 0 and `most`; at either bound, where `jnp.clip` halves it, the gradient is whole."""
    return jnp.where(codes < 0, 0, jnp.where(codes > most, most, codes))


def autoround(
    model: Model,
    *,
    calibration: Any,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    steps: int = 200,
    batch: int = 8,
    random_seed: int = 0,
) -> Model:
    """AutoRound: rounding and ranges learned block after block, by the sign of the gradient.

    A block is to give what the dense model gives in its place, to the inputs that the blocks
    quantized before it give. Source: Cheng et al., "Optimize weight rounding via signed gradient
    descent for the quantization of LLMs", arXiv:2309.05516, algorithm 1 and equations 3 to 6.

    Args:
      model: its linear weights are quantized: those of the reference models, elsewhere every
        `kernel`.
      calibration: inputs of the model, `[samples, ...]`, or a tuple of such: token ids.
      bits: 1 to 8.
      group_size: contracted columns that share a scale; must divide K; -1: one scale per row.
      symmetric: fixed zero in the middle of the codes; otherwise a zero point per group.
      steps: of each block; the first one is 1 / steps long, then they shrink linearly to 0.
      batch: samples in a step.
      random_seed: of the draw of the batches.

    Returns:
      The model with `Affine` leaves.

    Raises:
      InputError: bits outside of 1..8, no matrix, or a group size that does not divide K.
    """
    leaves = dict(leaves_with_paths(model.params))
    chosen = linear_paths(model) or select(leaves, DEFAULT_INCLUDE)
    how = learned(bits, group_size, symmetric, steps, batch, random_seed)
    inputs = Calibration.of(calibration, model, samples=1, ctx=1, seed=0).inputs
    found = train_blocks(model, chosen, inputs, how, what="autoround")
    return model.replace(params=found.params, notes=(*model.notes, *found.notes))


def learned(
    bits: int, group_size: int, symmetric: bool, steps: int, batch: int, seed: int = 0
) -> BlockTraining:
    """How `autoround` trains a block; arguments as there.

    Raises:
      InputError: an option out of its range.
    """
    check_bits(bits)
    if bits > 8:
        raise InputError(f"bits {bits}: 1 to 8 for autoround")
    return BlockTraining(
        partial(start, bits=bits, group_size=group_size, symmetric=symmetric),
        signed_steps(1 / max(steps, 1)),
        LearnedRounding.to_affine,
        steps,
        batch,
        seed,
    )


def start(matrix: Any, *, bits: int, group_size: int, symmetric: bool) -> LearnedRounding:
    """Every weight of `[*lead, N, K]` at its nearest code, the ranges just covered."""
    weight = dense(matrix)
    groups = groups_of(weight.shape[-1], group_size)
    ones = jnp.ones((*weight.shape[:-1], groups), jnp.float32)
    offset = jnp.zeros(weight.shape, jnp.float32)
    casts = (str(weight.dtype),)
    return LearnedRounding(weight, offset, ones, ones, bits, symmetric, STORED, casts)


@functools.cache
def signed_steps(rate: float) -> Callable[[Any, Any, Array], Any]:
    """Updates by the sign of the gradient, `rate` long at first and shrinking linearly to 0."""

    def update(leaves: Any, gradients: Any, progress: Array) -> Any:
        def moved(x: Array, slope: Array, low: float, high: float) -> Array:
            return jnp.clip(x - rate * (1 - progress) * jnp.sign(slope), low, high)

        return {
            path: leaf.replace(
                offset=moved(leaf.offset, gradients[path].offset, -0.5, 0.5),
                low=moved(leaf.low, gradients[path].low, SMALLEST_RANGE, 1),
                high=moved(leaf.high, gradients[path].high, SMALLEST_RANGE, 1),
            )
            for path, leaf in leaves.items()
        }

    return update
