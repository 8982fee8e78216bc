"""Grids of integers, and of the three values of ternary weights."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.affine import Affine, encode_affine
from jaxcompress.core.arrays.base import STORED, Array
from jaxcompress.core.arrays.rounding import (
    check_bits,
    covering,
    divide,
    from_codes,
    in_groups,
    nearest_codes,
    out_of_groups,
)
from jaxcompress.core.errors import InputError
from jaxcompress.layerwise.grid.base import (
    MIRRORED,
    Granularity,
    Range,
    Scaled,
    least_squares,
)

Parameters = tuple[Array, Array | None]
TIMES = (0.6, 2.4, 37)  # the multiples of the mean that ternary weights try as their scale


@dataclass(frozen=True)
class IntegerGrid(Scaled):
    """Affine integers, (u - zero) * scale: the ranges and the rounding of `core.arrays.affine`.

    Parameters are `(scale, zero_point)`, the latter None where symmetric.

    Attributes:
      bits: 1 to 8, or 16.
      group_size: contracted columns that share a scale; None: one scale per row.
      symmetric: fixed zero in the middle of the codes; otherwise a zero point per group.
      static: see `Grid`.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    static: bool = True
    granularity: Granularity = "group"
    range: Range = "minmax"
    scale_bits: int = 0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        super().__post_init__()

    def cover(self, low: Array, high: Array, share: None = None) -> Parameters:
        """Scale and zero point for ranges `[R]`."""
        if self.bits > 8:  # 16-bit floats do not tell their steps apart
            low, high = low.astype(jnp.float32), high.astype(jnp.float32)
        scale, zero = covering(low, high, bits=self.bits, symmetric=self.symmetric)
        return self.kept_scale(scale), zero

    @property
    def shrinks(self) -> tuple[float, ...]:
        """One end of a symmetric grid reaches a step further than the other."""
        return MIRRORED if self.symmetric and self.own_scales else super().shrinks

    def scaled_by(self, parameters: Parameters, factor: Array) -> Parameters:
        """See `Scaled`."""
        scale, zero = parameters
        factor = factor if zero is None else jnp.abs(factor)
        return self.kept_scale((scale * factor).astype(scale.dtype)), zero

    def snap(self, weight: Array, parameters: Parameters) -> Array:
        """The nearest values of the grid for one column `[N]`; ties to even."""
        scale, zero = parameters
        scale, zero = scale[:, None], None if zero is None else zero[:, None]
        codes = nearest_codes(weight[:, None], scale, zero, self.bits)
        return from_codes(codes, scale, zero, self.bits)[:, 0]

    def encode(self, weight: Array, parameters: Parameters, share: None = None) -> Affine:
        """A matrix that lies on this grid as codes; see `Grid`."""
        scale, zero = parameters
        return encode_affine(
            weight,
            self.stored_scale(scale),
            None if zero is None else self.stored(zero),
            bits=self.bits,
            dims=STORED,
            width=self.width(weight.shape[-1]),
        )


@dataclass(frozen=True)
class TernaryGrid(Scaled):
    """-scale, 0 and scale, stored as integers of 2 bits.

    The scale is the mean magnitude, as of BitNet b1.58 (Ma et al., arXiv:2402.17764, equations 1
    to 3); the range "mse" searches for the one that errs least, which is what ternary weight
    networks approximate (Li et al., arXiv:1605.04711, section 2.1). Parameters are the scale.

    Attributes:
      group_size: contracted columns that share a scale; None: one scale per row.
      static: see `Grid`.
    """

    group_size: int | None = 128
    static: bool = True
    granularity: Granularity = "group"
    range: Range = "minmax"
    scale_bits: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.range == "percentile":
            raise InputError("range percentile: ternary weights know minmax (their mean) and mse")

    def fit(self, weight: Array, share: None = None) -> Array:
        """Scales `[R]` of weights `[R, G]`."""
        mean = jnp.mean(jnp.abs(weight.astype(jnp.float32)), axis=-1)

        def scale_of(times: Array) -> Array:
            scale = (mean * times).astype(weight.dtype)
            return self.kept_scale(jnp.where(scale == 0, jnp.finfo(scale.dtype).eps, scale))

        if self.range == "minmax":
            return scale_of(jnp.float32(1))

        def loss_of(scale: Array) -> Array:
            error = jax.vmap(self.snap, (1, None), 1)(weight, scale) - weight
            return jnp.square(error.astype(jnp.float32)).sum(-1)

        return least_squares(scale_of, loss_of, TIMES)

    def scaled_by(self, parameters: Array, factor: Array) -> Array:
        """See `Scaled`; its sign changes nothing."""
        return super().scaled_by(parameters, jnp.abs(factor))

    def snap(self, weight: Array, parameters: Array) -> Array:
        """The nearest of the three values for one column `[N]`; ties to 0."""
        return jnp.clip(jnp.round(divide(weight, parameters)), -1, 1) * parameters

    def encode(self, weight: Array, parameters: Array, share: None = None) -> Affine:
        """A matrix that lies on this grid as codes 1, 2, 3; see `Grid`."""
        width = self.width(weight.shape[-1])
        grouped = in_groups(weight, parameters.shape[-1], width)
        limit = parameters[..., None]
        limited = out_of_groups(jnp.clip(grouped, -limit, limit), weight.shape)
        scale = self.stored_scale(parameters)
        return encode_affine(limited, scale, None, bits=2, dims=STORED, width=width)
