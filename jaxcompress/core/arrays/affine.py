"""Affine integers: w = (u - zero) * scale, per tensor, channel, group or 2-D block."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays import chunked, parallel
from jaxcompress.core.arrays.base import (
    CONTRACTED,
    KERNEL,
    ROWS,
    Array,
    CompressedArray,
    Dims,
    Partition,
    is_compressed,
    register,
)
from jaxcompress.core.arrays.rounding import (
    check_bits,
    check_table_bits,
    code_dtype,
    covering,
    divide,
    from_codes,
    groups_of,
    minmax_range,
    nearest_codes,
    rounded,
)
from jaxcompress.core.errors import InputError
from pallas_kernels.packing import pack, unpack
from pallas_kernels.wna16 import (
    from_tpu_layout,
    scale_from_kernel_layout,
    scale_to_kernel_layout,
    to_tpu_layout,
    wna16_matmul,
)

__all__ = [  # with the functions of `rounding`, which belong to these arrays
    "CANONICAL",
    "TPU",
    "TPU_BITS",
    "Affine",
    "check_bits",
    "check_table_bits",
    "code_dtype",
    "covering",
    "divide",
    "encode_affine",
    "from_codes",
    "groups_of",
    "minmax_range",
    "nearest_codes",
    "plain",
    "rounded",
    "unit_of",
]

CANONICAL = "canonical"
TPU = "tpu"
TPU_BITS = (4, 8)  # widths whose codes do not straddle bytes


@register
class Affine(CompressedArray):
    """Unsigned integer codes with a scale, and a zero point where asymmetric.

    dense = (u - zero) * scale, with zero = 2^(bits-1) where `zero_point` is None (symmetric). It is
    computed in the dtype of `scale`, or in that of the array (the first of `casts`) if it is wider.
    Scales and zero points may be compressed arrays themselves: of blocks, or quantized.

    Attributes:
      codes: int32 `[*lead, N, ceil32(K) * bits / 32]`: a dense bitstream along K, least
        significant bit first, of u = q + 2^(bits-1) (the words of compressed-tensors'
        `weight_packed`); K is padded with zeros to a multiple of 32.
      scale: float `[*lead, N, K / group]`; per channel `[*lead, N, 1]`; per tensor `[*lead, 1, 1]`.
      zero_point: unsigned integers, or floats, of the shape of `scale`; or None.
      bits: 1 to 8, or 16.
      pad: padded columns, so that K = words * 32 / bits - pad.
      layout: "canonical", as above, or the name of the layout that a chip's kernel reads.
      partition: how its products are split over a mesh, where known.
      width: columns of a group where the last one may have fewer; None: all have K / groups.
    """

    roles = {
        "codes": (ROWS, CONTRACTED),
        "scale": (ROWS, CONTRACTED),
        "zero_point": (ROWS, CONTRACTED),
    }
    trains = {"scale": "scales"}

    codes: Array
    scale: Any
    zero_point: Any
    bits: int = 4
    pad: int = 0
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)
    layout: str = "canonical"
    partition: Partition | None = None
    width: int | None = None

    @property
    def rows(self) -> int:
        """N, the rows of the stored matrix."""
        return self.codes.shape[-1 if self.layout == TPU else -2]

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        words = self.codes.shape[-2 if self.layout == TPU else -1]
        return words * 32 // self.bits - self.pad

    @property
    def groups(self) -> int:
        """Scales of each row (1: per channel or per tensor)."""
        return self.scale.shape[-3 if self.layout == TPU else -1]

    @property
    def group_size(self) -> int:
        """Columns that share a scale (K itself: per channel or per tensor)."""
        return self.width or self.contracted // max(self.groups, 1)

    @property
    def column_unit(self) -> int:
        """Whole words of codes and, where there are several, whole groups."""
        if self.groups > 1 and self.contracted % self.group_size:
            return 0
        return math.lcm(32, self.group_size * unit_of(self.scale)) if self.groups > 1 else 32

    @property
    def symmetric(self) -> bool:
        """Whether the zero is fixed at 2^(bits-1)."""
        return self.zero_point is None

    @property
    def has_kernel(self) -> bool:
        """Whether the kernels can multiply by it: narrow codes, whole zeros, equal groups."""
        zero = self.zero_point
        whole = zero is None or jnp.issubdtype(zero.dtype, jnp.integer)
        return self.bits <= 8 and whole and self.contracted % max(self.groups, 1) == 0

    @property
    def has_tpu_layout(self) -> bool:
        """Whether it can be in the layout "tpu"."""
        return self.bits in TPU_BITS and self.has_kernel

    def quantities(self) -> tuple[Array, Array | None]:
        """Scale and zero point as arrays, the scale in the dtype that decoding computes in."""
        scale, zero = plain(self.scale), self.zero_point
        wide = jnp.promote_types(scale.dtype, self.casts[0])
        return scale.astype(wide), None if zero is None else plain(zero)

    def with_layout(self, layout: str) -> Affine:
        """The same array with its buffers in the order that a chip's kernel reads, or back.

        A scale per tensor or block becomes one per row on the way, a quantized one a float.

        Args:
          layout: "canonical" or "tpu" (4 and 8 bits; see `pallas_kernels.wna16.to_tpu_layout`).

        Raises:
          InputError: there is no such layout for this array.
        """
        if layout == self.layout:
            return self
        scale, zero = self.quantities()
        if layout == CANONICAL:
            return self.replace(
                codes=from_tpu_layout(self.codes, bits=self.bits),
                scale=scale_from_kernel_layout(scale),
                zero_point=None if zero is None else scale_from_kernel_layout(zero),
                layout=layout,
            )
        if layout != TPU or not self.has_tpu_layout:
            raise InputError(
                f"layout {layout!r}: affine codes of {self.bits} bits can be in the layout "
                f"'canonical'" + (" or 'tpu'" if self.has_tpu_layout else "")
            )
        return self.replace(
            codes=to_tpu_layout(self.codes, bits=self.bits),
            scale=scale_to_kernel_layout(scale, self.rows),
            zero_point=None if zero is None else scale_to_kernel_layout(zero, self.rows),
            layout=layout,
        )

    def integers(self) -> Array:
        """Unsigned codes u, uint8 (16 bits: uint16) `[*lead, N, K]`."""
        return unpack(self.with_layout(CANONICAL).codes, self.bits, self.contracted)

    def decode(self) -> Array:
        """`(u - zero) * scale`, `[*lead, N, K]` in the dtype of `quantities`."""
        leaf = self.with_layout(CANONICAL)
        return from_codes(leaf.integers(), *leaf.quantities(), leaf.bits, leaf.width)

    def product(
        self, x: Array, over: str, *, precision: Any = None, preferred_element_type: Any = None
    ) -> Array:
        """`x` times the matrix, by the kernel of the platform; split over a mesh by `partition`.

        Args:
          x: over="k": `[*lead, M, K]`; over="n": `[*lead, M, N]`.
          over: which axis of the matrix is summed over, "k" or "n".
          precision: as in `jax.lax.dot_general`.
          preferred_element_type: as in `jax.lax.dot_general`.

        Returns:
          `[*lead, M, N]` over "k", `[*lead, M, K]` over "n".
        """
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        partition = self.partition or parallel.partition_of_types(
            self.codes, x, swapped=self.layout == TPU
        )
        if partition is None:
            return self.local_product(x, over, **options)
        return parallel.product(self.replace(partition=partition), x, over, **options)

    def local_product(
        self, x: Array, over: str, *, precision: Any = None, preferred_element_type: Any = None
    ) -> Array:
        """`product` on one device, or left to the compiler to split."""
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        # Of a small one no kernel pays, and plain operations compile faster.
        if self.size < chunked.WHOLE_BELOW or not self.has_kernel:
            return chunked.product(self, x, over, **options)
        multiply: Any = partial(
            wna16_matmul,
            bits=self.bits,
            contracted=self.contracted,
            transpose=over == "n",
            casts=self.casts,
            layout=self.layout,
            **options,
        )
        for _ in self.lead:
            multiply = jax.vmap(multiply)
        return multiply(x, self.codes, *self.quantities())

    def encode(self, matrix: Array) -> Affine:
        """`matrix` `[*lead, N, K]` in this array's format, with scales of its own by min-max."""
        per_tensor = self.layout == CANONICAL and self.scale.shape[-2] == 1 and self.rows > 1
        scale, zero = minmax_range(
            matrix.astype(self.quantities()[0].dtype),
            bits=self.bits,
            groups=self.groups,
            symmetric=self.symmetric,
            per_tensor=per_tensor,
        )
        made = encode_affine(
            matrix,
            scale.astype(self.scale.dtype),
            zero,
            bits=self.bits,
            dims=self.dims,
            casts=self.casts,
        )
        return made.with_layout(self.layout).replace(partition=self.partition)


def encode_affine(
    matrix: Array,
    scale: Any,
    zero_point: Any,
    *,
    bits: int,
    dims: Dims = KERNEL,
    casts: tuple[str, ...] | None = None,
    width: int | None = None,
) -> Affine:
    """Round `matrix` to the grid of given scales.

    u = clip(round(w / scale + zero), 0, 2^bits - 1), ties to even; see `nearest_codes`.

    Args:
      matrix: float `[*lead, N, K]`.
      scale: `[*lead, N, groups]` (N may be 1: per tensor), an array or compressed.
      zero_point: integers in 0 .. 2^bits - 1, or floats, of the shape of `scale`; or None
        (symmetric).
      bits: 1 to 8, or 16.
      dims: how the dense axes factor over N and K.
      casts: logical dtypes after decoding; None: the dtype of `matrix`.
      width: columns that share a scale, where the last group may have fewer; None: K / groups.

    Returns:
      The affine array; its dense shape follows from `dims`.
    """
    check_bits(bits)
    empty = jnp.zeros((*matrix.shape[:-1], 0), jnp.int32)
    leaf = Affine(
        empty,
        scale,
        _stored_zero(zero_point, bits),
        bits,
        -matrix.shape[-1] % 32,
        dims,
        casts or (str(matrix.dtype),),
        width=width,
    )
    return leaf.replace(codes=pack(nearest_codes(matrix, *leaf.quantities(), bits, width), bits))


def plain(quantity: Any) -> Array:
    """A scale or zero point `[*lead, N, groups]` as an array, whether it is compressed or not."""
    return quantity.matrix() if is_compressed(quantity) else quantity


def unit_of(quantity: Any) -> int:
    """The columns of a scale that stay together where contracted columns are sharded."""
    return quantity.column_unit if is_compressed(quantity) else 1


def _stored_zero(zero_point: Any, bits: int) -> Any:
    """Whole zero points as narrow as codes; those in between stay floats."""
    whole = zero_point is not None and jnp.issubdtype(zero_point.dtype, jnp.integer)
    if not whole or is_compressed(zero_point):
        return zero_point
    return zero_point.astype(code_dtype(bits))
