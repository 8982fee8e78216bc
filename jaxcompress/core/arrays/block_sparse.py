"""Block sparse matrices: whole blocks are kept or gone, one bit for each."""

from __future__ import annotations

from typing import Any

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
from jaxcompress.core.errors import InputError
from pallas_kernels.packing import codes_in, pack, unpack


@register
class BlockSparse(CompressedArray):
    """Keeps some blocks of rows by columns.

    Attributes:
      bitmask: int32 `[*lead, N, ceil32(K / block[1]) / 32]`, bit j of word i of a row: whether its
        block 32 i + j is kept. Rows of one block agree; a file holds one of them.
      values: `[*lead, N, cap * block[1]]`, or a compressed array of that matrix: the kept runs of a
        row in order, then zeros; cap is the largest number of blocks that a row keeps.
      block: (rows, columns) of a block.
      pad: padded bits, so that K = (words * 32 - pad) * block[1].
    """

    roles = {"bitmask": (ROWS, CONTRACTED), "values": (ROWS, INNER)}
    trains = {"values": "values"}

    bitmask: Array
    values: Array | CompressedArray
    block: tuple[int, int] = (1, 1)
    pad: int = 0
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)

    @classmethod
    def from_mask(
        cls,
        matrix: Array,
        mask: Array,
        block: tuple[int, int],
        *,
        cap: int | None = None,
        dims: Dims = KERNEL,
        casts: tuple[str, ...] | None = None,
        encode: Encode | None = None,
    ) -> BlockSparse:
        """The entries of `matrix` where `mask` keeps them.

        A block of which the mask keeps anything is stored whole, zeros included.

        Args:
          matrix: `[*lead, N, K]`.
          mask: bool `[*lead, N, K]`, True = kept.
          block: (rows, columns) of a block; must divide N and K.
          cap: room for blocks in each row; None: the largest count of a row (all of them for a
            traced mask, whose counts are unknown). Must be at least that.
          dims: how the dense axes factor over N and K.
          casts: logical dtypes after decoding; None: the dtype of `matrix`.
          encode: compresses the kept values `[*lead, N, cap * block[1]]`; None: as they are.

        Raises:
          InputError: a block does not fit N and K, or a row keeps more than `cap` (outside of jit).
        """
        *lead, n, k = matrix.shape
        high, wide = block
        if min(block) < 1 or n % high or k % wide:
            raise InputError(f"blocks of {high}x{wide}: they do not tile a matrix of {n} x {k}")
        mask = jnp.asarray(mask, bool)
        kept = mask.reshape(*lead, n // high, high, k // wide, wide).any((-3, -1))
        kept = jnp.repeat(kept, high, axis=-2)
        order = kept_columns(kept, cap)[..., None]
        runs = jnp.where(mask, matrix, 0).reshape(*lead, n, k // wide, wide)
        values = jnp.take_along_axis(runs, order, axis=-2).reshape(*lead, n, -1)
        return cls(
            pack(kept, 1),
            values if encode is None else encode(values),
            (high, wide),
            -(k // wide) % 32,
            dims,
            casts or (str(matrix.dtype),),
        )

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return self._bits * self.block[1]

    @property
    def column_unit(self) -> int:
        """0: the values of a row are one run, no part of it belongs to a part of the columns."""
        return 0

    @property
    def _bits(self) -> int:
        return codes_in(self.bitmask.shape[-1], 1) - self.pad

    def mask(self) -> Array:
        """True in the blocks that are kept, bool `[*lead, N, K]`."""
        return jnp.repeat(self._kept(), self.block[1], axis=-1)

    def decode(self) -> Array:
        """The kept blocks at their places, zeros elsewhere, `[*lead, N, K]`."""
        kept, values, wide = self._kept(), as_matrix(self.values), self.block[1]
        shape = (*kept.shape[:-1], self.contracted)
        cap = values.shape[-1] // wide
        if cap == 0:
            return jnp.zeros(shape, values.dtype)
        runs = values.reshape(*values.shape[:-1], cap, wide)
        order = jnp.clip(jnp.cumsum(kept, axis=-1, dtype=jnp.int32) - 1, 0, cap - 1)
        placed = jnp.take_along_axis(runs, order[..., None], axis=-2)
        return jnp.where(kept[..., None], placed, 0).reshape(shape)

    def _kept(self) -> Array:
        """Bool `[*lead, N, K / block[1]]`."""
        return unpack(self.bitmask, 1, self._bits).astype(bool)

    def to_disk(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """One row of bits for a row of blocks, and plain values end to end, `[kept]`."""
        counts = ragged.bits_of(self.bitmask, self._bits).sum(-1) * self.block[1]
        flat = None if is_compressed(self.values) else ragged.trimmed(self.values, counts)
        if flat is None:
            return self.buffers, None
        words = np.asarray(self.bitmask)
        high = self.block[0]
        # Rows that were cut out of a matrix need not begin with a block.
        same = words.shape[-2] % high == 0 and (words == _repeated(words[..., ::high, :], high))
        high = high if np.all(same) else 1
        out = {"bitmask": words[..., ::high, :], "values": flat}
        return out, {"cap": self.values.shape[-1], "rows_per_bit": high}

    @classmethod
    def from_disk(
        cls, buffers: dict[str, Any], static: dict[str, Any], besides: dict[str, Any]
    ) -> BlockSparse:
        """The inverse of `to_disk`."""
        words = _repeated(np.asarray(buffers["bitmask"]), besides["rows_per_bit"])
        bits = words.shape[-1] * 32 - static.get("pad", 0)
        counts = ragged.bits_of(words, bits).sum(-1) * static["block"][1]
        return cls(words, ragged.filled(buffers["values"], counts, besides["cap"]), **static)


def _repeated(words: np.ndarray, times: int) -> Any:
    return np.repeat(words, times, axis=-2)
