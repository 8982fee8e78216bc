"""Rounding to nearest by the conventions of others: the textbook's, and those of GGUF files."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import STORED, Array
from jaxcompress.core.arrays.floats import Float
from jaxcompress.core.arrays.rounding import divide, in_groups, out_of_groups
from jaxcompress.core.errors import InputError
from pallas_kernels.packing import pack

GGUF_GROUP = 32
GGUF_BITS = (4, 5, 8)  # Q4_0, Q5_0, Q8_0


@partial(jax.jit, static_argnames=("bits", "groups", "per_tensor"))
def textbook(matrix: Array, *, bits: int, groups: int, per_tensor: bool = False) -> Affine:
    """q = floor((w - min) / (max - min) * (2^bits - 1) + 0.5), which decodes to q * scale + min.

    The range is not widened to hold 0, and 0 may not be among the values. Held with scale =
    (max - min) / (2^bits - 1) and the zero point -min / scale, both float32.

    Args:
      matrix: float `[*lead, N, K]`.
      bits: 1 to 8, or 16.
      groups: of each row; must divide K.
      per_tensor: one range for each matrix instead (then `groups` is 1).
    """
    wide = matrix.astype(jnp.float32)
    grouped = in_groups(wide, groups)
    axes = (-3, -2, -1) if per_tensor else (-1,)
    low, high = grouped.min(axes, keepdims=True), grouped.max(axes, keepdims=True)
    levels = 2**bits - 1
    flat = high == low
    share = divide(grouped - low, jnp.where(flat, 1, high - low))
    codes = jnp.floor(share * levels + 0.5).astype(jnp.int32)
    scale = jnp.where(flat, 1, (high - low) / levels)
    return _affine(matrix, codes, scale[..., 0], -divide(low, scale)[..., 0], bits)


@partial(jax.jit, static_argnames="bits")
def gguf_integers(matrix: Array, *, bits: int) -> Affine:
    """The numbers of GGUF's Q4_0, Q5_0 and Q8_0: a float16 scale for every 32 columns.

    Of 4 and 5 bits the value of the largest magnitude, whatever its sign, gets the lowest code; of
    8 bits the codes are -127 to 127, halves away from 0.

    Args:
      matrix: float `[*lead, N, K]`, 32 a divisor of K.
      bits: 4, 5 or 8.
    """
    grouped = in_groups(matrix.astype(jnp.float32), matrix.shape[-1] // GGUF_GROUP)
    size, middle = jnp.abs(grouped), 2 ** (bits - 1)
    if bits == 8:
        scale = size.max(-1, keepdims=True) / 127
    else:
        at = jnp.argmax(size, axis=-1, keepdims=True)
        scale = jnp.take_along_axis(grouped, at, axis=-1) / -middle
    steps = grouped * jnp.where(scale == 0, 0, 1 / scale)
    if bits == 8:
        away = jnp.floor(jnp.abs(steps)) + jnp.floor(2 * (jnp.abs(steps) % 1))
        codes = jnp.sign(steps) * away + middle
    else:
        codes = jnp.clip(jnp.trunc(steps + (middle + 0.5)), 0, 2 * middle - 1)
    return _affine(matrix, codes.astype(jnp.int32), scale[..., 0].astype(jnp.float16), None, bits)


@jax.jit
def gguf_mxfp4(matrix: Array) -> Float:
    """The numbers of GGUF's MXFP4: the exponent of the largest magnitude less 2, ties towards 0.

    Args:
      matrix: float `[*lead, N, K]`, 32 a divisor of K.
    """
    grouped = in_groups(matrix.astype(jnp.float32), matrix.shape[-1] // GGUF_GROUP)
    absmax = jnp.abs(grouped).max(-1, keepdims=True)
    exponent = lax.bitcast_convert_type(absmax, jnp.int32) >> 23
    stored = jnp.maximum(exponent - 2, 0)
    scale = lax.bitcast_convert_type(jnp.maximum(stored, 1) << 23, jnp.float32)
    ends = jnp.asarray([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    codes = (jnp.abs(grouped / scale)[..., None] > ends).sum(-1)
    codes += jnp.where((grouped < 0) & (codes > 0), 8, 0)
    return Float(
        pack(out_of_groups(codes, matrix.shape), 4),
        stored[..., 0].astype(jnp.uint8),
        element="e2m1",
        scale_format="e8m0",
        pad=-matrix.shape[-1] % 32,
        dims=STORED,
        casts=(str(matrix.dtype),),
    )


def gguf(matrix: Array, dtype: str, bits: int) -> Affine | Float:
    """`gguf_integers` or `gguf_mxfp4`.

    Raises:
      InputError: a format that GGUF's own package does not write, or rows that are no whole groups.
    """
    if matrix.shape[-1] % GGUF_GROUP:
        raise InputError(
            f"range gguf: its groups of {GGUF_GROUP} do not divide the {matrix.shape[-1]} "
            "contracted columns"
        )
    if dtype == "mxfp4":
        return gguf_mxfp4(matrix)
    if dtype != "int" or bits not in GGUF_BITS:
        raise InputError(
            f"range gguf: no format of its own for {dtype} of {bits} bits; use --dtype int of 4, 5 "
            "or 8 bits, or mxfp4"
        )
    return gguf_integers(matrix, bits=bits)


def _affine(
    matrix: Array, grouped: Array, scale: Array, zero_point: Array | None, bits: int
) -> Affine:
    return Affine(
        pack(out_of_groups(grouped, matrix.shape), bits),
        scale,
        zero_point,
        bits,
        -matrix.shape[-1] % 32,
        STORED,
        (str(matrix.dtype),),
    )
