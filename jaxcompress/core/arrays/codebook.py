"""Shared weights: every weight is one of few values, and its code says which."""

from __future__ import annotations

import math
from typing import Any

import jax
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
from jaxcompress.core.arrays.rounding import check_table_bits, in_groups, out_of_groups
from jaxcompress.core.errors import InputError
from pallas_kernels.packing import codes_in, pack, unpack


@register
class Codebook(CompressedArray):
    """Codes into a table: dense = table[code] * scale + offset, computed in the dtype of the table.

    Attributes:
      codes: int32 `[*lead, N, ceil32(K) * bits / 32]`: a bitstream along K, as `Affine.codes`. Of 8
        bits also uint8 `[*lead, N, K]`, without padding.
      table: float `[*lead, N, 2^bits]`, a table for each row, or `[*lead, 1, 2^bits]`, one for all.
      scale: float `[*lead, N, K / group]` or `[*lead, 1, 1]`, an array or compressed; or None (1).
      bits: 1 to 8.
      pad: padded columns, so that K = words * 32 / bits - pad.
      offset: float `[*lead, 1, 1]`, or None (0).
      fixed: where the table belongs to a format, its name in `tables.TABLES`; otherwise empty.
    """

    roles = {
        "codes": (ROWS, CONTRACTED),
        "table": (ROWS, INNER),
        "scale": (ROWS, CONTRACTED),
        "offset": (ROWS, INNER),
    }
    trains = {"table": "values", "scale": "scales", "offset": "values"}

    codes: Array
    table: Array
    scale: Any = None
    bits: int = 4
    pad: int = 0
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)
    offset: Array | None = None
    fixed: str = ""

    @property
    def unpacked(self) -> bool:
        """Whether every code is a byte."""
        return self.codes.dtype == jnp.uint8

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        if self.unpacked:
            return self.codes.shape[-1]
        return codes_in(self.codes.shape[-1], self.bits) - self.pad

    @property
    def groups(self) -> int:
        """Scales of each row (1 where there is none)."""
        return 1 if self.scale is None else self.scale.shape[-1]

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.contracted // max(self.groups, 1)

    @property
    def column_unit(self) -> int:
        """Whole words of codes and, where there are several, whole groups."""
        word = 1 if self.unpacked else 32
        if self.groups == 1:
            return word
        return math.lcm(word, self.group_size * unit_of(self.scale))

    def integers(self) -> Array:
        """Codes, uint8 `[*lead, N, K]`."""
        return self.codes if self.unpacked else unpack(self.codes, self.bits, self.contracted)

    def decode(self) -> Array:
        """The values that the codes stand for, `[*lead, N, K]` in the dtype of `table`."""
        codes = self.integers().astype(jnp.int32)
        lead = codes.shape[:-2]
        by_table = codes.reshape(*lead, self.table.shape[-2], -1)
        values = jnp.take_along_axis(self.table, by_table, axis=-1).reshape(codes.shape)
        if self.scale is not None:
            scale = plain(self.scale)
            scaled = in_groups(values, scale.shape[-1]) * scale[..., None]
            values = out_of_groups(scaled, values.shape).astype(values.dtype)
        return values if self.offset is None else (values + self.offset).astype(values.dtype)


def encode_codebook(
    matrix: Array,
    table: Array,
    scale: Any = None,
    *,
    bits: int,
    dims: Dims = KERNEL,
    casts: tuple[str, ...] | None = None,
    fixed: str = "",
) -> Codebook:
    """Every entry of `matrix` to the nearest value of its table; the lower one of two as near.

    Args:
      matrix: float `[*lead, N, K]`.
      table: ascending, `[*lead, N or 1, 2^bits]`.
      scale: positive, `[*lead, N, groups]`: the table is that of matrix / scale; None: of the
        matrix itself.
      bits: 1 to 8.
      dims: how the dense axes factor over N and K.
      casts: logical dtypes after decoding; None: the dtype of `matrix`.
      fixed: as of `Codebook`.

    Raises:
      InputError: bits outside of 1..8, or a table that has not 2^bits entries.
    """
    check_table_bits(bits)
    if table.shape[-1] != 2**bits:
        raise InputError(f"table of {table.shape[-1]} entries: {bits} bits count {2**bits}")
    codes = nearest_entries(scaled_down(matrix, scale), table)
    return Codebook(
        pack(codes, bits),
        table,
        scale,
        bits,
        -matrix.shape[-1] % 32,
        dims,
        casts or (str(matrix.dtype),),
        fixed=fixed,
    )


def scaled_down(matrix: Array, scale: Any) -> Array:
    """`matrix` `[*lead, N, K]` over the scales `[*lead, N, groups]` of its columns.

    As bitsandbytes divides: a product with the reciprocal. A scale of 0 counts as very little.
    """
    if scale is None:
        return matrix
    scale = plain(scale)
    scale = scale.astype(jnp.promote_types(scale.dtype, matrix.dtype))
    tiny = jnp.finfo(scale.dtype).tiny
    reciprocal = 1 / jnp.where(jnp.abs(scale) < tiny, tiny, scale)
    grouped = in_groups(matrix, scale.shape[-1]) * reciprocal[..., None]
    return out_of_groups(grouped, matrix.shape)


def nearest_entries(matrix: Array, table: Array) -> Array:
    """Codes int32 `[*lead, N, K]` of the nearest entries of the table of each row."""
    wide = table.astype(jnp.float32)
    middles = (wide[..., 1:] + wide[..., :-1]) / 2
    *lead, rows, _ = table.shape
    values = matrix.astype(jnp.float32).reshape(-1, matrix.size // max(math.prod((*lead, rows)), 1))
    search = jax.vmap(lambda middles, values: jnp.searchsorted(middles, values, side="left"))
    return search(middles.reshape(values.shape[0], -1), values).reshape(matrix.shape)
