"""How a pruned matrix is kept: zeros in a dense array, or an array that holds what is left."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

import jax.numpy as jnp

from jaxcompress.core.arrays.affine import Affine, encode_affine, plain
from jaxcompress.core.arrays.base import STORED, Array, CompressedArray, dense
from jaxcompress.core.arrays.block_sparse import BlockSparse
from jaxcompress.core.arrays.csr import CSR
from jaxcompress.core.arrays.sparse import Encode, NMSparse, UnstructuredSparse
from jaxcompress.core.arrays.training import Masked
from jaxcompress.core.errors import InputError
from pallas_kernels.packing import pack

Store = Literal["zeros", "masked", "sparse", "bitmask", "csr"]

# Blocks of rows by columns.
BLOCK = re.compile(r"block:(\d+)x(\d+)")
N_M = re.compile(r"(\d+):(\d+)")


def store(
    weight: Array | CompressedArray, mask: Array, kind: str = "zeros", pattern: str = "unstructured"
) -> Array | CompressedArray:
    """`weight` where `mask` keeps it, in the form that was asked for.

    Args:
      weight: `[*lead, N, K]`, dense or compressed. An affine one stays on its own grid, which
        holds zero: also as the values of a sparse array (2:4 and int4 in one).
      mask: bool `[*lead, N, K]`, True = kept. It may be traced: then a form whose size depends on
        how much is kept has room for everything.
      kind: "zeros" in a dense array, "masked" (to train on), or a sparse array: "sparse" (what the
        pattern calls for: positions of n:m, bits of blocks, else a bitmask), "bitmask" (one bit for
        every weight) or "csr" (a column beside every value; the smallest file from about 94 %
        sparsity on).
      pattern: what the mask keeps: "unstructured", n:m such as "2:4", or blocks of rows by
        columns such as "block:4x16".

    Returns:
      A dense array ("zeros"), or a compressed array of the dims `[N, K]`.

    Raises:
      InputError: an unknown kind, or a mask or matrix that does not fit the pattern.
    """
    if kind not in get_args(Store):
        raise InputError(f"store {kind!r}: use one of {', '.join(get_args(Store))}")
    if isinstance(weight, Affine):
        return _affine(weight.with_layout("canonical"), mask, kind, pattern)
    matrix = dense(weight)
    if kind == "masked":
        return Masked(matrix, jnp.asarray(mask, bool), STORED, (str(matrix.dtype),))
    pruned = jnp.where(mask, matrix, 0).astype(matrix.dtype)
    return pruned if kind == "zeros" else _sparse(pruned, mask, kind, pattern)


def _sparse(
    matrix: Array,
    mask: Array,
    kind: str,
    pattern: str,
    casts: tuple[str, ...] | None = None,
    encode: Encode | None = None,
) -> CompressedArray:
    options: Any = {"dims": STORED, "casts": casts, "encode": encode}
    n_m, block = N_M.fullmatch(pattern), BLOCK.fullmatch(pattern)
    if kind == "csr":
        return CSR.from_mask(matrix, mask, **options)
    if kind == "sparse" and n_m:
        return NMSparse.from_mask(matrix, mask, int(n_m[1]), int(n_m[2]), **options)
    if kind == "sparse" and block:
        return BlockSparse.from_mask(matrix, mask, (int(block[1]), int(block[2])), **options)
    return UnstructuredSparse.from_mask(matrix, mask, **options)


def _affine(weight: Affine, mask: Array, kind: str, pattern: str) -> CompressedArray:
    """A quantized matrix: the same codes, or that of zero where the mask removes them."""
    if kind == "masked":
        raise InputError("store masked: a quantized matrix is not trained; prune it before")
    if kind == "zeros":
        return encode_affine(
            jnp.where(mask, weight.decode(), 0),
            weight.scale,
            weight.zero_point,
            bits=weight.bits,
            dims=STORED,
            casts=weight.casts,
            width=weight.width,
        )
    groups, zero = weight.groups, 2 ** (weight.bits - 1)
    if weight.zero_point is not None:
        zero = plain(weight.zero_point)
        if not jnp.issubdtype(zero.dtype, jnp.integer):
            raise InputError(f"store {kind}: 0 is not among the values of the quantized matrix")
        zero = zero.astype(jnp.int32)
    n_m = N_M.fullmatch(pattern) if kind == "sparse" else None
    if groups > 1 and (n_m is None or weight.group_size % int(n_m[2])):
        raise InputError(
            f"store {kind}: the kept values of a row do not fall into groups of "
            f"{weight.group_size} columns; quantize with --group-size -1, or prune n:m"
        )
    spread = weight.contracted // groups
    columns_zero = jnp.repeat(zero, spread, axis=-1) if weight.zero_point is not None else zero

    def encode(kept: Array) -> Affine:
        per_group = kept.shape[-1] // groups
        again = jnp.repeat(zero, per_group, axis=-1) if weight.zero_point is not None else zero
        return weight.replace(
            codes=pack(kept + again, weight.bits),
            pad=-kept.shape[-1] % 32,
            dims=STORED,
            partition=None,
        )

    steps = weight.integers().astype(jnp.int32) - columns_zero
    return _sparse(steps, mask, kind, pattern, weight.casts, encode)
