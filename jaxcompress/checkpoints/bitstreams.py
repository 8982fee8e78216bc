"""Codes of few bits in the words of checkpoints."""

from __future__ import annotations

import numpy as np

from jaxcompress.core.arrays.affine import Affine
from pallas_kernels.packing import pack, packed_words


def dense_in_order(leaf: Affine, order: np.ndarray) -> np.ndarray:
    """The matrix [N, K] whose column k has the scales of group `order[k]`; of the dtype of scales.

    Args:
      leaf: of arrays, with as many groups.
      order: integers `[K]`.
    """
    scale = np.asarray(leaf.scale)
    signed = np.asarray(leaf.integers()).astype(scale.dtype)
    if leaf.zero_point is None:
        return (signed - scale.dtype.type(2 ** (leaf.bits - 1))) * scale[:, order]
    return (signed - np.asarray(leaf.zero_point).astype(scale.dtype)[:, order]) * scale[:, order]


def is_padded(packed: np.ndarray, count: int, bits: int) -> bool | None:
    """Whether `packed` `[rows, words]` is in the layout of before June 2026; None: cannot be told.

    Before pull request 732 of compressed-tensors a word held 32 // bits whole codes; this differs
    from a dense stream for 3, 5, 6 and 7 bits. The widths tell the two apart, except for some
    narrow matrices: there it is the older one if there are bits beyond the end of a dense stream.

    Args:
      packed: int32 `[rows, words]`.
      count: codes of a row.
      bits: of a code.

    Raises:
      ValueError: so many codes fill another number of words.
    """
    width, tight, padded = packed.shape[1], -(-count * bits // 32), -(-count // (32 // bits))
    if width not in (tight, padded):
        raise ValueError(f"{width} words for {count} codes of {bits} bits")
    if width != tight or width != padded:
        return width != tight
    used = count * bits % 32
    return True if used and (packed[:, -1].view(np.uint32) >> np.uint32(used)).any() else None


def dense_stream(packed: np.ndarray, count: int, bits: int, padded: bool | None) -> np.ndarray:
    """Words `[rows, w]` holding `count` codes a row, as whole periods of a dense bitstream.

    Args:
      packed: int32 `[rows, words]`.
      count: codes of a row.
      bits: of a code.
      padded: whether a word holds 32 // bits whole codes; otherwise codes go on in the next one.
    """
    width, per_word = packed.shape[1], 32 // bits
    words = packed.view(np.uint32)
    if padded:
        shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
        codes = (words[:, :, None] >> shifts) & np.uint32(2**bits - 1)
        return np.asarray(pack(codes.reshape(len(packed), -1)[:, :count].astype(np.uint8), bits))
    return np.pad(packed, ((0, 0), (0, packed_words(count, bits) - width)))
