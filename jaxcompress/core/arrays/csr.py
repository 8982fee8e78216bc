"""Compressed sparse rows: a column number beside every value, for matrices that keep little."""

from __future__ import annotations

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
from jaxcompress.core.arrays.sparse import Encode, as_matrix, kept_columns


@register
class CSR(CompressedArray):
    """Any entries of a matrix, each with its column.

    Smaller than `UnstructuredSparse` (one bit for every column) where less than one column in 16
    is kept, or in 32 from 65,537 columns on.

    Attributes:
      columns: uint16 (int32 from 65,537 columns on) `[*lead, N, cap]`: columns of the values of a
        row, ascending, then zeros.
      values: `[*lead, N, cap]`, or a compressed array of that matrix: the values, then zeros.
      counts: int32 `[*lead, N, 1]`: how many values a row has.
      k: K, the contracted columns. Rows are single runs, so that K is never sharded.
    """

    roles = {"columns": (ROWS, INNER), "values": (ROWS, INNER), "counts": (ROWS, CONTRACTED)}
    trains = {"values": "values"}

    columns: Array
    values: Array | CompressedArray
    counts: Array
    k: int
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
    ) -> CSR:
        """The entries of `matrix` where `mask` keeps them; see `UnstructuredSparse.from_mask`."""
        mask = jnp.asarray(mask, bool)
        counts = mask.sum(-1, keepdims=True, dtype=jnp.int32)
        columns = kept_columns(mask, cap)
        values = jnp.take_along_axis(jnp.where(mask, matrix, 0), columns, axis=-1)
        columns = jnp.where(jnp.arange(columns.shape[-1]) < counts, columns, 0)
        return cls(
            columns.astype(column_dtype(matrix.shape[-1])),
            values if encode is None else encode(values),
            counts,
            matrix.shape[-1],
            dims,
            casts or (str(matrix.dtype),),
        )

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return self.k

    @property
    def column_unit(self) -> int:
        """0: the values of a row are one run, no part of it belongs to a part of the columns."""
        return 0

    def mask(self) -> Array:
        """True where a value is kept, bool `[*lead, N, K]`."""
        return self._placed(jnp.ones(self.columns.shape, bool))

    def decode(self) -> Array:
        """The kept values at their columns, zeros elsewhere, `[*lead, N, K]`."""
        return self._placed(as_matrix(self.values))

    def _placed(self, values: Array) -> Array:
        inside = jnp.arange(self.columns.shape[-1]) < self.counts
        columns = jnp.where(inside, self.columns.astype(jnp.int32), self.k)
        flat = columns.reshape(-1, columns.shape[-1])

        def place(values: Array, columns: Array) -> Array:
            # What only fills a row up has the column K, which is none.
            return jnp.zeros(self.k, values.dtype).at[columns].set(values, mode="drop")

        rows = jax.vmap(place)(values.reshape(flat.shape), flat)
        return rows.reshape(*columns.shape[:-1], self.k)

    def to_disk(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Columns and values end to end, `[kept]`; compressed values as they are."""
        counts = np.asarray(self.counts)[..., 0]
        columns = ragged.trimmed(self.columns, counts)
        values: Any = self.values
        if not is_compressed(values):
            values = ragged.trimmed(values, counts)
        if columns is None or values is None:
            return self.buffers, None
        out = {"columns": columns, "values": values, "counts": self.counts}
        return out, {"cap": self.columns.shape[-1]}

    @classmethod
    def from_disk(
        cls, buffers: dict[str, Any], static: dict[str, Any], besides: dict[str, Any]
    ) -> CSR:
        """The inverse of `to_disk`."""
        numbers: Any = np.asarray(buffers["counts"])
        columns = ragged.filled(buffers["columns"], numbers[..., 0], besides["cap"])
        values = buffers["values"]
        if not is_compressed(values):
            values = ragged.filled(values, numbers[..., 0], besides["cap"])
        return cls(columns, values, numbers, **static)


def column_dtype(k: int) -> Any:
    """The narrowest dtype of a column number that every reader of sparse rows knows."""
    return jnp.uint16 if k <= 1 << 16 else jnp.int32
