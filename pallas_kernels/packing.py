"""Unsigned codes of 1 to 8 bits, or 16, as a dense bitstream in int32 words.

Code ``i`` of a row starts at bit ``i * bits`` of the row's stream, least significant bit first, so
codes of 3, 5, 6 and 7 bits straddle words. This is the order of compressed-tensors'
``weight_packed`` and, transposed, of GPTQ's ``qweight``. A row is padded with zeros to a multiple
of 32 codes, which is a whole number of words for every width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

PACKING_MULTIPLE = 32  # codes; 32 codes of b bits fill exactly b words


def packed_words(k: int, bits: int) -> int:
    """Returns how many int32 words hold a row of ``k`` codes, padding included."""
    return -(-k // PACKING_MULTIPLE) * bits


def codes_in(words: int, bits: int) -> int:
    """Returns how many codes, padding included, a row of ``words`` int32 words holds."""
    return words * 32 // bits


def pack(u: jax.typing.ArrayLike, bits: int) -> jax.Array:
    """Packs codes along the last axis.

    Args:
      u: [..., K] integers, 0 <= u < 2**bits; only the low ``bits`` bits of each are stored.
      bits: width of a code, 1 to 8 or 16.

    Returns:
      int32 [..., ceil(K / 32) * bits].

    Raises:
      ValueError: ``bits`` is not in 1..8, nor 16.
    """
    codes_per_period, words_per_period = _period(bits)
    u = jnp.asarray(u)
    *lead, k = u.shape
    u = u.astype(jnp.uint32) & jnp.uint32(2**bits - 1)
    u = jnp.pad(u, [(0, 0)] * len(lead) + [(0, -k % PACKING_MULTIPLE)])
    u = u.reshape(*lead, u.shape[-1] // codes_per_period, codes_per_period)
    words = []
    for w in range(words_per_period):
        first, last = _starting_in(w, bits)
        offsets = np.arange(first, last) * bits - 32 * w
        # The fields are disjoint, so that their sum is their union.
        word = jnp.sum(u[..., first:last] << offsets.astype(np.uint32), axis=-1, dtype=jnp.uint32)
        if 32 * w % bits:  # the code before began in the previous word
            word |= u[..., first - 1] >> np.uint32(32 * w - (first - 1) * bits)
        words.append(word)
    packed = jnp.stack(words, axis=-1)
    packed = packed.reshape(*lead, packed.shape[-2] * words_per_period)
    return jax.lax.bitcast_convert_type(packed, jnp.int32)


def unpack(words: jax.typing.ArrayLike, bits: int, k: int | None = None) -> jax.Array:
    """Unpacks codes along the last axis; the inverse of :func:`pack`.

    Args:
      words: int32 [..., W], W a multiple of the words in a period (any W for 1, 2, 4, 8 bits).
      bits: width of a code, 1 to 8 or 16.
      k: codes to keep of each row; None keeps the padding.

    Returns:
      uint8 [..., k]; uint16 of 16 bits.

    Raises:
      ValueError: ``bits`` is not in 1..8, nor 16, or the words do not hold ``k`` codes.
    """
    _, words_per_period = _period(bits)
    words = jnp.asarray(words)
    *lead, w = words.shape
    if w % words_per_period:
        raise ValueError(f"unpack: {w} words of {bits} bits: not a multiple of {words_per_period}")
    stored = codes_in(w, bits)
    if k is not None and k > stored:
        raise ValueError(f"unpack: {w} words hold {stored} codes of {bits} bits, {k} were asked")
    if 8 % bits == 0:
        # Not a bitcast to uint4 or uint2: XLA folds that of a constant to wrong values.
        u = jax.lax.bitcast_convert_type(words, jnp.uint8)
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        u = (u[..., None] >> shifts) & np.uint8(2**bits - 1)
    else:
        u = _shift_out(words, bits, words_per_period)
    u = u.reshape(*lead, stored)
    return u if k is None or k == stored else u[..., :k]


def unpack_by_bitcast(words: jax.Array, bits: int, k: int | None = None) -> jax.Array:
    """:func:`unpack` by XLA's own packed types, 5 to 8 times faster on a CPU.

    Not for words that may be a constant of the program: XLA (jaxlib 0.10) folds this bitcast of a
    constant to wrong values. The caller puts an optimization barrier before it.
    """
    if bits not in (2, 4):
        return unpack(words, bits, k)
    u = jax.lax.bitcast_convert_type(words, {2: jnp.uint2, 4: jnp.uint4}[bits])
    u = u.astype(jnp.uint8).reshape(*words.shape[:-1], -1)
    return u[..., :k]


def _shift_out(words: jax.Array, bits: int, words_per_period: int) -> jax.Array:
    """Returns the codes of int32 words [..., W], [..., periods, codes per period]."""
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    words = words.reshape(*words.shape[:-1], -1, words_per_period)
    pieces = []
    for i in range(words_per_period):
        first, last = _starting_in(i, bits)
        offsets = np.arange(first, last) * bits - 32 * i
        piece = words[..., i : i + 1] >> offsets.astype(np.uint32)
        overhang = last * bits - 32 * (i + 1)
        if overhang > 0:  # the last code's high bits are the next word's low bits
            shift = np.zeros(last - first, np.uint32)
            mask = np.zeros(last - first, np.uint32)
            shift[-1], mask[-1] = bits - overhang, 2**overhang - 1
            piece |= (words[..., i + 1 : i + 2] & mask) << shift
        pieces.append(piece)
    u = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)
    return (u & jnp.uint32(2**bits - 1)).astype(jnp.uint8 if bits <= 8 else jnp.uint16)


def _period(bits: int) -> tuple[int, int]:
    """Returns (codes, words) of the shortest run of whole codes in whole words."""
    if not 1 <= bits <= 8 and bits != 16:
        raise ValueError(f"codes have 1 to 8 bits, or 16, not {bits}")
    length = math.lcm(bits, 32)
    return length // bits, length // 32


def _starting_in(word: int, bits: int) -> tuple[int, int]:
    """Returns the range of codes of a period whose first bit lies in ``word``."""
    return -(-32 * word // bits), -(-32 * (word + 1) // bits)
