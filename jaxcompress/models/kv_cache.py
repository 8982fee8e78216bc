"""The cache of keys and values that decoding keeps, as it is or in a few bits.

In 8 or 4 bits every key and every value of a token and a head has a scale of its own (Sheng et
al., "FlexGen", arXiv:2303.06865, section 4, with a head as the group), found when it is written.
The full forward pass rounds keys and values just so, so that a perplexity is that of a model that
decodes with such a cache.

A cache holds, per block, dicts of arrays `[batch, length, kv_heads, ...]` under "k" and "v":
`values` where nothing is rounded; otherwise `codes` (int8, float8_e4m3fn, or int32 words of eight
4-bit codes), `scale` in the dtype of the model and, of 4 bits, `zero_point`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.arrays.minifloat import to_codes
from jaxcompress.core.arrays.rounding import covering, divide, from_codes, nearest_codes
from jaxcompress.core.errors import InputError
from jaxcompress.models.config import ModelConfig

KV_CACHE_DTYPES = ("int8", "int4", "fp8")
PER_WORD = 8  # 4-bit codes in an int32

Part = dict[str, Array]


def check_kv_cache_dtype(dtype: str | None) -> None:
    """Raise `InputError` unless a cache can be kept in this format."""
    if dtype is not None and dtype not in KV_CACHE_DTYPES:
        raise InputError(f"kv_cache_dtype {dtype!r}: use one of {', '.join(KV_CACHE_DTYPES)}")


def encode(x: Array, dtype: str | None) -> Part:
    """Keys or values `[..., head_dim]` as the cache keeps them; None: as they are."""
    if dtype is None:
        return {"values": x}
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    if dtype == "int4":  # too few to spend half of them on a side that has no values
        scale, zero = covering(low, high, bits=4, symmetric=False)
        assert zero is not None
        return {
            "codes": _packed(nearest_codes(x, scale, zero, 4)),
            "scale": scale,
            "zero_point": zero,
        }
    # The largest lands on a code, not between two (as with absmax / 127.5), where the last bit of a
    # sum would decide: decoding and the full forward pass add in different orders.
    largest = jnp.asarray(448 if dtype == "fp8" else 127, x.dtype)
    scale = divide(jnp.maximum(-low, high), largest)
    scale = jnp.where(scale == 0, jnp.finfo(x.dtype).eps, scale)
    if dtype == "int8":
        return {"codes": (nearest_codes(x, scale, None, 8) - 128).astype(jnp.int8), "scale": scale}
    codes = to_codes(divide(x, scale), "e4m3fn")
    return {"codes": jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), "scale": scale}


def decode(part: Mapping[str, Array], dtype: str | None, head_dim: int) -> Array:
    """The keys or values that `encode` kept, `[..., head_dim]`."""
    if dtype is None:
        return part["values"]
    codes, scale = part["codes"], part["scale"]
    if dtype == "fp8":
        return codes.astype(scale.dtype) * scale
    if dtype == "int8":
        return from_codes(codes.astype(jnp.int32) + 128, scale, None, 8)
    return from_codes(_unpacked(codes, head_dim), scale, part["zero_point"], 4)


def _packed(u: Array) -> Array:
    """Codes of 4 bits `[..., n]`, eight to an int32 `[..., ceil(n / 8)]`, the first lowest."""
    missing = -u.shape[-1] % PER_WORD
    u = jnp.pad(u, [(0, 0)] * (u.ndim - 1) + [(0, missing)]).astype(jnp.uint32)
    u = u.reshape(*u.shape[:-1], -1, PER_WORD) << (4 * jnp.arange(PER_WORD, dtype=jnp.uint32))
    return jax.lax.bitcast_convert_type(u.sum(-1, dtype=jnp.uint32), jnp.int32)


def _unpacked(words: Array, count: int) -> Array:
    u = jax.lax.bitcast_convert_type(words, jnp.uint32)[..., None]
    u = (u >> (4 * jnp.arange(PER_WORD, dtype=jnp.uint32))) & 15
    return u.reshape(*words.shape[:-1], -1)[..., :count].astype(jnp.int32)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def rounded(x: Array, dtype: str) -> Array:
    """What a cache would give back of keys or values; gradients pass straight through."""
    return decode(encode(x, dtype), dtype, x.shape[-1])


@rounded.defjvp
def _rounded_jvp(dtype: str, primals: Any, tangents: Any) -> tuple[Array, Array]:
    return rounded(primals[0], dtype), tangents[0]


def through_cache(
    cache: Any, k: Array, v: Array, positions: Array, dtype: str | None
) -> tuple[Array, Array, Array, Any]:
    """The keys and values that a block attends to.

    Args:
      cache: of the block, or None.
      k: of this call's tokens, rotated, `[batch, seq, kv_heads, head_dim]`; v likewise.
      positions: of these tokens, `[seq]`.
      dtype: format of the cache; None: as they are.

    Returns:
      Keys and values, their positions, and the cache with those of this call written into it.
    """
    if cache is None:
        if dtype is not None:
            k, v = rounded(k, dtype), rounded(v, dtype)
        return k, v, positions, None
    start = (0, positions[0], 0, 0)

    def write(old: Part, x: Array) -> Part:
        new = encode(x, dtype)
        return {
            name: jax.lax.dynamic_update_slice(old[name], new[name].astype(old[name].dtype), start)
            for name in old
        }

    cache = {"k": write(cache["k"], k), "v": write(cache["v"], v)}
    head_dim = k.shape[-1]
    k, v = decode(cache["k"], dtype, head_dim), decode(cache["v"], dtype, head_dim)
    return k, v, jnp.arange(k.shape[1]), cache


def empty_cache(
    config: ModelConfig, layers: int, shape: tuple[int, int, int, int], dtype: str | None
) -> Any:
    """Zeros for keys and values, `[batch, length, kv_heads, head_dim]` per block.

    Args:
      config: of the model.
      layers: number of blocks; stacked along a leading axis where the model scans over them.
      shape: as above.
      dtype: format of the cache; None: as they are.
    """
    like = jax.ShapeDtypeStruct(shape, config.dtype)
    parts = jax.eval_shape(partial(encode, dtype=dtype), like)

    def zeros(*lead: int) -> dict[str, Part]:
        part = {name: jnp.zeros((*lead, *x.shape), x.dtype) for name, x in parts.items()}
        return {"k": part, "v": dict(part)}

    return zeros(layers) if config.scan_layers else tuple(zeros() for _ in range(layers))
