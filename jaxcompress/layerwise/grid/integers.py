"""Grids of integers, and of the three values of ternary weights."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from jaxcompress.core.arrays.affine import Affine, encode_affine
from jaxcompress.core.arrays.base import STORED, Array
from jaxcompress.core.arrays.rounding import check_bits, covering, from_codes, nearest_codes
from jaxcompress.layerwise.grid.base import Granularity, Range, Scaled

Parameters = tuple[Array, Array | None]


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
