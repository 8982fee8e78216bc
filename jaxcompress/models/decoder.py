"""One decoder for Llama 2 and 3, Mistral, Qwen2 and Qwen3.

Touvron et al. 2023 (arXiv:2302.13971): pre-norm blocks of grouped-query attention with rotary
positions and a gated feed-forward layer. Parameters: `embed/embedding` `[vocab, d]`,
`layers/0/attn/{q,k,v,o}_proj/kernel` `[in, out]`, `layers/0/mlp/{gate,up,down}_proj/kernel`,
`layers/0/{input_norm,post_attention_norm}/scale`, `final_norm/scale`, and `lm_head/kernel`
unless tied; with `scan_layers` `layers/attn/...` carry a leading axis over the blocks.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxcompress.core.model import Blocks
from jaxcompress.models.decoder_config import DecoderConfig
from jaxcompress.models.functions import Functions
from jaxcompress.models.kv_cache import empty_cache, through_cache
from jaxcompress.models.layers import (
    Embedding,
    Linear,
    RMSNorm,
    activation,
    attention,
    block_stack,
    causal_mask,
    stack_settings,
)
from jaxcompress.models.names import NameMap, Parameter
from jaxcompress.models.rope import rotary_tables, rotate


class Context(NamedTuple):
    """What all blocks share: positions `[seq]` and rotary tables `[seq, head_dim / 2]`."""

    positions: Array
    cos: Array
    sin: Array


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Array, context: Context, window: int | Array | None, cache: Any
    ) -> tuple[Array, Any]:
        """`[batch, seq, d]` to the same, and the cache with this call's keys and values."""
        cfg = self.config
        batch, seq, _ = x.shape

        def project(name: str, heads: int) -> Array:
            linear = _linear(cfg, heads * cfg.head_dim, cfg.attention_bias, f"{name}_proj")
            y = linear(x).reshape(batch, seq, heads, cfg.head_dim)
            if cfg.qk_norm and name != "v":
                y = _norm(cfg, f"{name}_norm")(y)
            return y

        q = rotate(project("q", cfg.num_attention_heads), context.cos, context.sin)
        k = rotate(project("k", cfg.num_key_value_heads), context.cos, context.sin)
        v = project("v", cfg.num_key_value_heads)
        k, v, keys, cache = through_cache(cache, k, v, context.positions, cfg.kv_cache_dtype)
        mask = causal_mask(context.positions, keys, window)
        y = attention(q, k, v, mask, cfg.head_dim**-0.5)
        output = _linear(cfg, cfg.hidden_size, cfg.attention_output_bias, "o_proj")
        return output(y), cache


class MLP(nn.Module):
    """Gated feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[batch, seq, d]` to the same."""
        cfg = self.config
        gate = _linear(cfg, cfg.intermediate_size, cfg.mlp_bias, "gate_proj")(x)
        up = _linear(cfg, cfg.intermediate_size, cfg.mlp_bias, "up_proj")(x)
        y = activation(cfg.hidden_act)(gate) * up
        return _linear(cfg, cfg.hidden_size, cfg.mlp_bias, "down_proj")(y)


class Block(nn.Module):
    """Attention and feed-forward layer, each behind a norm and around a residual."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Array, context: Context, window: int | Array | None, cache: Any
    ) -> tuple[Array, Any]:
        """`[batch, seq, d]` to the same, tagged `hidden`, and the updated cache."""
        y = _norm(self.config, "input_norm")(x)
        y, cache = Attention(self.config, name="attn")(y, context, window, cache)
        x = x + y
        y = _norm(self.config, "post_attention_norm")(x)
        x = x + MLP(self.config, name="mlp")(y)
        return checkpoint_name(x, "hidden"), cache


class Decoder(nn.Module):
    """Token ids `[batch, seq]` to logits `[batch, seq, vocab]`."""

    config: DecoderConfig

    def setup(self) -> None:
        cfg = self.config
        self.embed = Embedding(cfg.vocab_size, cfg.hidden_size, cfg.dtype, cfg.param_dtype)
        self.layers = block_stack(Block, cfg, cfg.windows)
        self.final_norm = _norm(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = _linear(cfg, cfg.vocab_size, False)

    def __call__(self, ids: Array, cache: Any = None, index: Array | int = 0) -> Any:
        """Logits; with a cache `(logits, cache)`, the ids standing at `index` and after."""
        x, new = self._trunk(ids, cache, index)
        logits = self.head(x)
        return logits if cache is None else (logits, new)

    def trunk(self, ids: Array) -> Array:
        """Token ids to the last hidden states, `[batch, seq, d]`."""
        return self._trunk(ids, None, 0)[0]

    def _trunk(self, ids: Array, cache: Any, index: Array | int) -> tuple[Array, Any]:
        context = make_context(self.config, ids.shape[1], index)
        settings = stack_settings(self.config, self.config.windows)
        return self.layers(self.embed(ids), context, settings, cache)

    def embed_ids(self, ids: Array) -> Array:
        """Token ids to the first hidden states `[batch, seq, d]`."""
        return self.embed(ids)

    def head(self, x: Array) -> Array:
        """Last hidden states to logits."""
        x = self.final_norm(x)
        return self.embed.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)


def make_context(config: DecoderConfig, seq: int, index: Array | int) -> Context:
    """Positions `index`, `index + 1`, ... and their rotary tables."""
    positions = jnp.arange(seq) + index
    tables = rotary_tables(config.rope, config.head_dim, positions, config.max_position_embeddings)
    return Context(positions, *tables)


@functools.lru_cache(maxsize=64)
def build(config: DecoderConfig) -> Functions:
    """The pure functions of a decoder; equal configs give the same function objects."""
    module = Decoder(config)

    def apply(params: Any, ids: Array) -> Any:
        return module.apply({"params": params}, ids)

    def apply_cached(params: Any, ids: Array, cache: Any, index: Array) -> Any:
        return module.apply({"params": params}, ids, cache, index)

    def block(params: Any, hidden: Array) -> Array:
        context = make_context(config, hidden.shape[1], 0)
        out, _ = Block(config).apply({"params": params}, hidden, context, config.windows[0], None)
        return out

    blocks = Blocks(
        embed=lambda params, ids: module.apply({"params": params}, ids, method="embed_ids"),
        block=block,
        head=lambda params, hidden: module.apply({"params": params}, hidden, method="head"),
        trunk=lambda params, ids: module.apply({"params": params}, ids, method="trunk"),
    )
    return Functions(
        apply=apply,
        init=lambda key: module.init(key, jnp.zeros((1, 1), jnp.int32))["params"],
        # Blocks that differ in more than their parameters are no walk of equal steps.
        blocks=blocks if len(set(config.windows)) == 1 else None,
        apply_cached=apply_cached,
        init_cache=lambda batch, length: empty_cache(
            config,
            config.num_hidden_layers,
            (batch, length, config.num_key_value_heads, config.head_dim),
            config.kv_cache_dtype,
        ),
    )


def name_map(config: DecoderConfig) -> NameMap:
    """The table between parameters and tensors of a Hugging Face checkpoint."""
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    rows = [
        Parameter(
            "embed/embedding",
            "model.embed_tokens.weight",
            "embedding",
            ("vocab", "embed"),
            aliases=tied,
        )
    ]
    for layer in range(config.num_hidden_layers):
        rows += _layer_rows(config, layer)
    rows.append(Parameter("final_norm/scale", "model.norm.weight", "norm", ("embed",)))
    if not config.tie_word_embeddings:
        rows.append(
            Parameter("lm_head/kernel", "lm_head.weight", "head", ("embed", "vocab"), axes=(1, 0))
        )
    return NameMap(tuple(rows), prefix="model.")


def _layer_rows(config: DecoderConfig, layer: int) -> list[Parameter]:
    ours, theirs = f"layers/{layer}", f"model.layers.{layer}"
    rows = []

    def linear(path: str, name: str, axes: tuple[str, str], bias: bool) -> None:
        rows.append(
            Parameter(f"{ours}/{path}/kernel", f"{theirs}.{name}.weight", "linear", axes, (1, 0))
        )
        if bias:
            rows.append(Parameter(f"{ours}/{path}/bias", f"{theirs}.{name}.bias", "bias", axes[1:]))

    def norm(path: str, name: str, axis: str | None) -> None:
        rows.append(Parameter(f"{ours}/{path}/scale", f"{theirs}.{name}.weight", "norm", (axis,)))

    norm("input_norm", "input_layernorm", "embed")
    for p, axis in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads")):
        linear(f"attn/{p}_proj", f"self_attn.{p}_proj", ("embed", axis), config.attention_bias)
        if config.qk_norm and p != "v":
            norm(f"attn/{p}_norm", f"self_attn.{p}_norm", None)
    linear("attn/o_proj", "self_attn.o_proj", ("heads", "embed"), config.attention_output_bias)
    norm("post_attention_norm", "post_attention_layernorm", "embed")
    for p in ("gate", "up"):
        linear(f"mlp/{p}_proj", f"mlp.{p}_proj", ("embed", "mlp"), config.mlp_bias)
    linear("mlp/down_proj", "mlp.down_proj", ("mlp", "embed"), config.mlp_bias)
    return rows


def _linear(config: DecoderConfig, features: int, bias: bool, name: str | None = None) -> Linear:
    return Linear(features, bias, config.dtype, config.param_dtype, name=name)


def _norm(config: DecoderConfig, name: str | None = None) -> RMSNorm:
    return RMSNorm(config.rms_norm_eps, config.dtype, config.param_dtype, name=name)
