"""Grids by name."""

from __future__ import annotations

from jaxcompress.core.errors import InputError
from jaxcompress.layerwise.grid.base import Granularity, Grid, Range
from jaxcompress.layerwise.grid.integers import IntegerGrid

DTYPES = ("int",)


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
      dtype: one of `DTYPES`; "int4" and the like are short for "int" of so many bits.
      bits: of integers: 1 to 8, or 16.
      group_size: contracted columns that share a scale; -1: one scale per row; of granularity
        "block", the side of a block.
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
    if dtype.startswith("int") and dtype[3:].isdigit():
        dtype, bits = "int", int(dtype[3:])
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: use one of {', '.join(DTYPES)}, int4")
    size = None if group_size == -1 or granularity in ("channel", "tensor") else group_size
    return IntegerGrid(bits, size, symmetric, static, granularity, range, scale_bits)
