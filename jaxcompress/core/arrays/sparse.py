"""Sparse matrices: n kept of every m along K, or any mask with as many kept per row as it likes.

The kept values may themselves be a compressed array over the compacted columns, so that 2:4 and
int4 nest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays import ragged
from jaxcompress.core.arrays.base import (
    CONTRACTED,
    INNER,
    KERNEL,
    ROWS,
    Array,
    CompressedArray,
    Dims,
    is_compressed,
    register,
)
from jaxcompress.core.errors import InputError
from pallas_kernels.packing import codes_in, pack, unpack

Encode = Callable[[Array], Array | CompressedArray]


@register
class NMSparse(CompressedArray):
    """Keeps n of every m consecutive contracted columns.

    Attributes:
      values: the kept values in order, `[*lead, N, K * n / m]`, or a compressed array of that
        matrix.
      positions: int32 `[*lead, N, ceil32(K * n / m) * b / 32]`: where in its run of m each value
        stands, a bitstream of b = ceil(log2 m) bits as in `Affine.codes`.
      n: kept of every run.
      m: columns of a run.
    """

    roles = {"values": (ROWS, CONTRACTED), "positions": (ROWS, CONTRACTED)}
    trains = {"values": "values"}

    values: Array | CompressedArray
    positions: Array
    n: int = 2
    m: int = 4
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)

    @classmethod
    def from_mask(
        cls,
        matrix: Array,
        mask: Array,
        n: int,
        m: int,
        *,
        dims: Dims = KERNEL,
        casts: tuple[str, ...] | None = None,
        encode: Encode | None = None,
    ) -> NMSparse:
        """The entries of `matrix` where `mask` keeps them.

        A run that keeps fewer than n is filled up with zeros.

        Args:
          matrix: `[*lead, N, K]`.
          mask: bool `[*lead, N, K]`, True = kept; at most n True in every run of m along K.
          n: kept of every run.
          m: columns of a run; must divide K.
          dims: how the dense axes factor over N and K.
          casts: logical dtypes after decoding; None: the dtype of `matrix`.
          encode: compresses the kept values `[*lead, N, K * n / m]`; None: they stay as they are.

        Raises:
          InputError: m does not divide K, or (outside of jit) a run keeps more than n.
        """
        _check_n_of_m(n, m, matrix.shape[-1])
        runs = (*matrix.shape[:-1], matrix.shape[-1] // m, m)
        kept = jnp.asarray(mask, bool).reshape(runs)
        if not isinstance(kept, jax.core.Tracer):
            most = int(kept.sum(-1).max(initial=0))
            if most > n:
                raise InputError(f"mask: keeps {most} of {m} columns somewhere; {n}:{m} is asked")
        # A stable sort of "removed" brings the kept columns to the front.
        positions = jnp.sort(jnp.argsort(~kept, axis=-1, stable=True)[..., :n], axis=-1)
        values = jnp.where(kept, matrix.reshape(runs), 0)
        values = jnp.take_along_axis(values, positions, axis=-1)
        flat = (*matrix.shape[:-1], runs[-2] * n)
        kept_values = values.reshape(flat)
        return cls(
            kept_values if encode is None else encode(kept_values),
            pack(positions.reshape(flat), position_bits(m)),
            n,
            m,
            dims,
            casts or (str(matrix.dtype),),
        )

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return _columns(self.values) // self.n * self.m

    @property
    def column_unit(self) -> int:
        """Whole runs, of which the kept values fill whole words of positions."""
        kept = math.lcm(32, getattr(self.values, "column_unit", 1))
        return self.m * kept // math.gcd(kept, self.n)

    def mask(self) -> Array:
        """True where a value is kept, bool `[*lead, N, K]`."""
        here = self._kept_positions()[..., None] == jnp.arange(self.m, dtype=jnp.uint8)
        return here.any(-2).reshape(*here.shape[:-3], -1)

    def decode(self) -> Array:
        """The kept values at their positions, zeros elsewhere, `[*lead, N, K]`."""
        values = as_matrix(self.values)
        positions = self._kept_positions()
        values = values.reshape(positions.shape)
        columns = jnp.arange(self.m, dtype=jnp.uint8)
        out = jnp.zeros((*positions.shape[:-1], self.m), values.dtype)
        for i in range(self.n):
            out = jnp.where(positions[..., i, None] == columns, values[..., i, None], out)
        return out.reshape(*out.shape[:-2], -1)

    def _kept_positions(self) -> Array:
        """Uint8 `[*lead, N, K / m, n]`."""
        flat = unpack(self.positions, position_bits(self.m), _columns(self.values))
        return flat.reshape(*flat.shape[:-1], -1, self.n)


@register
class UnstructuredSparse(CompressedArray):
    """Any entries of a matrix: one bit for each says whether it is kept.

    Attributes:
      bitmask: int32 `[*lead, N, ceil32(K) / 32]`, bit j of word i is column 32 i + j.
      values: `[*lead, N, cap]`, or a compressed array of that matrix: the kept values of a row in
        order, then zeros; cap is the largest count of a row.
      pad: padded columns, so that K = words * 32 - pad.
    """

    roles = {"bitmask": (ROWS, CONTRACTED), "values": (ROWS, INNER)}
    trains = {"values": "values"}
    bitmask: Array
    values: Array | CompressedArray
    pad: int = 0
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)

    @classmethod
    def from_mask(
        cls,
        matrix: Array,
        mask: Array,
        *,
        cap: int | None = None,
        dims: Dims = KERNEL,
        casts: tuple[str, ...] | None = None,
        encode: Encode | None = None,
    ) -> UnstructuredSparse:
        """The entries of `matrix` where `mask` keeps them.

        Args:
          matrix: `[*lead, N, K]`.
          mask: bool `[*lead, N, K]`, True = kept.
          cap: room for values in each row; None: the largest count of a row (K for a traced mask,
            whose counts are unknown). Must be at least that.
          dims: how the dense axes factor over N and K.
          casts: logical dtypes after decoding; None: the dtype of `matrix`.
          encode: compresses the kept values `[*lead, N, cap]`; None: they stay as they are.

        Raises:
          InputError: a row keeps more than `cap` (outside of jit).
        """
        mask = jnp.asarray(mask, bool)
        order = kept_columns(mask, cap)
        values = jnp.take_along_axis(jnp.where(mask, matrix, 0), order, axis=-1)
        return cls(
            pack(mask, 1),
            values if encode is None else encode(values),
            -matrix.shape[-1] % 32,
            dims,
            casts or (str(matrix.dtype),),
        )

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return codes_in(self.bitmask.shape[-1], 1) - self.pad

    @property
    def column_unit(self) -> int:
        """0: the values of a row are one run, no part of it belongs to a part of the columns."""
        return 0

    def mask(self) -> Array:
        """True where a value is kept, bool `[*lead, N, K]`."""
        return unpack(self.bitmask, 1, self.contracted).astype(bool)

    def decode(self) -> Array:
        """The kept values at their columns, zeros elsewhere, `[*lead, N, K]`."""
        mask, values = self.mask(), as_matrix(self.values)
        if values.shape[-1] == 0:
            return jnp.zeros(mask.shape, values.dtype)
        order = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
        order = jnp.clip(order, 0, values.shape[-1] - 1)
        return jnp.where(mask, jnp.take_along_axis(values, order, axis=-1), 0)

    def to_disk(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Plain values end to end, `[kept]`; how many are of which row the bitmask tells."""
        if is_compressed(self.values):
            return self.buffers, None
        counts = ragged.bits_of(self.bitmask, self.contracted).sum(-1)
        flat = ragged.trimmed(self.values, counts)
        if flat is None:
            return self.buffers, None
        return {"bitmask": self.bitmask, "values": flat}, {"cap": self.values.shape[-1]}

    @classmethod
    def from_disk(
        cls, buffers: dict[str, Any], static: dict[str, Any], besides: dict[str, Any]
    ) -> UnstructuredSparse:
        """The inverse of `to_disk`."""
        words: Any = np.asarray(buffers["bitmask"])
        counts = ragged.bits_of(words, words.shape[-1] * 32 - static.get("pad", 0)).sum(-1)
        return cls(words, ragged.filled(buffers["values"], counts, besides["cap"]), **static)


def kept_columns(mask: Array, cap: int | None = None) -> Array:
    """Columns of a row that `mask` keeps, in order, then others: `[*lead, N, cap]`.

    Args:
      mask: bool `[*lead, N, K]`.
      cap: how many; None: the largest count of a row, or K for a traced mask.

    Raises:
      InputError: a row keeps more than `cap` (outside of jit).
    """
    if isinstance(mask, jax.core.Tracer):
        cap = mask.shape[-1] if cap is None else cap
    else:
        most = int(mask.sum(-1).max(initial=0))
        if cap is not None and cap < most:
            raise InputError(f"cap {cap}: a row of the mask keeps {most} columns")
        cap = most if cap is None else cap
    return jnp.argsort(~mask, axis=-1, stable=True)[..., :cap]


def position_bits(m: int) -> int:
    """Bits of a position in a run of m columns: ceil(log2 m)."""
    return max((m - 1).bit_length(), 1)


def as_matrix(value: Array | CompressedArray) -> Array:
    """The matrix that a buffer stands for, compressed itself or not."""
    return value.matrix() if isinstance(value, CompressedArray) else value


def _columns(value: Any) -> int:
    return value.contracted if is_compressed(value) else value.shape[-1]


def _check_n_of_m(n: int, m: int, k: int) -> None:
    if not 1 <= n <= m <= 256:
        raise InputError(f"{n}:{m}: keep 1 to m of every m columns, m up to 256")
    if k % m:
        raise InputError(f"{n}:{m}: {k} contracted columns are not a multiple of {m}")
