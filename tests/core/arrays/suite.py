"""The compressed arrays that the shared suite runs over, each with a decoding in plain NumPy.

A new class joins by one line in CASES (and one in NUMPY, which says what its buffers mean).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxcompress.core.arrays.affine import Affine, encode_affine, minmax_range
from jaxcompress.core.arrays.base import KERNEL, STORED, CompressedArray, Dims, is_compressed
from jaxcompress.core.arrays.block_sparse import BlockSparse
from jaxcompress.core.arrays.codebook import Codebook, encode_codebook
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.csr import CSR
from jaxcompress.core.arrays.floats import Float, encode_float
from jaxcompress.core.arrays.inputs import QuantizedInput
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.arrays.nested import quantize_scales
from jaxcompress.core.arrays.shared_rows import SharedRows
from jaxcompress.core.arrays.sparse import NMSparse, UnstructuredSparse
from jaxcompress.core.arrays.training import FakeEncoded, FakeQuantized, Masked
from jaxcompress.layerwise.grid import grid_of, nearest
from jaxcompress.quantization.conventions import textbook

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
      rate: of learning: little beside the scales.
      rounds: `rounds(x)`: what the array makes of its input before a product over its columns.
    """

    name: str
    make: Callable[[Any, Dims], CompressedArray]
    again: Callable[[Any, Any], CompressedArray] | None = None
    exact: bool = True
    rate: float = 1e-2
    rounds: Callable[[np.ndarray], np.ndarray] = np.asarray

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
        matrix,
        leaf.scale,
        leaf.zero_point,
        bits=leaf.bits,
        dims=leaf.dims,
        casts=leaf.casts,
        width=leaf.width,
    )


def on(dtype: str, scale_bits: int = 0, **options: Any) -> Callable[..., Any]:
    """Rounded to a grid; scales of `scale_bits` bits."""

    def make(matrix: Any, dims: Dims = KERNEL) -> Any:
        grid = grid_of(dtype, scale_bits=scale_bits if scale_bits == 16 else 0, **options)
        leaf: Any = nearest(grid, jnp.asarray(matrix)).replace(dims=dims)
        return quantize_scales(leaf, group_size=16) if scale_bits == 8 else leaf

    return make


def own_groups(dtype: str, size: int) -> Callable[..., Float]:
    """Formats whose groups have a fixed size; of columns that it does not divide, fewer of them."""

    def make(matrix: Any, dims: Dims = KERNEL) -> Float:
        columns = matrix.shape[-1]
        whole = np.pad(matrix, [(0, 0)] * (matrix.ndim - 1) + [(0, -columns % size)])
        parts = nearest(grid_of(dtype), jnp.asarray(whole))
        assert isinstance(parts, Float)
        if columns == whole.shape[-1]:
            return parts.replace(dims=dims)
        return float_again(
            parts.replace(dims=dims, width=size),
            jnp.asarray(matrix),
        )

    return make


def the_textbooks(matrix: Any, dims: Dims = KERNEL) -> Any:
    return textbook(jnp.asarray(matrix), bits=4, groups=4).replace(dims=dims)


def float_again(leaf: Float, matrix: Any) -> Float:
    return encode_float(
        matrix,
        leaf.scale,
        leaf.global_scale,
        element=leaf.element,
        scale_format=leaf.scale_format,
        dims=leaf.dims,
        casts=leaf.casts,
        width=leaf.width,
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
    spec: Any = {"bits": leaf.bits, "dims": leaf.dims, "casts": leaf.casts, "fixed": leaf.fixed}
    return encode_codebook(matrix, leaf.table, leaf.scale, **spec)


def low_rank(matrix: Any, dims: Dims = KERNEL) -> LowRank:
    return LowRank(jnp.asarray(matrix[..., :5]), jnp.asarray(matrix[..., :5, :]), dims)


def low_rank_plus_int4(matrix: Any, dims: Dims = KERNEL) -> Sum:
    return Sum.of(low_rank(matrix, dims), affine(4, True, 8)(matrix, dims))


def shared_rows(matrix: Any, dims: Dims = KERNEL) -> SharedRows:
    """Every row is that of half its number."""
    index = np.broadcast_to(np.arange(matrix.shape[-2])[:, None] // 2, (*matrix.shape[:-1], 1))
    return SharedRows(jnp.asarray(matrix[..., ::2, :]), jnp.asarray(index, jnp.uint8), dims)


def masked(matrix: Any, dims: Dims = KERNEL) -> Masked:
    return Masked(jnp.asarray(matrix), jnp.asarray(n_of_m_mask(matrix, 2, 4)), dims)


def fake_quantized(symmetric: bool, groups: int | None) -> Callable[..., FakeQuantized]:
    def make(matrix: Any, dims: Dims = KERNEL) -> FakeQuantized:
        leaf = affine(4, symmetric, groups)(matrix, dims)
        return FakeQuantized(jnp.asarray(matrix), leaf.scale, leaf.zero_point, 4, dims=dims)

    return make


def fake_block(matrix: Any, dims: Dims = KERNEL) -> FakeQuantized:
    """Scales of squares, and a weight of which entries are removed."""
    leaf = on("int4", granularity="block", group_size=12)(matrix, dims)
    weight = Masked(jnp.asarray(leaf.matrix()), jnp.asarray(np.asarray(leaf.matrix()) != 0), dims)
    return FakeQuantized(weight, leaf.scale, None, 4, dims=dims, width=leaf.width)


def fake_encoded(make: Any) -> Callable[..., FakeEncoded]:
    def made(matrix: Any, dims: Dims = KERNEL) -> FakeEncoded:
        return FakeEncoded(jnp.asarray(matrix), make(matrix, dims), dims=dims)

    return made


def masked_again(leaf: Masked, matrix: Any) -> Masked:
    return Masked(jnp.where(leaf.mask, matrix, leaf.weight), leaf.mask, leaf.dims, leaf.casts)


def with_input(
    make: Any, static: tuple[float, int] | None = None, **how: Any
) -> Callable[..., Any]:
    """Rounded inputs; `static`: their scale and zero point."""

    def made(matrix: Any, dims: Dims = KERNEL) -> QuantizedInput:
        leaf, lead = QuantizedInput.of(make(matrix, dims), dims=dims, **how), matrix.shape[:-2]
        if static is None:
            return leaf
        scale, zero = (jnp.full((*lead, 1, 1), x) for x in static)
        zero = None if leaf.symmetric else zero.astype(jnp.uint8)
        return leaf.replace(input_scale=scale, input_zero_point=zero)

    return made


def int8_per_token(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127.5)
    return np.clip(np.rint(x / scale), -128, 127) * scale


def uint8_static(x: np.ndarray) -> np.ndarray:
    return (np.clip(np.rint(x / np.float32(0.05)) + 120, 0, 255) - 120) * np.float32(0.05)


def fp8_static(x: np.ndarray) -> np.ndarray:
    scale = np.float32(0.02)
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


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
    Case("affine-16-group", on("int16", group_size=8), affine_again, rate=1e-6),
    Case("affine-4-block", on("int4", granularity="block", group_size=12), affine_again),
    Case(
        "affine-3-asymmetric-block",
        on("int3", granularity="block", group_size=8, symmetric=False),
        affine_again,
    ),
    Case("affine-4-float16-scales", on("int4", 16, group_size=8), affine_again),
    Case("affine-4-nested-scales", on("int4", 8, group_size=8), affine_again),
    Case("affine-2-ternary", on("ternary", group_size=8), affine_again),
    Case("affine-textbook", the_textbooks, exact=False),
    Case("fp8-tensor", on("fp8", granularity="tensor"), float_again, rate=1e-4),
    Case("fp8-channel", on("fp8", granularity="channel"), float_again, rate=1e-4),
    Case("fp8-group-nested-scales", on("fp8", 8, group_size=8), float_again, rate=1e-4),
    Case("fp8-block", on("fp8", granularity="block", group_size=12), float_again, rate=1e-4),
    Case("fp8-e5m2", on("fp8_e5m2", group_size=8), float_again, rate=1e-6),
    Case("mxfp8", own_groups("mxfp8", 32), float_again),
    Case("mxfp6", own_groups("mxfp6", 32), float_again),
    Case("mxfp4", own_groups("mxfp4", 32), float_again),
    Case("nvfp4", own_groups("nvfp4", 16), float_again),
    Case("nf4", on("nf4", group_size=8), codebook_again),
    Case("nf4-nested-scales", on("nf4", 8, group_size=8), codebook_again),
    Case("fp4", on("fp4", group_size=8)),  # zero has two codes
    Case("shared-rows", shared_rows),
    Case("input-int8", with_input(affine(8, True, 1)), rounds=int8_per_token),
    Case(
        "input-uint8-int4-group",
        with_input(affine(4, False, 4), (0.05, 120), symmetric=False),
        rounds=uint8_static,
    ),
    Case(
        "input-fp8-of-floats",
        with_input(lambda matrix, dims: jnp.asarray(matrix), (0.02, 0), input_dtype="fp8"),
        rounds=fp8_static,
    ),
    Case("masked", masked, masked_again),
    Case("fake-quantized", fake_quantized(True, 4)),
    Case("fake-quantized-asymmetric-tensor", fake_quantized(False, None)),
    Case("fake-quantized-block-of-masked", fake_block),
    Case("fake-fp8", fake_encoded(on("fp8", granularity="channel")), rate=1e-4),
    Case("fake-codebook", fake_encoded(codebook(3, True, None))),
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


def numpy_spread(values: Any, columns: int, width: int | None = None) -> np.ndarray:
    """Scales or zero points `[*lead, R, G]`, compressed or not, one for each column."""
    values = numpy_decode(values)
    return np.repeat(values, width or columns // values.shape[-1], -1)[..., :columns]


def numpy_grid(u: np.ndarray, leaf: Any, width: int | None = None) -> np.ndarray:
    k = u.shape[-1]
    zero: Any = 2 ** (leaf.bits - 1)
    if leaf.zero_point is not None:
        zero = numpy_spread(leaf.zero_point, k, width)
        zero = zero.astype(int) if zero.dtype.kind == "u" else zero
    scale = numpy_spread(leaf.scale, k, width).astype(np.float32)
    return (u - zero).astype(np.float32) * scale


def numpy_affine(leaf: Affine) -> np.ndarray:
    k = leaf.codes.shape[-1] * 32 // leaf.bits - leaf.pad
    return numpy_grid(bitstream(leaf.codes, leaf.bits, k), leaf, leaf.width)


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


FLOATS = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}


def numpy_float_values(codes: Any, name: str) -> np.ndarray:
    return np.asarray(codes).astype(np.uint8).view(FLOATS[name]).astype(np.float32)


def numpy_float(leaf: Float) -> np.ndarray:
    k = leaf.codes.shape[-1] * 32 // leaf.bits - leaf.pad
    values = numpy_float_values(bitstream(leaf.codes, leaf.bits, k), leaf.element)
    scale = numpy_spread(leaf.scale, k, leaf.width)
    if leaf.scale_format != "float":
        scale = numpy_float_values(scale, leaf.scale_format)
    if leaf.global_scale is not None:
        scale = scale / np.asarray(leaf.global_scale)
    return values * scale.astype(np.float32)


def numpy_codebook(leaf: Codebook) -> np.ndarray:
    if leaf.codes.dtype == np.uint8:
        codes = np.asarray(leaf.codes, int)
    else:
        codes = bitstream(leaf.codes, leaf.bits, leaf.codes.shape[-1] * 32 // leaf.bits - leaf.pad)
    table = np.broadcast_to(np.asarray(leaf.table), (*codes.shape[:-1], 2**leaf.bits))
    values = np.take_along_axis(table, codes, axis=-1)
    if leaf.scale is not None:
        values = values * numpy_spread(leaf.scale, codes.shape[-1])
    return values if leaf.offset is None else values + np.asarray(leaf.offset)


def numpy_shared_rows(leaf: SharedRows) -> np.ndarray:
    values, index = np.asarray(leaf.values), np.asarray(leaf.index, int)
    out = np.empty((*index.shape[:-1], values.shape[-1]), values.dtype)
    for at in np.ndindex(*index.shape[:-1]):
        out[at] = values[(*at[:-1], index[at][0])]
    return out


def numpy_fake_quantized(leaf: FakeQuantized) -> np.ndarray:
    weight = numpy_decode(leaf.weight)
    k = weight.shape[-1]
    zero: Any = 2 ** (leaf.bits - 1)
    if leaf.zero_point is not None:
        zero = numpy_spread(leaf.zero_point, k, leaf.width).astype(int)
    steps = weight / numpy_spread(leaf.scale, k, leaf.width)
    return numpy_grid(
        np.clip(np.rint(steps) + zero, 0, 2**leaf.bits - 1).astype(int), leaf, leaf.width
    )


NUMPY: dict[type, Callable[[Any], np.ndarray]] = {
    Affine: numpy_affine,
    NMSparse: numpy_n_of_m,
    UnstructuredSparse: numpy_unstructured,
    CSR: numpy_csr,
    BlockSparse: numpy_blocks,
    Codebook: numpy_codebook,
    Float: numpy_float,
    SharedRows: numpy_shared_rows,
    LowRank: lambda leaf: np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64),
    Sum: lambda leaf: numpy_decode(leaf.first) + numpy_decode(leaf.second),
    Masked: lambda leaf: np.asarray(leaf.weight) * np.asarray(leaf.mask),
    FakeQuantized: numpy_fake_quantized,
    FakeEncoded: lambda leaf: numpy_decode(leaf.form),
    QuantizedInput: lambda leaf: numpy_decode(leaf.weight),
}
