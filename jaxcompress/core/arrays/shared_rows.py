"""A matrix of few distinct rows: scales of 2-D blocks, each of which serves many rows."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.core.arrays.base import (
    CONTRACTED,
    INNER,
    ROWS,
    STORED,
    Array,
    CompressedArray,
    Dims,
    register,
)


@register
class SharedRows(CompressedArray):
    """Every row is one of few: row i = values[index[i]].

    An index for each row, where one for each run of equal rows would do, lets rows be sliced,
    permuted and sharded anywhere.

    Attributes:
      values: `[*lead, R, K]`.
      index: unsigned `[*lead, N, 1]`, below R.
    """

    roles = {"values": (INNER, CONTRACTED), "index": (ROWS, INNER)}
    trains = {"values": "scales"}

    values: Array
    index: Array
    dims: Dims = STORED
    casts: tuple[str, ...] = ("float32",)

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return self.values.shape[-1]

    def decode(self) -> Array:
        """All rows, `[*lead, N, K]` in the dtype of `values`."""
        return jnp.take_along_axis(self.values, self.index.astype(jnp.int32), axis=-2)


def share_rows(values: Array, rows: int, each: int) -> SharedRows:
    """`values` `[*lead, ceil(rows / each), K]`, every one of which stands for `each` rows."""
    count = values.shape[-2]
    dtype = jnp.uint8 if count <= 2**8 else jnp.uint16 if count <= 2**16 else jnp.uint32
    index = jnp.arange(rows, dtype=jnp.uint32) // each
    index = jnp.broadcast_to(index.astype(dtype)[:, None], (*values.shape[:-2], rows, 1))
    return SharedRows(values, index, casts=(str(values.dtype),))
