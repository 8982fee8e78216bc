"""GPT-2 (Radford et al. 2019), as transformers computes it.

Parameters: `embed/embedding` `[vocab, d]`, `positions/embedding` `[positions, d]`,
`layers/0/attn/c_attn/kernel` `[d, 3 d]` (queries, keys, values side by side),
`layers/0/{attn,mlp}/c_proj`, `layers/0/mlp/c_fc`, norms `input_norm`, `post_attention_norm` and
`final_norm` with `scale` and `bias`; `lm_head/kernel` only where not tied.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Blocks
from jaxcompress.models.config import ModelConfig
from jaxcompress.models.functions import Functions
from jaxcompress.models.kv_cache import check_kv_cache_dtype, empty_cache, through_cache
from jaxcompress.models.layers import (
    Embedding,
    LayerNorm,
    Linear,
    activation,
    attention,
    block_stack,
    causal_mask,
    stack_settings,
)
from jaxcompress.models.names import NameMap, Parameter


@dataclass(frozen=True)
class GPT2Config(ModelConfig):
    """Architecture of GPT-2, in the names of its `config.json`.

    Attributes:
      kv_cache_dtype: of the keys and values that are attended to; see `kv_cache`. No field of
        transformers, which ignores it.
    """

    model_type: str = "gpt2"
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    kv_cache_dtype: str | None = None

    def __post_init__(self) -> None:
        check_kv_cache_dtype(self.kv_cache_dtype)
        if self.n_embd % self.n_head:
            raise InputError(f"config: n_embd {self.n_embd} is no multiple of n_head {self.n_head}")

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.n_layer

    @property
    def max_length(self) -> int:
        """The longest sequence that has positions."""
        return self.n_positions

    @property
    def scales(self) -> tuple[float, ...]:
        """Factor of the attention scores in each block."""
        scale = (self.n_embd // self.n_head) ** -0.5 if self.scale_attn_weights else 1.0
        by_layer = self.scale_attn_by_inverse_layer_idx
        return tuple(scale / (i + 1 if by_layer else 1) for i in range(self.n_layer))

    def take_layers(self, indices: tuple[int, ...]) -> GPT2Config:
        """The config of the network that keeps these blocks, in this order."""
        return dataclasses.replace(self, n_layer=len(indices))

    def _fresh(self) -> dict[str, Any]:
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}

    @classmethod
    def _read(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        if config.get("add_cross_attention"):
            raise InputError("config: GPT-2 with add_cross_attention is not supported")
        return super()._read(config)


class Attention(nn.Module):
    """Multi-head attention with fused queries, keys and values."""

    config: GPT2Config

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, scale: float | Array, cache: Any
    ) -> tuple[Array, Any]:
        """`[batch, seq, d]` to the same, and the cache with this call's keys and values."""
        cfg = self.config
        fused = _linear(cfg, 3 * cfg.n_embd, "c_attn")(x)
        heads = (*x.shape[:2], cfg.n_head, cfg.n_embd // cfg.n_head)
        q, k, v = (part.reshape(heads) for part in jnp.split(fused, 3, axis=-1))
        k, v, keys, cache = through_cache(cache, k, v, positions, cfg.kv_cache_dtype)
        y = attention(q, k, v, causal_mask(positions, keys), scale)
        return _linear(cfg, cfg.n_embd, "c_proj")(y), cache


class MLP(nn.Module):
    """Feed-forward layer."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[batch, seq, d]` to the same."""
        cfg = self.config
        y = _linear(cfg, cfg.n_inner or 4 * cfg.n_embd, "c_fc")(x)
        return _linear(cfg, cfg.n_embd, "c_proj")(activation(cfg.activation_function)(y))


class Block(nn.Module):
    """Attention and feed-forward layer, each behind a norm and around a residual."""

    config: GPT2Config

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, scale: float | Array, cache: Any
    ) -> tuple[Array, Any]:
        """`[batch, seq, d]` to the same, tagged `hidden`, and the updated cache."""
        y = _norm(self.config, "input_norm")(x)
        y, cache = Attention(self.config, name="attn")(y, positions, scale, cache)
        x = x + y
        x = x + MLP(self.config, name="mlp")(_norm(self.config, "post_attention_norm")(x))
        return checkpoint_name(x, "hidden"), cache


class GPT2(nn.Module):
    """Token ids `[batch, seq]` to logits `[batch, seq, vocab]`."""

    config: GPT2Config

    def setup(self) -> None:
        cfg = self.config
        self.embed = Embedding(cfg.vocab_size, cfg.n_embd, cfg.dtype, cfg.param_dtype)
        self.positions = Embedding(cfg.n_positions, cfg.n_embd, cfg.dtype, cfg.param_dtype)
        self.layers = block_stack(Block, cfg, cfg.scales)
        self.final_norm = _norm(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = Linear(cfg.vocab_size, False, cfg.dtype, cfg.param_dtype)

    def __call__(self, ids: Array, cache: Any = None, index: Array | int = 0) -> Any:
        """Logits; with a cache `(logits, cache)`, the ids standing at `index` and after."""
        x, new = self._trunk(ids, cache, index)
        logits = self.head(x)
        return logits if cache is None else (logits, new)

    def trunk(self, ids: Array) -> Array:
        """Token ids to the last hidden states, `[batch, seq, d]`."""
        return self._trunk(ids, None, 0)[0]

    def _trunk(self, ids: Array, cache: Any, index: Array | int) -> tuple[Array, Any]:
        positions = jnp.arange(ids.shape[1]) + index
        settings = stack_settings(self.config, self.config.scales)
        return self.layers(self.embed_ids(ids, index), positions, settings, cache)

    def embed_ids(self, ids: Array, index: Array | int = 0) -> Array:
        """Token ids, the first at position `index`, to the first hidden states."""
        if ids.shape[1] > self.config.n_positions:
            raise InputError(
                f"{ids.shape[1]} tokens exceed the {self.config.n_positions} positions of the model"
            )
        return self.embed(ids) + self.positions(jnp.arange(ids.shape[1]) + index)

    def head(self, x: Array) -> Array:
        """Last hidden states to logits."""
        x = self.final_norm(x)
        return self.embed.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)


@functools.lru_cache(maxsize=64)
def build(config: GPT2Config) -> Functions:
    """The pure functions of GPT-2; equal configs give the same function objects."""
    module = GPT2(config)

    def apply(params: Any, ids: Array) -> Any:
        return module.apply({"params": params}, ids)

    def apply_cached(params: Any, ids: Array, cache: Any, index: Array) -> Any:
        return module.apply({"params": params}, ids, cache, index)

    def block(params: Any, hidden: Array) -> Array:
        positions = jnp.arange(hidden.shape[1])
        out, _ = Block(config).apply({"params": params}, hidden, positions, config.scales[0], None)
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
        blocks=blocks if len(set(config.scales)) == 1 else None,
        apply_cached=apply_cached,
        init_cache=lambda batch, length: empty_cache(
            config,
            config.n_layer,
            (batch, length, config.n_head, config.n_embd // config.n_head),
            config.kv_cache_dtype,
        ),
    )


def name_map(config: GPT2Config) -> NameMap:
    """The table between parameters and tensors of a Hugging Face checkpoint."""
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    rows = [
        Parameter(
            "embed/embedding",
            "transformer.wte.weight",
            "embedding",
            ("vocab", "embed"),
            aliases=tied,
        ),
        Parameter("positions/embedding", "transformer.wpe.weight", "embedding", (None, "embed")),
    ]
    for layer in range(config.n_layer):
        rows += _layer_rows(layer)
    rows += _norm_rows("final_norm", "transformer.ln_f")
    if not config.tie_word_embeddings:
        rows.append(
            Parameter("lm_head/kernel", "lm_head.weight", "head", ("embed", "vocab"), (1, 0))
        )
    return NameMap(tuple(rows), prefix="transformer.")


def _layer_rows(layer: int) -> list[Parameter]:
    ours, theirs = f"layers/{layer}", f"transformer.h.{layer}"

    def linear(path: str, name: str, axes: tuple[str, str]) -> list[Parameter]:
        # Conv1D stores [in, out] as we do.
        return [
            Parameter(f"{ours}/{path}/kernel", f"{theirs}.{name}.weight", "linear", axes),
            Parameter(f"{ours}/{path}/bias", f"{theirs}.{name}.bias", "bias", axes[1:]),
        ]

    return [
        *_norm_rows(f"{ours}/input_norm", f"{theirs}.ln_1"),
        *linear("attn/c_attn", "attn.c_attn", ("embed", "heads")),
        *linear("attn/c_proj", "attn.c_proj", ("heads", "embed")),
        *_norm_rows(f"{ours}/post_attention_norm", f"{theirs}.ln_2"),
        *linear("mlp/c_fc", "mlp.c_fc", ("embed", "mlp")),
        *linear("mlp/c_proj", "mlp.c_proj", ("mlp", "embed")),
    ]


def _norm_rows(path: str, name: str) -> list[Parameter]:
    return [
        Parameter(f"{path}/scale", f"{name}.weight", "norm", ("embed",)),
        Parameter(f"{path}/bias", f"{name}.bias", "norm", ("embed",)),
    ]


def _linear(config: GPT2Config, features: int, name: str) -> Linear:
    return Linear(features, True, config.dtype, config.param_dtype, name=name)


def _norm(config: GPT2Config, name: str | None = None) -> LayerNorm:
    return LayerNorm(config.layer_norm_epsilon, True, config.dtype, config.param_dtype, name=name)
