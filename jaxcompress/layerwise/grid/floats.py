"""Grids of narrow floats: FP8, the microscaling formats, NVFP4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp

from jaxcompress.core.arrays.base import STORED, Array
from jaxcompress.core.arrays.floats import (
    Float,
    covering_floats,
    encode_float,
    nearest_floats,
)
from jaxcompress.core.arrays.minifloat import FORMATS, from_codes
from jaxcompress.core.arrays.rounding import divide
from jaxcompress.core.errors import InputError
from jaxcompress.layerwise.grid.base import Granularity, Range, Scaled

SCALE_GROUPS = {"e8m0": 32, "e4m3fn": 16}  # columns that the formats' owners give a scale


class FloatParameters(NamedTuple):
    """Of one group or of all.

    Attributes:
      scale: float, what values are multiplied by.
      stored: uint8, its code where the format has one, else None.
    """

    scale: Array
    stored: Array | None


@dataclass(frozen=True)
class FloatGrid(Scaled):
    """Floats of few bits times a scale: see `core.arrays.floats.Float`.

    Attributes:
      element: the format of a value, a name of `minifloat.FORMATS`.
      group_size: see `Grid`; scales that are codes belong to groups of 32 ("e8m0") or 16 columns.
      scale_format: "float"; "e8m0", powers of two (microscaling); or "e4m3fn" over a scale of the
        matrix (NVFP4).
    """

    element: str = "e4m3fn"
    group_size: int | None = 128
    static: bool = True
    granularity: Granularity = "group"
    range: Range = "minmax"
    scale_bits: int = 0
    scale_format: Literal["float", "e8m0", "e4m3fn"] = "float"

    def __post_init__(self) -> None:
        super().__post_init__()
        own = SCALE_GROUPS.get(self.scale_format)
        if own and (self.group_size, self.granularity, self.scale_bits) != (own, "group", 0):
            raise InputError(
                f"scales of {self.scale_format}: 8 bits for every group of {own} columns; leave "
                "group_size, granularity and scale_bits to the format"
            )

    def share(self, weight: Array) -> FloatParameters | Array | None:
        """NVFP4's global scale, 448 * 6 / absmax, or what granularity "tensor" shares."""
        if self.scale_format != "e4m3fn":
            return super().share(weight)
        absmax = jnp.max(jnp.abs(weight))
        absmax = jnp.maximum(absmax, jnp.finfo(absmax.dtype).tiny)
        most = FORMATS["e4m3fn"].largest * FORMATS[self.element].largest
        scale = divide(jnp.asarray(most, absmax.dtype), absmax)
        return jnp.where(jnp.isfinite(scale), scale, 1).astype(jnp.float32)

    def cover(self, low: Array, high: Array, share: Array | None = None) -> FloatParameters:
        """The scale for ranges `[R]`, as compressed-tensors chooses it."""
        absmax = jnp.maximum(jnp.abs(low), jnp.abs(high))
        scale, codes = covering_floats(absmax, self.element, self.scale_format, share)
        return FloatParameters(scale if codes is not None else self.kept_scale(scale), codes)

    @property
    def own_scales(self) -> bool:
        """See `Scaled`; the scales of microscaling formats are codes."""
        return self.scale_format == "float" and super().own_scales

    def scaled_by(self, parameters: FloatParameters, factor: Array) -> FloatParameters:
        """See `Scaled`; its sign changes nothing."""
        scale = (parameters.scale * jnp.abs(factor)).astype(parameters.scale.dtype)
        return parameters._replace(scale=self.kept_scale(scale))

    def snap(self, weight: Array, parameters: FloatParameters) -> Array:
        """The nearest values of the grid for one column `[N]`; ties to even."""
        scale = parameters.scale
        codes = nearest_floats(weight[:, None], scale[:, None], self.element)[:, 0]
        return from_codes(codes, self.element).astype(scale.dtype) * scale

    def encode(
        self, weight: Array, parameters: FloatParameters, share: Array | None = None
    ) -> Float:
        """A matrix that lies on this grid as codes; see `Grid`."""
        coded = parameters.stored
        return encode_float(
            weight,
            self.stored_scale(parameters.scale) if coded is None else coded,
            share[..., None, None] if self.scale_format == "e4m3fn" and share is not None else None,
            element=self.element,
            scale_format=self.scale_format,
            dims=STORED,
            width=self.width(weight.shape[-1]),
        )
