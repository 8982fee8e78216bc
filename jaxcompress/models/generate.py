"""Text generation with a cache of keys and values, one compiled program per shape."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.models.families import functions_of
from jaxcompress.models.functions import Functions


class _State(NamedTuple):
    """Carry of the decoding loop."""

    step: Array
    tokens: Array  # [batch, max_new_tokens]
    logits: Array  # [batch, vocab], of the next token
    cache: Any
    key: Array
    done: Array  # [batch]


def generate(
    model: Model,
    prompt_ids: Any,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    eos_ids: tuple[int, ...] = (),
) -> np.ndarray:
    """Continues prompts.

    Args:
      model: a decoder or GPT-2, dense or compressed.
      prompt_ids: `[seq]`, or `[batch, seq]` of equally long prompts.
      max_new_tokens: how many tokens to add.
      temperature: 0 takes the most likely token; otherwise logits are divided by it and drawn.
      top_k: draw among the k most likely only.
      seed: of the draws.
      eos_ids: tokens that end a text; it is filled up with the first of them.

    Returns:
      int32 ids, the prompt included, `[seq + max_new_tokens]` or with the batch axis in front.

    Raises:
      InputError: the model has no cache, the prompt is empty, or the text would be too long.
    """
    _check_cached(model, "generate")
    prompt = np.asarray(prompt_ids, np.int32)
    batch = prompt[None] if prompt.ndim == 1 else prompt
    if batch.ndim != 2 or batch.size == 0:
        raise InputError(f"generate: prompt of shape {prompt.shape}; pass [seq] or [batch, seq]")
    limit = model.config.max_length
    if limit is not None and batch.shape[1] + max_new_tokens > limit:
        raise InputError(
            f"generate: {batch.shape[1]} + {max_new_tokens} tokens exceed the model's {limit}"
        )
    if max_new_tokens < 1 or temperature < 0 or (top_k is not None and top_k < 1):
        raise InputError("generate: max_new_tokens and top_k must be 1 or more, temperature >= 0")
    if temperature == 0:
        top_k = None
    elif top_k is not None:
        top_k = min(top_k, model.config.vocab_size)
    new = _decode(
        functions_of(model.config),
        max_new_tokens,
        temperature > 0,
        top_k,
        tuple(eos_ids),
        model.params,
        jnp.asarray(batch),
        jnp.float32(temperature),
        jax.random.key(seed),
    )
    out = np.concatenate([batch, np.asarray(new)], axis=1)
    return out[0] if prompt.ndim == 1 else out


def quantize_kv_cache(model: Model, dtype: str | None) -> Model:
    """The model with its keys and values rounded, per token and per head, after rotary positions.

    `generate` keeps them in the format; the full forward pass (and so a perplexity) rounds them
    alike. The config says so, `kv_cache_dtype`, and is saved with the model.

    Args:
      model: a decoder or GPT-2, dense or compressed.
      dtype: "int8", "int4" (with a zero point) or "fp8" (e4m3); None: as they are again.

    Raises:
      InputError: an unknown format, or a model without such a cache.
    """
    _check_cached(model, "quantize_kv_cache")
    config = dataclasses.replace(model.config, kv_cache_dtype=dtype)
    functions = functions_of(config)
    return model.replace(apply=functions.apply, blocks=functions.blocks, config=config)


def _check_cached(model: Model, what: str) -> None:
    if model.config is None or functions_of(model.config).apply_cached is None:
        kind = "a model without config" if model.config is None else model.config.model_type
        raise InputError(f"{what}: {kind} cannot decode with a cache; decoders and GPT-2 can")


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _decode(
    functions: Functions,
    max_new_tokens: int,
    draw: bool,
    top_k: int | None,
    eos_ids: tuple[int, ...],
    params: Any,
    prompt: Array,
    temperature: Array,
    key: Array,
) -> Array:
    """New tokens `[batch, max_new_tokens]`: the prompt at once, then token by token."""
    from jaxcompress.core.readers.lift import lift

    assert functions.apply_cached is not None
    assert functions.init_cache is not None
    apply = lift(functions.apply_cached)
    batch, length = prompt.shape
    cache = functions.init_cache(batch, length + max_new_tokens)
    logits, cache = apply(params, prompt, cache, jnp.int32(0))
    ends = jnp.asarray(eos_ids, jnp.int32)

    def choose(logits: Array, key: Array) -> Array:
        if not draw:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits.astype(jnp.float32) / temperature
        if top_k is not None:
            smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
            logits = jnp.where(logits < smallest, -jnp.inf, logits)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    def unfinished(state: _State) -> Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def advance(state: _State) -> _State:
        key, now = jax.random.split(state.key)
        token = choose(state.logits, now)
        done = state.done
        if eos_ids:
            token = jnp.where(done, ends[0], token)
            done = done | jnp.isin(token, ends)
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step))
        logits, cache = apply(params, token[:, None], state.cache, length + state.step)
        return _State(state.step + 1, tokens, logits[:, -1], cache, key, done)

    filler = eos_ids[0] if eos_ids else 0
    start = _State(
        jnp.int32(0),
        jnp.full((batch, max_new_tokens), filler, jnp.int32),
        logits[:, -1],
        cache,
        key,
        jnp.zeros(batch, bool),
    )
    return jax.lax.while_loop(unfinished, advance, start).tokens
