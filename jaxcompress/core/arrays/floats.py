"""Narrow floats with scales: FP8, the microscaling formats MXFP8, MXFP6 and MXFP4, and NVFP4."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from jaxcompress.core.arrays.affine import plain
from jaxcompress.core.arrays.base import (
    CONTRACTED,
    INNER,
    KERNEL,
    ROWS,
    Array,
    CompressedArray,
    Dims,
    register,
)
from jaxcompress.core.arrays.minifloat import FORMATS, from_codes, from_e8m0, to_codes
from jaxcompress.core.arrays.rounding import divide, in_groups, out_of_groups
from pallas_kernels.packing import codes_in, pack, unpack


@register
class Float(CompressedArray):
    """Codes of 4 to 8 bits that are floats themselves, times a scale.

    dense = value * scale, or value * (scale / global_scale). It is computed in the dtype of the
    scale, or in that of the array (the first of `casts`) if it is wider; in float32 at least where
    scales are codes.

    Attributes:
      codes: int32 `[*lead, N, ceil32(K) * bits / 32]`: a bitstream along K, as `Affine.codes`.
      scale: `[*lead, N, K / group]`; per channel `[*lead, N, 1]`; per tensor `[*lead, 1, 1]`. An
        array of floats, or one that is compressed, or uint8: codes of `scale_format`.
      global_scale: float32 `[*lead, 1, 1]`, or None (1).
      element: the format of a value, a name of `minifloat.FORMATS`.
      scale_format: "float", "e8m0" (powers of two, microscaling) or "e4m3fn" (NVFP4).
      pad: padded columns, so that K = words * 32 / bits - pad.
      width: columns of a group where the last one may have fewer; None: all have K / groups.
    """

    roles = {
        "codes": (ROWS, CONTRACTED),
        "scale": (ROWS, CONTRACTED),
        "global_scale": (ROWS, INNER),
    }
    trains = {"scale": "scales", "global_scale": "scales"}

    codes: Array
    scale: Any
    global_scale: Array | None = None
    element: str = "e4m3fn"
    scale_format: str = "float"
    pad: int = 0
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)
    width: int | None = None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return FORMATS[self.element].bits

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return codes_in(self.codes.shape[-1], self.bits) - self.pad

    @property
    def groups(self) -> int:
        """Scales of each row (1: per channel or per tensor)."""
        return self.scale.shape[-1]

    @property
    def group_size(self) -> int:
        """Columns that share a scale (K itself: per channel or per tensor)."""
        return self.width or self.contracted // max(self.groups, 1)

    @property
    def column_unit(self) -> int:
        """Whole words of codes and, where there are several, whole groups."""
        if self.groups > 1 and self.contracted % self.group_size:
            return 0
        return math.lcm(32, self.group_size) if self.groups > 1 else 32

    def integers(self) -> Array:
        """Codes, uint8 `[*lead, N, K]`: the bits of the values, sign first."""
        return unpack(self.codes, self.bits, self.contracted)

    def scales(self) -> Array:
        """What values are multiplied by, `[*lead, N or 1, groups]`, in the dtype of the product."""
        scale = plain(self.scale)
        if self.scale_format != "float":
            scale = from_e8m0(scale) if self.scale_format == "e8m0" else from_codes(scale, "e4m3fn")
        if self.global_scale is not None:
            scale = divide(scale, self.global_scale)
        return scale.astype(jnp.promote_types(scale.dtype, self.casts[0]))

    def decode(self) -> Array:
        """value * scale, `[*lead, N, K]` in the dtype of `scales`."""
        scale, codes = self.scales(), self.integers()
        values = from_codes(codes, self.element).astype(scale.dtype)
        grouped = in_groups(values, scale.shape[-1], self.width) * scale[..., None]
        return out_of_groups(grouped, codes.shape)


def encode_float(
    matrix: Array,
    scale: Any,
    global_scale: Array | None = None,
    *,
    element: str,
    scale_format: str = "float",
    dims: Dims = KERNEL,
    casts: tuple[str, ...] | None = None,
    width: int | None = None,
) -> Float:
    """Every entry of `matrix` over its scale to the nearest value, ties to even.

    Args:
      matrix: float `[*lead, N, K]`.
      scale: `[*lead, N, groups]` (N may be 1: per tensor), an array or compressed; see `Float`.
      global_scale: float32 `[*lead, 1, 1]`, or None.
      element: the format of a value, a name of `minifloat.FORMATS`.
      scale_format: "float", "e8m0" or "e4m3fn".
      dims: how the dense axes factor over N and K.
      casts: logical dtypes after decoding; None: the dtype of `matrix`.
      width: columns that share a scale, where the last group may have fewer; None: K / groups.
    """
    leaf = Float(
        jnp.zeros((*matrix.shape[:-1], 0), jnp.int32),
        scale,
        global_scale,
        element,
        scale_format,
        -matrix.shape[-1] % 32,
        dims,
        casts or (str(matrix.dtype),),
        width,
    )
    return leaf.replace(
        codes=pack(nearest_floats(matrix, leaf.scales(), element, width), leaf.bits)
    )


def nearest_floats(matrix: Array, scale: Array, element: str, width: int | None = None) -> Array:
    """Codes, uint8 `[*lead, N, K]`, of the values nearest to matrix / scale.

    Args:
      matrix: float `[*lead, N, K]`.
      scale: float `[*lead, N or 1, groups]`.
      element: a name of `minifloat.FORMATS`.
      width: columns that share a scale; None: K / groups.
    """
    steps = divide(in_groups(matrix, scale.shape[-1], width), scale[..., None])
    return out_of_groups(to_codes(steps, element), matrix.shape)
