"""Narrow floats with scales: FP8, the microscaling formats MXFP8, MXFP6 and MXFP4, and NVFP4."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from jaxcompress.core.arrays.affine import plain, unit_of
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
from jaxcompress.core.arrays.minifloat import (
    FORMATS,
    e8m0_covering,
    from_codes,
    from_e8m0,
    to_codes,
)
from jaxcompress.core.arrays.rounding import divide, in_groups, out_of_groups
from pallas_kernels.packing import codes_in, pack, unpack

SMALLEST_CODE = 0x20  # of NVFP4's scales, 1/8: what stands in for a scale of 0


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
    trains = {"scale": "scales"}

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
        return math.lcm(32, self.group_size * unit_of(self.scale)) if self.groups > 1 else 32

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

    def encode(self, matrix: Array) -> Float:
        """`matrix` `[*lead, N, K]` in this array's format, with scales of its own by magnitude."""
        wide = matrix.astype(self.scales().dtype)
        grouped = jnp.abs(in_groups(wide, self.groups, self.width))
        shared = self.scale.shape[-2] == 1 and self.rows > 1
        absmax = grouped.max((-3, -1))[..., None, :] if shared else grouped.max(-1)
        scale, stored = covering_floats(absmax, self.element, self.scale_format, self.global_scale)
        return encode_float(
            matrix,
            scale.astype(self.scale.dtype) if stored is None else stored,
            self.global_scale,
            element=self.element,
            scale_format=self.scale_format,
            dims=self.dims,
            casts=self.casts,
            width=self.width,
        )


def covering_floats(
    absmax: Array, element: str, scale_format: str, global_scale: Array | None = None
) -> tuple[Array, Array | None]:
    """The scale that just covers magnitudes, bit for bit compressed-tensors'.

    absmax / largest, of nothing but zeros the dtype's epsilon; of "e8m0" see `e8m0_covering`; of
    "e4m3fn" that quotient times the global scale, rounded to e4m3fn (0 becomes its epsilon, 1/8).

    Args:
      absmax: float, of any shape.
      element: the format of a value, a name of `minifloat.FORMATS`.
      scale_format: "float", "e8m0" or "e4m3fn".
      global_scale: float32, broadcasts with `absmax`; of "e4m3fn" only.

    Returns:
      What values are multiplied by, and its codes, uint8, where scales are stored as such.
    """
    if scale_format == "e8m0":
        codes = e8m0_covering(absmax, element)
        return from_e8m0(codes), codes
    scale = divide(absmax, jnp.asarray(FORMATS[element].largest, absmax.dtype))
    if scale_format == "float":
        return jnp.where(scale == 0, jnp.finfo(scale.dtype).eps, scale), None
    assert global_scale is not None
    codes = to_codes(scale * global_scale, "e4m3fn")
    codes = jnp.where(codes == 0, SMALLEST_CODE, codes).astype(jnp.uint8)
    return divide(from_codes(codes, "e4m3fn"), global_scale), codes


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
