"""Round to nearest: the grid from the weights alone, every weight to its nearest point."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax

from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import Array, CompressedArray, dense
from jaxcompress.core.arrays.nested import quantize_scales
from jaxcompress.core.arrays.rounding import check_bits, groups_of
from jaxcompress.core.errors import InputError
from jaxcompress.layerwise.grid import Granularity, Grid, grid_of, nearest, split_dtype
from jaxcompress.quantization.conventions import gguf, textbook

SCALE_BITS = tuple(range(2, 9))  # of quantized scales


def rtn(
    weight: Array | CompressedArray,
    *,
    dtype: str = "int",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    range: Literal["minmax", "percentile", "mse", "textbook", "gguf"] = "minmax",  # noqa: A002
    granularity: Granularity = "group",
    scale_bits: int = 0,
) -> CompressedArray:
    """Round to nearest in any number format.

    Source: the baseline of Frantar et al., "GPTQ", arXiv:2210.17323, section 4; the searched
    range as in Banner et al., arXiv:1810.05723, section 3, by a grid instead of a formula; scales
    of 8 bits: double quantization, Dettmers et al., arXiv:2305.14314, section 3.

    Args:
      weight: float `[*lead, N, K]`, N rows by K contracted columns; a compressed one is rounded
        anew from its dense values.
      dtype: "int", fp8, fp8_e5m2, nf4, fp4, mxfp8, mxfp6, mxfp4, nvfp4 or ternary.
      bits: bits of an integer, 1 to 8 or 16.
      group_size: contracted columns that share a scale; must divide K; -1: one scale per row; the
        side of a block; formats with groups of their own (nf4, mxfp4, ...) read 128 as those.
      symmetric: fixed zero in the middle of the integers; otherwise a zero point per group.
      range: "minmax" covers every value, "percentile" all but the lowest and the highest percent;
        "mse" shrinks each range to the least squared error; "textbook" floor((w - min) / (max -
        min) * (2^bits - 1) + 0.5), 0 not among the values; "gguf" the numbers of its Q4_0, Q5_0,
        Q8_0 and MXFP4.
      granularity: "group", "channel" (one scale per row), "tensor" (one per matrix) or "block"
        (one per square of group_size).
      scale_bits: 8: the scales are quantized, too (256 share one); 16: they are float16; 0: they
        have the dtype of the weights.

    Returns:
      The quantized matrix, in the dims `[N, K]` with the dtype of `weight`. Exact zeros stay zero,
      but in the textbook's form.

    Raises:
      InputError: no such format, or a group size that does not divide K.
    """
    dtype, bits = split_dtype(dtype, bits)
    if scale_bits not in (0, *SCALE_BITS, 16):
        raise InputError(f"scale_bits {scale_bits}: 0, as the weights; 16; or 2 to 8, quantized")
    nested = scale_bits in SCALE_BITS
    if range == "textbook":
        rounded: CompressedArray = _textbook(weight, dtype, bits, group_size, granularity)
    elif range == "gguf":
        rounded = gguf(dense(weight), dtype, bits)
    else:
        grid = grid_of(
            dtype,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            granularity=granularity,
            range=range,
            scale_bits=0 if nested else scale_bits,
        )
        rounded = _nearest(dense(weight), grid)
    return quantize_scales(rounded, bits=scale_bits) if nested else rounded


@partial(jax.jit, static_argnums=1)
def _nearest(weight: Array, grid: Grid) -> CompressedArray:
    return nearest(grid, weight)


def _textbook(
    weight: Array | CompressedArray, dtype: str, bits: int, group_size: int, granularity: str
) -> Affine:
    check_bits(bits)
    if dtype != "int" or granularity == "block":
        raise InputError("range textbook: integers by group, channel or tensor only")
    groups = groups_of(weight.shape[-1], group_size) if granularity == "group" else 1
    return textbook(dense(weight), bits=bits, groups=groups, per_tensor=granularity == "tensor")
