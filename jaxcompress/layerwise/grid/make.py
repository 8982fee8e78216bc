"""Grids by name."""

from __future__ import annotations

from jaxcompress.core.arrays.tables import TABLES
from jaxcompress.core.errors import InputError
from jaxcompress.layerwise.grid.base import Granularity, Grid, Range
from jaxcompress.layerwise.grid.floats import FloatGrid
from jaxcompress.layerwise.grid.integers import IntegerGrid, TernaryGrid
from jaxcompress.layerwise.grid.tables import TableGrid

FLOATS = {"fp8": "e4m3fn", "fp8_e5m2": "e5m2"}
SCALED_BY_POWERS = {
    "mxfp8": "e4m3fn",
    "mxfp8_e5m2": "e5m2",
    "mxfp6": "e2m3",
    "mxfp6_e3m2": "e3m2",
    "mxfp4": "e2m1",
}
DTYPES = ("int", "ternary", *FLOATS, *SCALED_BY_POWERS, "nvfp4", *TABLES)

GROUP_SIZE = 128  # not a wish: formats with a group size of their own take that


def grid_of(
    dtype: str = "int",
    *,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
    granularity: Granularity = "group",
    range: Range = "minmax",  # noqa: A002 (the field's word)
    static: bool = True,
    scale_bits: int = 0,
) -> Grid:
    """The grid of a number format.

    Args:
      dtype: one of `DTYPES`; "int4" and the like are short for "int" of so many bits. "fp8" is
        e4m3fn, "mxfp8" too, "mxfp6" is e2m3.
      bits: of integers: 1 to 8, or 16.
      group_size: contracted columns that share a scale; -1: one scale per row; of granularity
        "block", the side of a block. 128 stands for 64 of "nf4" and "fp4", for 32 of the "mx"
        formats and for 16 of "nvfp4".
      symmetric: of integers: fixed zero in the middle of the codes; otherwise a zero point per
        group.
      granularity: what shares a scale: "group", "channel" (a row), "tensor" (a matrix) or "block".
      range: "minmax" covers every value, "percentile" all but the lowest and the highest percent,
        "mse" shrinks each range to the least squared error.
      static: whether a solver takes all scales from the weights as given.
      scale_bits: 16: scales are stored as float16; 0: in the dtype of the weights.

    Raises:
      InputError: there is no such format.
    """
    dtype, bits = split_dtype(dtype, bits)
    size = None if group_size == -1 or granularity in ("channel", "tensor") else group_size
    if dtype == "int":
        return IntegerGrid(bits, size, symmetric, static, granularity, range, scale_bits)
    if not symmetric:
        raise InputError(f"dtype {dtype}: symmetric; only integers have a zero point")
    rest = (static, granularity, range, scale_bits)
    if dtype == "ternary":
        return TernaryGrid(size, *rest)
    if dtype in TABLES:
        return TableGrid(dtype, 64 if size == GROUP_SIZE else size, *rest)
    if dtype in FLOATS:
        return FloatGrid(FLOATS[dtype], size, *rest)
    if dtype == "nvfp4":
        return FloatGrid("e2m1", 16 if size == GROUP_SIZE else size, *rest, "e4m3fn")
    return FloatGrid(SCALED_BY_POWERS[dtype], 32 if size == GROUP_SIZE else size, *rest, "e8m0")


def split_dtype(dtype: str, bits: int) -> tuple[str, int]:
    """The name of a format and the bits of an integer: those of `bits`, but 4 of "int4".

    Raises:
      InputError: there is no such format.
    """
    if dtype.startswith("int") and dtype[3:].isdigit():
        return "int", int(dtype[3:])
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: use one of {', '.join(DTYPES)}, or int4 and the like")
    return dtype, bits
