"""Codes of few bits in the words of checkpoints."""

from __future__ import annotations

import numpy as np

from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.errors import InputError
from pallas_kernels.packing import pack, packed_words


def dense_in_order(leaf: Affine, order: np.ndarray) -> np.ndarray:
    """The matrix [N, K] whose column k has the scales of group `order[k]`.

    Args:
      leaf: of one matrix, with as many groups; computed and cast as it decodes.
      order: integers `[K]`.
    """
    wide, zero = leaf.quantities()
    scale, codes = np.asarray(wide), np.asarray(leaf.integers()).astype(wide.dtype)
    middle = scale.dtype.type(2 ** (leaf.bits - 1))
    shift = middle if zero is None else np.asarray(zero).astype(scale.dtype)[:, order]
    return ((codes - shift) * scale[:, order]).astype(leaf.dtype)


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


def half_scales(name: str, leaf: Affine) -> tuple[np.ndarray, np.ndarray]:
    """Scales float16 `[groups, N]` and zeros uint8 `[groups, N]`, as GPTQ and AWQ hold them.

    Args:
      name: of the module, for messages.
      leaf: of one matrix, with whole zeros.

    Raises:
      InputError: leading axes, or a scale that is no float16 number.
    """
    if leaf.lead:
        raise InputError(f"{name}: {leaf.lead} stacked matrices; a module holds one, index it")
    scale, zero = leaf.quantities()
    wide = np.asarray(scale)
    half = wide.astype(np.float16)
    if not np.array_equal(half.astype(wide.dtype), wide):
        raise InputError(
            f"{name}: scales of {leaf.scale.dtype} that float16 cannot hold, in which GPTQ and AWQ "
            "store them; quantize with scale_bits=16"
        )
    shape = (leaf.rows, leaf.groups)
    middle = np.full(shape, 2 ** (leaf.bits - 1), np.uint8)
    zeros = middle if zero is None else np.broadcast_to(np.asarray(zero, np.uint8), shape)
    return np.broadcast_to(half, shape).T, zeros.T
