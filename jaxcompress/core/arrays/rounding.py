"""Integer grids in plain functions: ranges, codes, and the values that codes stand for.

A scale `[*lead, R, G]` belongs to a matrix `[*lead, N, K]`: R is N, or 1 where all rows share it;
every one of the G columns stands for `width` consecutive columns of the matrix, K / G unless given
(then the last may stand for fewer).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.core.errors import InputError

Array = jax.Array


def nearest_codes(
    matrix: Array, scale: Array, zero_point: Array | None, bits: int, width: int | None = None
) -> Array:
    """u = clip(round(w / scale + zero), 0, 2^bits - 1), ties to even.

    As compressed-tensors does, the sum is made with the signed zero point (zero - 2^(bits-1)) and
    is itself rounded to the dtype, which decides ties.

    Args:
      matrix: w, float `[*lead, N, K]`.
      scale: `[*lead, N, groups]` (N may be 1: per tensor).
      zero_point: of the shape of `scale`, integers or floats, or None: 2^(bits-1).
      bits: 1 to 8, or 16.
      width: columns that share a scale; None: K / groups.

    Returns:
      int32 `[*lead, N, K]`.
    """
    middle = 2 ** (bits - 1)
    grouped = in_groups(matrix, scale.shape[-1], width)
    steps = divide(grouped, scale[..., None])
    if zero_point is not None:
        signed = _signed(zero_point, middle)[..., None]
        steps = rounded(_wide(steps) + signed, steps.dtype)
    q = jnp.round(jnp.clip(steps, -middle, middle - 1))
    return out_of_groups(q.astype(jnp.int32), matrix.shape) + middle


def in_groups(matrix: Array, groups: int, width: int | None = None) -> Array:
    """`[*lead, N, K]` as `[*lead, N, groups, width]`, the last group filled up with zeros."""
    *lead, columns = matrix.shape
    if width is not None and groups * width != columns:
        missing = groups * width - columns
        matrix = jnp.pad(matrix, [(0, 0)] * len(lead) + [(0, missing)])
        columns += missing
    return matrix.reshape(*lead, groups, columns // max(groups, 1))


def out_of_groups(grouped: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `in_groups`, for a matrix of this shape."""
    columns = grouped.shape[-2] * grouped.shape[-1]
    return grouped.reshape(*shape[:-1], columns)[..., : shape[-1]]


def _signed(zero_point: Array, middle: int) -> Array:
    if jnp.issubdtype(zero_point.dtype, jnp.integer):
        zero_point = zero_point.astype(jnp.int32)
    return zero_point - middle


def divide(x: Array, y: Any) -> Array:
    """x / y in their common dtype with one rounding, as PyTorch and NumPy divide.

    XLA turns the division by a broadcast y into a product with 1 / y, which is often off by one in
    the last place. The largest entry of every symmetric group lies on a tie between two codes, so
    that its code would differ.
    """
    dtype = jnp.result_type(x, y)
    # The condition changes no result; it keeps XLA from seeing that the divisor is a broadcast.
    return rounded(_wide(x) / jnp.where(jnp.isnan(x), _wide(x), y), dtype)


def rounded(x: Array, dtype: Any) -> Array:
    """`x` in `dtype`, rounded here: XLA may leave out the rounding of a mere cast."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant).astype(dtype)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def from_codes(
    u: Array, scale: Array, zero_point: Array | None, bits: int, width: int | None = None
) -> Array:
    """(u - zero) * scale, `[*lead, N, K]` in the dtype of `scale`; arguments as `nearest_codes`."""
    grouped = in_groups(u, scale.shape[-1], width).astype(scale.dtype)
    zero: Any = 2 ** (bits - 1)
    if zero_point is not None:
        zero = zero_point.astype(scale.dtype)[..., None]
    return out_of_groups((grouped - zero) * scale[..., None], u.shape)


def minmax_range(
    matrix: Array, *, bits: int, groups: int, symmetric: bool, per_tensor: bool = False
) -> tuple[Array, Array | None]:
    """Scale and zero point that just cover each group's values; see `covering`.

    Args:
      matrix: float `[*lead, N, K]`.
      bits: 1 to 8, or 16.
      groups: scales per row; must divide K.
      symmetric: without a zero point.
      per_tensor: one scale for each `[N, K]` matrix instead (then `groups` is 1).

    Returns:
      scale `[*lead, N, groups]` (`[*lead, 1, 1]` per tensor), zero point alike or None.
    """
    if per_tensor:
        grouped = matrix.reshape(*matrix.shape[:-2], 1, 1, -1)
    else:
        grouped = matrix.reshape(*matrix.shape[:-1], groups, matrix.shape[-1] // groups)
    return covering(grouped.min(axis=-1), grouped.max(axis=-1), bits=bits, symmetric=symmetric)


def covering(low: Array, high: Array, *, bits: int, symmetric: bool) -> tuple[Array, Array | None]:
    """Scale and zero point that just cover low .. high, bit for bit compressed-tensors'.

    Symmetric: scale = absmax / ((2^bits - 1) / 2) (absmax / 7.5 at 4 bits). Asymmetric: the range
    is widened to hold 0, scale = (high - low) / (2^bits - 1), zero = round(-low / scale). A range
    of nothing but 0 gets the dtype's epsilon as its scale.

    Args:
      low: float, of any shape.
      high: likewise.
      bits: 1 to 8, or 16.
      symmetric: without a zero point.

    Returns:
      scale, and zero point (uint8, uint16 at 16 bits) or None, of the shape of `low`.
    """
    dtype, eps = low.dtype, jnp.finfo(low.dtype).eps
    levels, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        absmax = jnp.maximum(jnp.abs(low), jnp.abs(high))
        scale = divide(absmax, jnp.asarray(levels / 2, dtype))
        return jnp.where(scale == 0, eps, scale), None
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    scale = divide(rounded(_wide(high) - _wide(low), dtype), jnp.asarray(levels, dtype))
    signed = rounded(-middle - _wide(divide(low, scale)), dtype)
    zero = jnp.round(jnp.clip(signed, -middle, middle - 1)) + middle
    zero = jnp.where(scale == 0, middle, zero).astype(code_dtype(bits))
    return jnp.where(scale == 0, eps, scale), zero


def code_dtype(bits: int) -> Any:
    """The unsigned dtype of a code or zero point of so many bits."""
    return jnp.uint8 if bits <= 8 else jnp.uint16


def groups_of(k: int, group_size: int | None) -> int:
    """Number of groups of `group_size` in `k` columns; None or -1: one group (per channel).

    Raises:
      InputError: the size does not divide K; the message names the nearest that do.
    """
    if group_size is None or group_size == -1:
        return 1
    if group_size < 1:
        raise InputError(f"group_size {group_size}: must be a positive number, or -1 per channel")
    if k % group_size:
        fits = [g for g in range(1, k + 1) if k % g == 0]
        near = min(fits, key=lambda g: (abs(int(np.log2(g) * 8 - np.log2(group_size) * 8)), -g))
        raise InputError(
            f"group size {group_size} does not divide the {k} contracted columns; "
            f"use --group-size {near} (or -1: one scale per channel)"
        )
    return k // group_size


def check_bits(bits: int) -> None:
    """Raise `InputError` unless 1 <= bits <= 8, or bits == 16."""
    if not isinstance(bits, int) or not (1 <= bits <= 8 or bits == 16):
        raise InputError(f"bits {bits!r}: integers of 1 to 8 bits, or of 16, are supported")


def check_table_bits(bits: int) -> None:
    """Raise `InputError` unless 1 <= bits <= 8."""
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise InputError(f"bits {bits!r}: codes into a table have 1 to 8 bits")
