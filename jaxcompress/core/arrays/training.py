"""The forms in which sparse and quantized weights are trained.

They hold the full weight beside what will be made of it, so that sparse training and
quantization-aware training are ordinary training of a model with such leaves.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.affine import (
    Affine,
    divide,
    encode_affine,
    from_codes,
    nearest_codes,
)
from jaxcompress.core.arrays.base import (
    CONTRACTED,
    KERNEL,
    ROWS,
    Array,
    CompressedArray,
    Dims,
    register,
)


@register
class Masked(CompressedArray):
    """A weight of which some entries count as zero.

    Removed entries get the gradient 0, and whatever an optimizer does to them (momentum, weight
    decay), the array that the model sees has zeros there.

    Attributes:
      weight: float `[*lead, N, K]`.
      mask: bool `[*lead, N, K]`, True = kept.
    """

    roles = {"weight": (ROWS, CONTRACTED), "mask": (ROWS, CONTRACTED)}
    trains = {"weight": "weights"}

    weight: Array
    mask: Array
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return self.weight.shape[-1]

    def decode(self) -> Array:
        """The weight where the mask keeps it, else 0, `[*lead, N, K]`."""
        return jnp.where(self.mask, self.weight, jnp.zeros_like(self.weight))


@register
class FakeQuantized(CompressedArray):
    """A weight rounded to the grid of `Affine` on its way into the model.

    The gradient of the weight passes straight through the rounding where it is not clipped; that
    of the scale is the one of learned step sizes (LSQ: Esser et al. 2020, arXiv:1902.08153,
    eq. 3 and 5). What the model sees is, bit for bit, what `to_affine` stores.

    Attributes:
      weight: float `[*lead, N, K]`.
      scale: float `[*lead, N, K / group]`; per channel `[*lead, N, 1]`; per tensor `[*lead, 1, 1]`.
        It must stay away from 0 in training.
      zero_point: uint8, shape of `scale`, or None (symmetric). It is not trained.
      bits: 1 to 8.
      normalized: whether the gradient of each scale is divided by sqrt(weights that share it *
        largest code) (section 2.2 of the paper), which makes its updates about as large,
        relatively, as those of the weights.
    """

    roles = {
        "weight": (ROWS, CONTRACTED),
        "scale": (ROWS, CONTRACTED),
        "zero_point": (ROWS, CONTRACTED),
    }
    trains = {"weight": "weights", "scale": "scales"}

    weight: Array
    scale: Array
    zero_point: Array | None = None
    bits: int = 4
    normalized: bool = True
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return self.weight.shape[-1]

    @property
    def group_size(self) -> int:
        """Columns that share a scale (K itself: per channel or per tensor)."""
        return self.contracted // max(self.scale.shape[-1], 1)

    @property
    def column_unit(self) -> int:
        """Whole groups, where there are several."""
        return self.group_size if self.scale.shape[-1] > 1 else 1

    def decode(self) -> Array:
        """The nearest points of the grid, `[*lead, N, K]` in the dtype of `scale`."""
        return fake_quantize(self.weight, self.scale, self.zero_point, self.bits, self.normalized)

    def to_affine(self) -> Affine:
        """The array that is stored once training is over; decodes to the same bits."""
        return encode_affine(
            self.weight,
            self.scale,
            self.zero_point,
            bits=self.bits,
            dims=self.dims,
            casts=self.casts,
        )


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def fake_quantize(
    weight: Array, scale: Array, zero_point: Array | None, bits: int, normalized: bool = True
) -> Array:
    """(clip(round(w / scale) + zero, 0, 2^bits - 1) - zero) * scale, with the derivatives of LSQ.

    Arguments are those of `FakeQuantized`; returns `[*lead, N, K]` in the dtype of `scale`.
    """
    u = nearest_codes(weight, scale, zero_point, bits)
    return from_codes(u, scale, zero_point, bits)


@fake_quantize.defjvp
def _fake_quantize_jvp(
    bits: int, normalized: bool, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    weight, scale, zero_point = primals
    d_weight, d_scale, _ = tangents
    out = fake_quantize(weight, scale, zero_point, bits, normalized)
    groups = (*weight.shape[:-1], scale.shape[-1], -1)
    zero: Any = 2 ** (bits - 1)
    if zero_point is not None:
        zero = zero_point.astype(scale.dtype)[..., None]
    low, high = -zero, 2**bits - 1 - zero  # -Q_N and Q_P of the paper
    steps = divide(weight.reshape(groups).astype(scale.dtype), scale[..., None])
    inside = (low < steps) & (steps < high)
    slope = jnp.where(inside, jnp.round(steps) - steps, jnp.clip(steps, low, high))
    if normalized:
        sharing = weight.size // max(scale.size, 1)
        largest = max(2 ** (bits - (zero_point is None)) - 1, 1)
        slope = slope / math.sqrt(sharing * largest)
    through = jnp.where(inside, d_weight.reshape(groups).astype(scale.dtype), 0)
    tangent = through + slope * d_scale[..., None]
    return out, tangent.reshape(weight.shape).astype(out.dtype)
