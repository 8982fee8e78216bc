"""The compressed arrays that the shared suite runs over, each with a decoding in plain NumPy.

A new class joins by one line in CASES (and one in NUMPY, which says what its buffers mean).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.affine import Affine, encode_affine, minmax_range
from jaxcompress.core.arrays.base import KERNEL, STORED, CompressedArray, Dims, is_compressed
from jaxcompress.core.arrays.block_sparse import BlockSparse
from jaxcompress.core.arrays.codebook import Codebook, encode_codebook
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.csr import CSR
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.arrays.sparse import NMSparse, UnstructuredSparse
from jaxcompress.core.arrays.training import FakeQuantized, Masked

N, K = 16, 256


@dataclass(frozen=True)
class Case:
    """One format.

    Attributes:
      name: of the test.
      make: `make(matrix [*lead, N, K], dims)` in this format.
      again: `again(leaf, leaf.decode())`: the decoded matrix encoded once more, None where there
        is no one answer.
      exact: whether decoding is free of rounding that could differ from NumPy's.
    """

    name: str
    make: Callable[[Any, Dims], CompressedArray]
    again: Callable[[Any, Any], CompressedArray] | None = None
    exact: bool = True

    def __str__(self) -> str:
        return self.name


def random_matrix(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def matrix_of_case(lead: tuple[int, ...] = (), seed: int = 0) -> np.ndarray:
    return random_matrix(*lead, N, K, seed=seed)


# ------------------------------------------------------------------------------- encoders


def affine(bits: int, symmetric: bool, groups: int | None) -> Callable[..., Affine]:
    """`groups` scales per row; None: per tensor."""

    def make(matrix: Any, dims: Dims = KERNEL) -> Affine:
        matrix = jnp.asarray(matrix)
        scale, zero = minmax_range(
            matrix, bits=bits, groups=groups or 1, symmetric=symmetric, per_tensor=groups is None
        )
        return encode_affine(matrix, scale, zero, bits=bits, dims=dims)

    return make


def affine_again(leaf: Affine, matrix: Any) -> Affine:
    return encode_affine(
        matrix, leaf.scale, leaf.zero_point, bits=leaf.bits, dims=leaf.dims, casts=leaf.casts
    )


def n_of_m_mask(matrix: np.ndarray, n: int, m: int) -> np.ndarray:
    runs = np.abs(matrix).reshape(*matrix.shape[:-1], -1, m)
    return (np.argsort(np.argsort(-runs, axis=-1), axis=-1) < n).reshape(matrix.shape)


def n_of_m(n: int, m: int, encode: Any = None) -> Callable[..., NMSparse]:
    def make(matrix: Any, dims: Dims = KERNEL) -> NMSparse:
        mask = n_of_m_mask(matrix, n, m)
        return NMSparse.from_mask(jnp.asarray(matrix), mask, n, m, dims=dims, encode=encode)

    return make


def stored(make: Callable[..., Affine]) -> Callable[[Any], Affine]:
    return lambda values: make(values, STORED)


def n_of_m_again(leaf: NMSparse, matrix: Any) -> NMSparse:
    encode = (lambda v: affine_again(leaf.values, v)) if is_compressed(leaf.values) else None
    return NMSparse.from_mask(matrix, leaf.mask(), leaf.n, leaf.m, dims=leaf.dims, encode=encode)


def any_mask(cls: Any, encode: Any = None, **options: Any) -> Callable[..., CompressedArray]:
    def make(matrix: Any, dims: Dims = KERNEL) -> CompressedArray:
        mask = np.abs(matrix) > 0.7
        return cls.from_mask(jnp.asarray(matrix), mask, dims=dims, encode=encode, **options)

    return make


def any_mask_again(leaf: Any, matrix: Any) -> CompressedArray:
    encode = (lambda v: affine_again(leaf.values, v)) if is_compressed(leaf.values) else None
    block = {"block": leaf.block} if isinstance(leaf, BlockSparse) else {}
    return type(leaf).from_mask(matrix, leaf.mask(), dims=leaf.dims, encode=encode, **block)


def blocks(encode: Any = None) -> Callable[..., BlockSparse]:
    """Blocks of 2 x 8, of which those of one large entry stay."""

    def make(matrix: Any, dims: Dims = KERNEL) -> BlockSparse:
        mask = np.abs(matrix) > 2.2
        return BlockSparse.from_mask(jnp.asarray(matrix), mask, (2, 8), dims=dims, encode=encode)

    return make


def codebook(bits: int, per_row: bool, groups: int | None) -> Callable[..., Codebook]:
    """Tables of quantiles; `groups` scales per row, None: no scale."""

    def make(matrix: Any, dims: Dims = KERNEL) -> Codebook:
        matrix = jnp.asarray(matrix)
        scale = None
        if groups is not None:
            runs = matrix.reshape(*matrix.shape[:-1], groups, -1)
            scale = jnp.max(jnp.abs(runs), axis=-1)
        rows = matrix if per_row else matrix.reshape(*matrix.shape[:-2], 1, -1)
        table = jnp.quantile(rows, jnp.linspace(0.02, 0.98, 2**bits), axis=-1)
        table = jnp.moveaxis(table, 0, -1) / (1 if groups is None else 3)
        return encode_codebook(matrix, table, scale, bits=bits, dims=dims)

    return make


def codebook_again(leaf: Codebook, matrix: Any) -> Codebook:
    return encode_codebook(
        matrix, leaf.table, leaf.scale, bits=leaf.bits, dims=leaf.dims, casts=leaf.casts
    )


def low_rank(matrix: Any, dims: Dims = KERNEL) -> LowRank:
    return LowRank(jnp.asarray(matrix[..., :5]), jnp.asarray(matrix[..., :5, :]), dims)


def low_rank_plus_int4(matrix: Any, dims: Dims = KERNEL) -> Sum:
    return Sum.of(low_rank(matrix, dims), affine(4, True, 8)(matrix, dims))


def masked(matrix: Any, dims: Dims = KERNEL) -> Masked:
    return Masked(jnp.asarray(matrix), jnp.asarray(n_of_m_mask(matrix, 2, 4)), dims)


def fake_quantized(symmetric: bool, groups: int | None) -> Callable[..., FakeQuantized]:
    def make(matrix: Any, dims: Dims = KERNEL) -> FakeQuantized:
        leaf = affine(4, symmetric, groups)(matrix, dims)
        return FakeQuantized(jnp.asarray(matrix), leaf.scale, leaf.zero_point, 4, dims=dims)

    return make


def masked_again(leaf: Masked, matrix: Any) -> Masked:
    return Masked(jnp.where(leaf.mask, matrix, leaf.weight), leaf.mask, leaf.dims, leaf.casts)


GRANULARITIES = [("tensor", None), ("channel", 1), ("group", 4)]

EVERY_AFFINE = [
    Case(
        f"affine-{bits}-{'symmetric' if symmetric else 'asymmetric'}-{name}",
        affine(bits, symmetric, groups),
        affine_again,
    )
    for name, groups in GRANULARITIES
    for bits in range(1, 9)
    for symmetric in (True, False)
]

CASES = [
    Case("affine-4-group", affine(4, True, 4), affine_again),
    Case("affine-3-asymmetric-group", affine(3, False, 8), affine_again),
    Case("affine-8-channel", affine(8, True, 1), affine_again),
    Case("affine-5-asymmetric-tensor", affine(5, False, None), affine_again),
    Case("sparse-2:4", n_of_m(2, 4), n_of_m_again),
    Case("sparse-1:4", n_of_m(1, 4), n_of_m_again),
    Case("sparse-4:8", n_of_m(4, 8), n_of_m_again),
    Case("sparse-2:4-int4", n_of_m(2, 4, stored(affine(4, False, 4))), n_of_m_again),
    Case("unstructured", any_mask(UnstructuredSparse), any_mask_again),
    Case(
        "unstructured-int8",
        any_mask(UnstructuredSparse, stored(affine(8, True, 1))),
        any_mask_again,
    ),
    Case("csr", any_mask(CSR), any_mask_again),
    Case("csr-int8", any_mask(CSR, stored(affine(8, True, 1))), any_mask_again),
    Case("blocks", blocks(), any_mask_again),
    Case("blocks-int8", blocks(stored(affine(8, True, 1))), any_mask_again),
    Case("codebook-4-tensor", codebook(4, False, None), codebook_again),
    Case("codebook-3-row", codebook(3, True, None), codebook_again),
    Case("codebook-2-group", codebook(2, False, 8), codebook_again),
    Case("low-rank", low_rank, exact=False),
    Case("low-rank-plus-int4", low_rank_plus_int4, exact=False),
    Case("masked", masked, masked_again),
    Case("fake-quantized", fake_quantized(True, 4)),
    Case("fake-quantized-asymmetric-tensor", fake_quantized(False, None)),
]


# ------------------------------------------------------------------- what the buffers mean


def numpy_decode(leaf: Any) -> np.ndarray:
    """The matrix `[*lead, N, K]` of a compressed array, or an array as it is."""
    return NUMPY[type(leaf)](leaf) if is_compressed(leaf) else np.asarray(leaf)


def bitstream(words: Any, bits: int, count: int) -> np.ndarray:
    """Codes of `bits` bits, one bit at a time."""
    octets = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little")
    fields = stream.reshape(*stream.shape[:-1], -1, bits)[..., :count, :]
    return (fields.astype(int) << np.arange(bits)).sum(-1)


def numpy_grid(u: np.ndarray, leaf: Any) -> np.ndarray:
    scale = np.asarray(leaf.scale)
    zero = 2 ** (leaf.bits - 1) if leaf.zero_point is None else np.asarray(leaf.zero_point, int)
    spread = u.shape[-1] // scale.shape[-1]
    zero = np.repeat(zero, spread, -1) if leaf.zero_point is not None else zero
    return (u - zero).astype(scale.dtype) * np.repeat(scale, spread, -1)


def numpy_affine(leaf: Affine) -> np.ndarray:
    k = leaf.codes.shape[-1] * 32 // leaf.bits - leaf.pad
    return numpy_grid(bitstream(leaf.codes, leaf.bits, k), leaf)


def numpy_n_of_m(leaf: NMSparse) -> np.ndarray:
    values = numpy_decode(leaf.values)
    places = bitstream(leaf.positions, int(np.ceil(np.log2(leaf.m))), values.shape[-1])
    runs = np.arange(values.shape[-1]) // leaf.n * leaf.m
    out = np.zeros((*values.shape[:-1], values.shape[-1] * leaf.m // leaf.n), values.dtype)
    np.put_along_axis(out, runs + places, values, axis=-1)
    return out


def numpy_unstructured(leaf: UnstructuredSparse) -> np.ndarray:
    values = numpy_decode(leaf.values)
    k = leaf.bitmask.shape[-1] * 32 - leaf.pad
    mask = bitstream(leaf.bitmask, 1, k).astype(bool)
    out = np.zeros(mask.shape, values.dtype)
    for row in np.ndindex(*mask.shape[:-1]):
        out[row][mask[row]] = values[row][: mask[row].sum()]
    return out


def numpy_csr(leaf: CSR) -> np.ndarray:
    values, counts = numpy_decode(leaf.values), np.asarray(leaf.counts)[..., 0]
    out = np.zeros((*counts.shape, leaf.k), values.dtype)
    for row in np.ndindex(*counts.shape):
        columns = np.asarray(leaf.columns)[row][: counts[row]]
        assert (np.diff(columns.astype(int)) > 0).all()
        out[row][columns] = values[row][: counts[row]]
    return out


def numpy_blocks(leaf: BlockSparse) -> np.ndarray:
    values, (high, wide) = numpy_decode(leaf.values), leaf.block
    kept = bitstream(leaf.bitmask, 1, leaf.bitmask.shape[-1] * 32 - leaf.pad).astype(bool)
    out = np.zeros((*kept.shape[:-1], kept.shape[-1] * wide), values.dtype)
    for row in np.ndindex(*kept.shape[:-1]):
        whole = (*row[:-1], row[-1] // high * high)  # the first row of its blocks
        mask = np.repeat(kept[whole], wide)
        out[row][mask] = values[row][: mask.sum()]
    return out


def numpy_codebook(leaf: Codebook) -> np.ndarray:
    codes = bitstream(leaf.codes, leaf.bits, leaf.codes.shape[-1] * 32 // leaf.bits - leaf.pad)
    table = np.broadcast_to(np.asarray(leaf.table), (*codes.shape[:-1], 2**leaf.bits))
    values = np.take_along_axis(table, codes, axis=-1)
    if leaf.scale is None:
        return values
    scale = np.asarray(leaf.scale)
    return values * np.repeat(scale, codes.shape[-1] // scale.shape[-1], -1)


def numpy_fake_quantized(leaf: FakeQuantized) -> np.ndarray:
    spread = leaf.weight.shape[-1] // leaf.scale.shape[-1]
    zero = 2 ** (leaf.bits - 1) if leaf.zero_point is None else np.asarray(leaf.zero_point, int)
    zero = np.repeat(zero, spread, -1) if leaf.zero_point is not None else zero
    steps = np.asarray(leaf.weight) / np.repeat(np.asarray(leaf.scale), spread, -1)
    return numpy_grid(np.clip(np.rint(steps) + zero, 0, 2**leaf.bits - 1).astype(int), leaf)


NUMPY: dict[type, Callable[[Any], np.ndarray]] = {
    Affine: numpy_affine,
    NMSparse: numpy_n_of_m,
    UnstructuredSparse: numpy_unstructured,
    CSR: numpy_csr,
    BlockSparse: numpy_blocks,
    Codebook: numpy_codebook,
    LowRank: lambda leaf: np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64),
    Sum: lambda leaf: numpy_decode(leaf.first) + numpy_decode(leaf.second),
    Masked: lambda leaf: np.asarray(leaf.weight) * np.asarray(leaf.mask),
    FakeQuantized: numpy_fake_quantized,
}
