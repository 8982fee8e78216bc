"""Affine integers: w = (u - zero) * scale, 1 to 8 bits, per tensor, channel or group."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.core.arrays import chunked, parallel
from jaxcompress.core.arrays.base import (
    CONTRACTED,
    KERNEL,
    ROWS,
    Array,
    CompressedArray,
    Dims,
    Partition,
    register,
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

CANONICAL = "canonical"
TPU = "tpu"
TPU_BITS = (4, 8)  # widths whose codes do not straddle bytes


@register
class Affine(CompressedArray):
    """Unsigned integer codes with a scale, and a zero point where asymmetric.

    dense = (u - zero) * scale, computed in the dtype of `scale`, with zero = 2^(bits-1) where
    `zero_point` is None (symmetric).

    Attributes:
      codes: int32 `[*lead, N, ceil32(K) * bits / 32]`: a dense bitstream along K, least
        significant bit first, of u = q + 2^(bits-1) (the words of compressed-tensors'
        `weight_packed`); K is padded with zeros to a multiple of 32.
      scale: float `[*lead, N, K / group]`; per channel `[*lead, N, 1]`; per tensor `[*lead, 1, 1]`.
      zero_point: uint8, shape of `scale`, or None.
      bits: 1 to 8.
      pad: padded columns, so that K = words * 32 / bits - pad.
      layout: "canonical", as above, or the name of the layout that a chip's kernel reads.
      partition: how its products are split over a mesh, where known.
    """

    roles = {
        "codes": (ROWS, CONTRACTED),
        "scale": (ROWS, CONTRACTED),
        "zero_point": (ROWS, CONTRACTED),
    }
    trains = {"scale": "scales"}

    codes: Array
    scale: Array
    zero_point: Array | None
    bits: int = 4
    pad: int = 0
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)
    layout: str = "canonical"
    partition: Partition | None = None

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
        return self.contracted // max(self.groups, 1)

    @property
    def column_unit(self) -> int:
        """Whole words of codes and, where there are several, whole groups."""
        return math.lcm(32, self.group_size) if self.groups > 1 else 32

    @property
    def symmetric(self) -> bool:
        """Whether the zero is fixed at 2^(bits-1)."""
        return self.zero_point is None

    def with_layout(self, layout: str) -> Affine:
        """The same array with its buffers in the order that a chip's kernel reads, or back.

        A scale per tensor becomes one per row on the way.

        Args:
          layout: "canonical" or "tpu" (4 and 8 bits; see `pallas_kernels.wna16.to_tpu_layout`).

        Raises:
          InputError: there is no such layout for this array.
        """
        if layout == self.layout:
            return self
        zero = self.zero_point
        if layout == CANONICAL:
            return self.replace(
                codes=from_tpu_layout(self.codes, bits=self.bits),
                scale=scale_from_kernel_layout(self.scale),
                zero_point=None if zero is None else scale_from_kernel_layout(zero),
                layout=layout,
            )
        if layout != TPU or self.bits not in TPU_BITS:
            raise InputError(
                f"layout {layout!r}: affine codes of {self.bits} bits can be in the layout "
                f"'canonical'" + (" or 'tpu'" if self.bits in TPU_BITS else "")
            )
        return self.replace(
            codes=to_tpu_layout(self.codes, bits=self.bits),
            scale=scale_to_kernel_layout(self.scale, self.rows),
            zero_point=None if zero is None else scale_to_kernel_layout(zero, self.rows),
            layout=layout,
        )

    def integers(self) -> Array:
        """Unsigned codes u, uint8 `[*lead, N, K]`."""
        return unpack(self.with_layout(CANONICAL).codes, self.bits, self.contracted)

    def decode(self) -> Array:
        """`(u - zero) * scale`, `[*lead, N, K]` in the dtype of `scale`."""
        leaf = self.with_layout(CANONICAL)
        return from_codes(leaf.integers(), leaf.scale, leaf.zero_point, leaf.bits)

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
        if self.size < chunked.WHOLE_BELOW:  # no kernel pays, and plain operations compile faster
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
        return multiply(x, self.codes, self.scale, self.zero_point)

    def encode(self, matrix: Array) -> Affine:
        """`matrix` `[*lead, N, K]` in this array's format, with scales of its own by min-max."""
        per_tensor = self.layout == CANONICAL and self.scale.shape[-2] == 1 and self.rows > 1
        scale, zero = minmax_range(
            matrix.astype(self.scale.dtype),
            bits=self.bits,
            groups=self.groups,
            symmetric=self.symmetric,
            per_tensor=per_tensor,
        )
        made = encode_affine(matrix, scale, zero, bits=self.bits, dims=self.dims, casts=self.casts)
        return made.with_layout(self.layout).replace(partition=self.partition)


def encode_affine(
    matrix: Array,
    scale: Array,
    zero_point: Array | None,
    *,
    bits: int,
    dims: Dims = KERNEL,
    casts: tuple[str, ...] | None = None,
) -> Affine:
    """Round `matrix` to the grid of given scales.

    u = clip(round(w / scale + zero), 0, 2^bits - 1), ties to even; see `nearest_codes`.

    Args:
      matrix: float `[*lead, N, K]`.
      scale: `[*lead, N, groups]` (N may be 1: per tensor).
      zero_point: integers in 0 .. 2^bits - 1 of the shape of `scale`, or None (symmetric).
      bits: 1 to 8.
      dims: how the dense axes factor over N and K.
      casts: logical dtypes after decoding; None: the dtype of `matrix`.

    Returns:
      The affine array; its dense shape follows from `dims`.
    """
    check_bits(bits)
    codes = pack(nearest_codes(matrix, scale, zero_point, bits), bits)
    return Affine(
        codes,
        scale,
        None if zero_point is None else zero_point.astype(jnp.uint8),
        bits,
        -matrix.shape[-1] % 32,
        dims,
        casts or (str(matrix.dtype),),
    )


def nearest_codes(matrix: Array, scale: Array, zero_point: Array | None, bits: int) -> Array:
    """u = clip(round(w / scale + zero), 0, 2^bits - 1), ties to even.

    As compressed-tensors does, the sum is made with the signed zero point (zero - 2^(bits-1)) and
    is itself rounded to the dtype, which decides ties.

    Args:
      matrix: w, float `[*lead, N, K]`.
      scale: `[*lead, N, groups]` (N may be 1: per tensor).
      zero_point: integers of the shape of `scale`, or None: 2^(bits-1).
      bits: 1 to 8.

    Returns:
      int32 `[*lead, N, K]`.
    """
    groups, middle = scale.shape[-1], 2 ** (bits - 1)
    grouped = matrix.reshape(*matrix.shape[:-1], groups, matrix.shape[-1] // groups)
    steps = divide(grouped, scale[..., None])
    if zero_point is not None:
        signed = zero_point.astype(jnp.int32)[..., None] - middle
        steps = rounded(_wide(steps) + signed, steps.dtype)
    q = jnp.round(jnp.clip(steps, -middle, middle - 1))
    return q.astype(jnp.int32).reshape(matrix.shape) + middle


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


def from_codes(u: Array, scale: Array, zero_point: Array | None, bits: int) -> Array:
    """(u - zero) * scale, `[*lead, N, K]` in the dtype of `scale`; arguments as `nearest_codes`."""
    groups = scale.shape[-1]
    grouped = u.reshape(*u.shape[:-1], groups, u.shape[-1] // groups).astype(scale.dtype)
    zero: Any = 2 ** (bits - 1)
    if zero_point is not None:
        zero = zero_point.astype(scale.dtype)[..., None]
    return ((grouped - zero) * scale[..., None]).reshape(u.shape)


def minmax_range(
    matrix: Array, *, bits: int, groups: int, symmetric: bool, per_tensor: bool = False
) -> tuple[Array, Array | None]:
    """Scale and zero point that just cover each group's values, bit for bit compressed-tensors'.

    Symmetric: scale = absmax / ((2^bits - 1) / 2) (absmax / 7.5 at 4 bits). Asymmetric: the range
    is widened to hold 0, scale = (max - min) / (2^bits - 1), zero = round(-min / scale). A group
    of zeros gets the dtype's epsilon as its scale.

    Args:
      matrix: float `[*lead, N, K]`.
      groups: scales per row; must divide K.
      per_tensor: one scale for each `[N, K]` matrix instead (then `groups` is 1).

    Returns:
      scale `[*lead, N, groups]` (`[*lead, 1, 1]` per tensor), zero point uint8 alike or None.
    """
    k = matrix.shape[-1]
    if per_tensor:
        grouped = matrix.reshape(*matrix.shape[:-2], 1, 1, -1)
    else:
        grouped = matrix.reshape(*matrix.shape[:-1], groups, k // groups)
    dtype, eps = matrix.dtype, jnp.finfo(matrix.dtype).eps
    levels, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        absmax = jnp.max(jnp.abs(grouped), axis=-1)
        scale = divide(absmax, jnp.asarray(levels / 2, dtype))
        return jnp.where(scale == 0, eps, scale), None
    low = jnp.minimum(grouped.min(axis=-1), 0)
    high = jnp.maximum(grouped.max(axis=-1), 0)
    scale = divide(rounded(_wide(high) - _wide(low), dtype), jnp.asarray(levels, dtype))
    signed = rounded(-middle - _wide(divide(low, scale)), dtype)
    zero = jnp.round(jnp.clip(signed, -middle, middle - 1)) + middle
    zero = jnp.where(scale == 0, middle, zero).astype(jnp.uint8)
    return jnp.where(scale == 0, eps, scale), zero


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
    """Raise `InputError` unless 1 <= bits <= 8."""
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise InputError(f"bits {bits!r}: integers of 1 to 8 bits are supported")
