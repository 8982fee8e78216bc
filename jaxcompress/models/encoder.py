"""BERT (Devlin et al. 2018, arXiv:1810.04805), as transformers' `BertModel` computes it.

Also what sentence-transformers builds on. Parameters: `embed/embedding` `[vocab, d]`,
`positions/embedding`, `token_types/embedding`, `embed_norm/{scale,bias}`,
`layers/0/attn/{q,k,v,o}_proj/{kernel,bias}` `[in, out]`, `layers/0/attn_norm`,
`layers/0/mlp/{up,down}_proj`, `layers/0/mlp_norm`, and `pooler/{kernel,bias}` where there is one;
with `scan_layers` `layers/attn/...` carry a leading axis over the blocks.

`apply(params, ids, mask=None, token_types=None)` gives the last hidden states; with `pooled=True`
also what the pooler makes of the first position.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Blocks
from jaxcompress.models.config import ModelConfig
from jaxcompress.models.functions import Functions
from jaxcompress.models.layers import (
    Embedding,
    LayerNorm,
    Linear,
    activation,
    attention,
    block_stack,
    stack_settings,
)
from jaxcompress.models.names import NameMap, Parameter

POOLER = "pooler.dense.weight"


@dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """Architecture of BERT, in the names of its `config.json`.

    Attributes:
      head_dim: features per head. `BertModel` knows no such entry, for it `num_attention_heads *
        head_dim` is `hidden_size` always; another `head_dim` (heads were cut) is written all the
        same, and only this project reads it: see `stock_refusal` and `models.stock`.
      pooler: there is a pooler; left out of `config.json` where there is, as in transformers.
    """

    gives_logits: ClassVar[bool] = False

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    head_dim: int = 64
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pooler: bool = True

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.num_hidden_layers

    @property
    def max_length(self) -> int:
        """The longest sequence that has positions."""
        return self.max_position_embeddings

    @property
    def stock_refusal(self) -> str | None:
        """Why transformers cannot load this config; None: it can."""
        if self.num_attention_heads * self.head_dim == self.hidden_size:
            return None
        return (
            f"BertModel of transformers has heads that together are as wide as the residual stream "
            f"({self.hidden_size}), not {self.num_attention_heads} of {self.head_dim}"
        )

    def take_layers(self, indices: tuple[int, ...]) -> EncoderConfig:
        """The config of the network that keeps these blocks, in this order."""
        return dataclasses.replace(self, num_hidden_layers=len(indices))

    def to_hf(self) -> dict[str, Any]:
        """The `config.json`; heads for other tasks that a checkpoint had did not come along."""
        return {**super().to_hf(), "architectures": ["BertModel"]}

    def _fresh(self) -> dict[str, Any]:
        return {"model_type": "bert", "architectures": ["BertModel"]}

    @classmethod
    def _read(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        for name, wanted in (
            ("is_decoder", False),
            ("add_cross_attention", False),
            ("position_embedding_type", "absolute"),
        ):
            if config.get(name, wanted) not in (wanted, None):
                raise InputError(f"config: BERT with {name}={config[name]!r} is not supported")
        values = super()._read(config)
        width = values.get("hidden_size", cls.hidden_size)
        heads = values.get("num_attention_heads", cls.num_attention_heads)
        if not values.get("head_dim"):
            if width % heads:
                raise InputError(
                    f"config: hidden_size {width} is no multiple of num_attention_heads {heads}"
                )
            values["head_dim"] = width // heads
        return values


class Hidden(NamedTuple):
    """What goes from block to block: `[batch, seq, d]`, and which positions are no padding."""

    x: Array
    mask: Array | None = None


class Attention(nn.Module):
    """Multi-head attention of every position to every position that is no padding."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        """`[batch, seq, d]` and a mask `[batch, seq]` or None to `[batch, seq, d]`."""
        cfg = self.config

        def project(name: str) -> Array:
            y = _linear(cfg, cfg.num_attention_heads * cfg.head_dim, f"{name}_proj")(x)
            return y.reshape(*y.shape[:2], cfg.num_attention_heads, cfg.head_dim)

        seen = None if mask is None else mask[:, None, None, :] != 0
        y = attention(project("q"), project("k"), project("v"), seen, cfg.head_dim**-0.5)
        return _linear(cfg, cfg.hidden_size, "o_proj")(y)


class MLP(nn.Module):
    """Feed-forward layer."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[batch, seq, d]` to the same."""
        cfg = self.config
        y = _linear(cfg, cfg.intermediate_size, "up_proj")(x)
        return _linear(cfg, cfg.hidden_size, "down_proj")(activation(cfg.hidden_act)(y))


class Block(nn.Module):
    """Attention and feed-forward layer, a norm after each residual."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x: Array, mask: Array | None, setting: None, cache: None
    ) -> tuple[Array, None]:
        """`[batch, seq, d]` to the same, tagged `hidden`."""
        x = _norm(self.config, "attn_norm")(x + Attention(self.config, name="attn")(x, mask))
        x = _norm(self.config, "mlp_norm")(x + MLP(self.config, name="mlp")(x))
        return checkpoint_name(x, "hidden"), None


class Encoder(nn.Module):
    """Token ids `[batch, seq]` to hidden states `[batch, seq, d]`."""

    config: EncoderConfig

    def setup(self) -> None:
        cfg = self.config
        for name, entries in (
            ("embed", cfg.vocab_size),
            ("positions", cfg.max_position_embeddings),
            ("token_types", cfg.type_vocab_size),
        ):
            setattr(self, name, Embedding(entries, cfg.hidden_size, cfg.dtype, cfg.param_dtype))
        self.embed_norm = _norm(cfg)
        self.layers = block_stack(Block, cfg, (None,) * cfg.num_hidden_layers)
        if cfg.pooler:
            self.pooler = _linear(cfg, cfg.hidden_size)

    def __call__(
        self, ids: Array, mask: Array | None, token_types: Array | None, pooled: bool
    ) -> Any:
        """Hidden states, or with `pooled` `(hidden states, pooled [batch, d])`."""
        settings = stack_settings(self.config, (None,) * self.config.num_hidden_layers)
        x, _ = self.layers(self.embed_ids(ids, token_types), mask, settings, None)
        if not pooled:
            return x
        if not self.config.pooler:
            raise InputError("pooled: the checkpoint has no pooler; use the hidden states")
        return x, jnp.tanh(self.pooler(x[:, 0]))

    def embed_ids(self, ids: Array, token_types: Array | None) -> Array:
        """Token ids to the first hidden states; without token types all are of type 0."""
        seq = ids.shape[1]
        if seq > self.config.max_position_embeddings:
            raise InputError(
                f"{seq} tokens exceed the {self.config.max_position_embeddings} positions of "
                "the model"
            )
        types = jnp.zeros(1, jnp.int32) if token_types is None else token_types
        x = self.embed(ids) + self.token_types(types) + self.positions(jnp.arange(seq))
        return self.embed_norm(x)


@functools.lru_cache(maxsize=64)
def build(config: EncoderConfig) -> Functions:
    """The pure functions of an encoder; equal configs give the same function objects."""
    module, layer = Encoder(config), Block(config)

    def apply(
        params: Any,
        ids: Array,
        mask: Array | None = None,
        token_types: Array | None = None,
        *,
        pooled: bool = False,
    ) -> Any:
        return module.apply({"params": params}, ids, mask, token_types, pooled)

    def embed(
        params: Any, ids: Array, mask: Array | None = None, token_types: Array | None = None
    ) -> Any:
        x: Any = module.apply({"params": params}, ids, token_types, method="embed_ids")
        return Hidden(x, mask)

    def block(params: Any, hidden: Hidden) -> Any:
        x, _ = layer.apply({"params": params}, hidden.x, hidden.mask, None, None)
        return Hidden(x, hidden.mask)

    def init(key: Array) -> Any:
        ids = jnp.zeros((1, 1), jnp.int32)
        return module.init(key, ids, None, None, config.pooler)["params"]

    return Functions(apply, init, Blocks(embed, block, head=lambda params, hidden: hidden.x))


def name_map(config: EncoderConfig) -> NameMap:
    """The table between parameters and tensors of a Hugging Face checkpoint."""
    rows = [
        Parameter(f"{ours}/embedding", f"embeddings.{theirs}_embeddings.weight", "embedding", axes)
        for ours, theirs, axes in (
            ("embed", "word", ("vocab", "embed")),
            ("positions", "position", (None, "embed")),
            ("token_types", "token_type", (None, "embed")),
        )
    ]
    rows += _norm_rows("embed_norm", "embeddings")
    for layer in range(config.num_hidden_layers):
        rows += _layer_rows(f"layers/{layer}", f"encoder.layer.{layer}")
    if config.pooler:
        rows += _linear_rows("pooler", "pooler.dense", ("embed", "pooled"), "head")
    return NameMap(tuple(rows), wrappers=("bert.",))


def _layer_rows(ours: str, theirs: str) -> list[Parameter]:
    def linear(path: str, name: str, axes: tuple[str, str]) -> list[Parameter]:
        return _linear_rows(f"{ours}/{path}", f"{theirs}.{name}", axes)

    return [
        *linear("attn/q_proj", "attention.self.query", ("embed", "heads")),
        *linear("attn/k_proj", "attention.self.key", ("embed", "heads")),
        *linear("attn/v_proj", "attention.self.value", ("embed", "heads")),
        *linear("attn/o_proj", "attention.output.dense", ("heads", "embed")),
        *_norm_rows(f"{ours}/attn_norm", f"{theirs}.attention.output"),
        *linear("mlp/up_proj", "intermediate.dense", ("embed", "mlp")),
        *linear("mlp/down_proj", "output.dense", ("mlp", "embed")),
        *_norm_rows(f"{ours}/mlp_norm", f"{theirs}.output"),
    ]


def _linear_rows(
    path: str, name: str, axes: tuple[str, str], kind: Any = "linear"
) -> list[Parameter]:
    return [
        Parameter(f"{path}/kernel", f"{name}.weight", kind, axes, (1, 0)),
        Parameter(f"{path}/bias", f"{name}.bias", "bias", axes[1:]),
    ]


def _norm_rows(path: str, name: str) -> list[Parameter]:
    """A norm; checkpoints converted from TensorFlow call its parameters gamma and beta."""
    return [
        Parameter(
            f"{path}/{ours}",
            f"{name}.LayerNorm.{theirs}",
            "norm",
            ("embed",),
            aliases=(f"{name}.LayerNorm.{old}",),
        )
        for ours, theirs, old in (("scale", "weight", "gamma"), ("bias", "bias", "beta"))
    ]


def complete(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    """The config with what tensors tell and `config.json` does not: whether there is a pooler."""
    return dataclasses.replace(config, pooler=any(name.endswith(POOLER) for name in names))


def infer(shapes: Mapping[str, tuple[int, ...]], **settings: Any) -> dict[str, Any]:
    """The config of a `state_dict`; shapes do not tell the heads, nor the activation.

    Raises:
      InputError: tensors that are not those of BERT, or no `num_attention_heads` in `settings`.
    """
    shapes = {
        name.removeprefix("module.").removeprefix("bert."): shape for name, shape in shapes.items()
    }
    words, first = "embeddings.word_embeddings.weight", "encoder.layer.0"
    if words not in shapes or f"{first}.intermediate.dense.weight" not in shapes:
        raise InputError(f"checkpoint: not a BERT (no {words} and {first}.intermediate)")
    if "num_attention_heads" not in settings:
        raise InputError("bert: shapes do not tell the heads; pass num_attention_heads=")
    layers = {m[1] for name in shapes if (m := re.match(r"encoder\.layer\.(\d+)\.", name))}
    attention_width = shapes[f"{first}.attention.self.query.weight"][0]
    return {
        "model_type": "bert",
        "vocab_size": shapes[words][0],
        "hidden_size": shapes[words][1],
        "num_hidden_layers": len(layers),
        "head_dim": attention_width // settings["num_attention_heads"],
        "intermediate_size": shapes[f"{first}.intermediate.dense.weight"][0],
        "max_position_embeddings": shapes["embeddings.position_embeddings.weight"][0],
        "type_vocab_size": shapes["embeddings.token_type_embeddings.weight"][0],
        "pooler": POOLER in shapes,
    } | settings


def _linear(config: EncoderConfig, features: int, name: str | None = None) -> Linear:
    return Linear(features, True, config.dtype, config.param_dtype, name=name)


def _norm(config: EncoderConfig, name: str | None = None) -> LayerNorm:
    return LayerNorm(config.layer_norm_eps, True, config.dtype, config.param_dtype, name=name)
