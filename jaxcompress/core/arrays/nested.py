"""Double quantization: the scales of a quantized array quantized themselves."""

from __future__ import annotations

from typing import Any, TypeVar

import jax.numpy as jnp

from jaxcompress.core.arrays.base import STORED, Array, CompressedArray, is_compressed
from jaxcompress.core.arrays.codebook import Codebook, nearest_entries, scaled_down
from jaxcompress.core.arrays.shared_rows import share_rows
from jaxcompress.core.arrays.tables import dynamic_map
from jaxcompress.core.errors import InputError
from pallas_kernels.packing import pack

L = TypeVar("L", bound=CompressedArray)


def quantize_scales(leaf: L, *, bits: int = 8, group_size: int = 256) -> L:
    """`leaf` with its scales as codes of few bits, group by group, about their mean.

    Source: Dettmers et al., "QLoRA", arXiv:2305.14314, section 3, double quantization. Of 8 bits
    and groups of 256 the numbers are bitsandbytes', whose groups run on from row to row, where a
    row has a power of two of scales. The codes of the weights stay as they are.

    Args:
      leaf: an array with float scales `[*lead, N, groups]`.
      bits: of a scale, 2 to 8.
      group_size: scales that share a scale of theirs: columns of a row, and whole rows as far as
        they are shorter.

    Raises:
      InputError: there are no float scales, or too many bits.
    """
    scale = getattr(leaf, "scale", None)
    if scale is None or is_compressed(scale) or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise InputError(f"{type(leaf).__name__}: has no float scales that could be quantized")
    if not 2 <= bits <= 8:
        raise InputError(f"scale bits {bits}: scales are quantized to 2 to 8 bits")
    if group_size < 1:
        raise InputError(f"group size {group_size} of scales: must be positive")
    offset = jnp.mean(scale.astype(jnp.float32), axis=(-2, -1), keepdims=True)
    return leaf.replace(scale=about(scale, offset, bits=bits, group_size=group_size))


def about(scale: Array, offset: Array, *, bits: int, group_size: int) -> Codebook:
    """Scales `[*lead, N, groups]` less `offset` `[*lead, 1, 1]` as codes; see `quantize_scales`."""
    *lead, rows, groups = scale.shape
    centered = scale.astype(jnp.float32) - offset
    width = max(w for w in range(1, min(groups, group_size) + 1) if groups % w == 0)
    high = max(1, min(group_size // groups, rows))
    absmax: Any = _absmax(centered, high, width)
    if high > 1:
        absmax = share_rows(absmax, rows, high)
    table = jnp.asarray(dynamic_map(bits))
    table = jnp.broadcast_to(table, (*lead, 1, table.size))
    codes = nearest_entries(scaled_down(centered, absmax), table)
    return Codebook(
        codes.astype(jnp.uint8) if bits == 8 else pack(codes, bits),
        table,
        absmax,
        bits,
        0 if bits == 8 else -groups % 32,
        STORED,
        (str(scale.dtype),),
        offset,
    )


def _absmax(x: Array, high: int, width: int) -> Array:
    """The largest magnitude of every block of `[*lead, N, G]`, `[*lead, N / high, G / width]`."""
    *lead, rows, groups = x.shape
    whole = jnp.pad(jnp.abs(x), [(0, 0)] * len(lead) + [(0, -rows % high), (0, 0)])
    return whole.reshape(*lead, -1, high, groups // width, width).max(axis=(-3, -1))
