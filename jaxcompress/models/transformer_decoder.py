"""The language model of tutorials around PyTorch's `nn.TransformerDecoder`.

    x = embedding(ids) + positions
    logits = fc(decoder(x, memory, tgt_mask=causal))

Vaswani et al. 2017 (arXiv:1706.03762): every block has causal self-attention, attention to a
memory, and a feed-forward layer. Without an encoder the memory is the embedded sequence itself,
or zeros. Parameters: `embed/embedding`, `positions/embedding` (learned ones),
`layers/0/{self_attn,cross_attn}/{q,k,v,o}_proj`, `layers/0/mlp/{up,down}_proj`,
`layers/0/norm{1,2,3}`, `final_norm` where there is one, `head`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
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
    causal_mask,
    stack_settings,
)
from jaxcompress.models.names import NameMap, Parameter


@dataclass(frozen=True)
class TransformerDecoderConfig(ModelConfig):
    """Architecture of the tutorial language model.

    Attributes:
      vocab_size: entries of the embedding and of the output.
      d_model: width.
      num_heads: attention heads.
      dim_feedforward: width of the feed-forward layers.
      num_hidden_layers: number of blocks.
      activation: "relu" or "gelu".
      norm_first: norms before the sublayers (pre-norm) rather than after.
      layer_norm_epsilon: added to the variance.
      bias: projections and norms of the blocks have biases.
      output_bias: so has the output.
      final_norm: a norm after the last block (`nn.TransformerDecoder(..., norm=...)`).
      positions: "learned" or "sinusoidal".
      max_positions: entries of the learned positions.
      scale_embedding: multiply embeddings by sqrt(d_model) (Vaswani et al., section 3.4).
      memory: "embedded": the embedded sequence; "zeros".
      causal_memory: attention to the memory is causal too (`memory_mask`); without it an
        "embedded" memory shows every position the whole sequence.
      names: what the checkpoint calls embedding, positions, decoder and output.
    """

    model_type: str = "transformer_decoder"
    vocab_size: int = 1000
    d_model: int = 128
    num_heads: int = 4
    dim_feedforward: int = 2048
    num_hidden_layers: int = 2
    activation: str = "relu"
    norm_first: bool = False
    layer_norm_epsilon: float = 1e-5
    bias: bool = True
    output_bias: bool = True
    final_norm: bool = False
    positions: str = "learned"
    max_positions: int = 512
    scale_embedding: bool = False
    memory: str = "embedded"
    causal_memory: bool = False
    names: tuple[str, ...] = ("embedding", "pos_embedding", "decoder", "fc")

    def __post_init__(self) -> None:
        for field, allowed in {
            "activation": ("relu", "gelu"),
            "positions": ("learned", "sinusoidal"),
            "memory": ("embedded", "zeros"),
        }.items():
            if getattr(self, field) not in allowed:
                raise InputError(
                    f"config: {field} {getattr(self, field)!r} must be one of {', '.join(allowed)}"
                )
        if self.d_model % self.num_heads:
            raise InputError(
                f"config: d_model {self.d_model} is no multiple of num_heads {self.num_heads}"
            )

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.num_hidden_layers

    @property
    def max_length(self) -> int | None:
        """The longest sequence that has positions."""
        return self.max_positions if self.positions == "learned" else None

    def take_layers(self, indices: tuple[int, ...]) -> TransformerDecoderConfig:
        """The config of the network that keeps these blocks, in this order."""
        return dataclasses.replace(self, num_hidden_layers=len(indices))


class Hidden(NamedTuple):
    """What goes from block to block: hidden states and memory, both `[batch, seq, d]`."""

    x: Array
    memory: Array


class Attention(nn.Module):
    """`nn.MultiheadAttention`: queries from `x`, keys and values from `source`."""

    config: TransformerDecoderConfig

    @nn.compact
    def __call__(self, x: Array, source: Array, mask: Array | None) -> Array:
        """`[batch, seq, d]` and `[batch, keys, d]` to `[batch, seq, d]`."""
        cfg = self.config
        head_dim = cfg.d_model // cfg.num_heads

        def project(name: str, y: Array) -> Array:
            y = _linear(cfg, cfg.d_model, f"{name}_proj")(y)
            return y.reshape(*y.shape[:2], cfg.num_heads, head_dim)

        q, k, v = project("q", x), project("k", source), project("v", source)
        return _linear(cfg, cfg.d_model, "o_proj")(attention(q, k, v, mask, head_dim**-0.5))


class MLP(nn.Module):
    """`linear2(activation(linear1(x)))`."""

    config: TransformerDecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[batch, seq, d]` to the same."""
        y = _linear(self.config, self.config.dim_feedforward, "up_proj")(x)
        return _linear(self.config, self.config.d_model, "down_proj")(
            activation(self.config.activation)(y)
        )


class Block(nn.Module):
    """`nn.TransformerDecoderLayer`."""

    config: TransformerDecoderConfig

    @nn.compact
    def __call__(
        self, hidden: Hidden, mask: Array, setting: None, cache: None
    ) -> tuple[Hidden, None]:
        """Hidden states and memory to the same; the hidden states are tagged `hidden`."""
        cfg = self.config
        x, memory = hidden
        memory_mask = mask if cfg.causal_memory else None
        self_attn, cross_attn = Attention(cfg, name="self_attn"), Attention(cfg, name="cross_attn")
        sublayers: tuple[Callable[[Array], Array], ...] = (
            lambda y: self_attn(y, y, mask),
            lambda y: cross_attn(y, memory, memory_mask),
            MLP(cfg, name="mlp"),
        )
        for index, sublayer in enumerate(sublayers, 1):
            norm = _norm(cfg, f"norm{index}")
            x = x + sublayer(norm(x)) if cfg.norm_first else norm(x + sublayer(x))
        return Hidden(checkpoint_name(x, "hidden"), memory), None


class TransformerDecoder(nn.Module):
    """Token ids `[batch, seq]` to logits `[batch, seq, vocab]`."""

    config: TransformerDecoderConfig

    def setup(self) -> None:
        cfg = self.config
        self.embed = Embedding(cfg.vocab_size, cfg.d_model, cfg.dtype, cfg.param_dtype)
        if cfg.positions == "learned":
            self.positions = Embedding(cfg.max_positions, cfg.d_model, cfg.dtype, cfg.param_dtype)
        self.layers = block_stack(Block, cfg, (None,) * cfg.num_hidden_layers)
        if cfg.final_norm:
            self.final_norm = _norm(cfg)
        self.head = Linear(cfg.vocab_size, cfg.output_bias, cfg.dtype, cfg.param_dtype)

    def __call__(self, ids: Array) -> Array:
        """Logits."""
        settings = stack_settings(self.config, (None,) * self.config.num_hidden_layers)
        mask = square_mask(ids.shape[1])
        hidden, _ = self.layers(self.embed_ids(ids), mask, settings, None)
        return self.logits(hidden)

    def embed_ids(self, ids: Array) -> Hidden:
        """Token ids to the first hidden states and the memory."""
        cfg, seq = self.config, ids.shape[1]
        x = self.embed(ids)
        if cfg.scale_embedding:
            x = x * math.sqrt(cfg.d_model)
        if cfg.positions == "sinusoidal":
            x = x + jnp.asarray(sinusoids(seq, cfg.d_model), x.dtype)
        elif seq > cfg.max_positions:
            raise InputError(f"{seq} tokens exceed the {cfg.max_positions} positions of the model")
        else:
            x = x + self.positions(jnp.arange(seq))
        return Hidden(x, x if cfg.memory == "embedded" else jnp.zeros_like(x))

    def logits(self, hidden: Hidden) -> Array:
        """Last hidden states to logits."""
        return self.head(self.final_norm(hidden.x) if self.config.final_norm else hidden.x)


def square_mask(seq: int) -> Array:
    """The causal mask of a sequence, `[seq, seq]`."""
    return causal_mask(jnp.arange(seq), jnp.arange(seq))


def sinusoids(seq: int, features: int) -> np.ndarray:
    """Positions as sines and cosines, interleaved (Vaswani et al., section 3.5), `[seq, d]`."""
    rates = np.exp(np.arange(0, features, 2) * (-math.log(10000.0) / features))
    angles = np.arange(seq)[:, None] * rates
    table = np.zeros((seq, features), np.float32)
    table[:, 0::2] = np.sin(angles)
    table[:, 1::2] = np.cos(angles[:, : features // 2])
    return table


@functools.lru_cache(maxsize=64)
def build(config: TransformerDecoderConfig) -> Functions:
    """The pure functions of the model; equal configs give the same function objects."""
    module = TransformerDecoder(config)

    def apply(params: Any, ids: Array) -> Any:
        return module.apply({"params": params}, ids)

    def block(params: Any, hidden: Hidden) -> Any:
        mask = square_mask(hidden.x.shape[1])
        return Block(config).apply({"params": params}, hidden, mask, None, None)[0]

    return Functions(
        apply=apply,
        init=lambda key: module.init(key, jnp.zeros((1, 1), jnp.int32))["params"],
        blocks=Blocks(
            embed=lambda params, ids: module.apply({"params": params}, ids, method="embed_ids"),
            block=block,
            head=lambda params, hidden: module.apply({"params": params}, hidden, method="logits"),
        ),
    )


def name_map(config: TransformerDecoderConfig) -> NameMap:
    """The table between parameters and the `state_dict` of the PyTorch model."""
    embedding, positions, decoder, output = config.names
    rows = [Parameter("embed/embedding", f"{embedding}.weight", "embedding", ("vocab", "embed"))]
    if config.positions == "learned":
        axes = (None, "embed")
        rows.append(Parameter("positions/embedding", f"{positions}.weight", "embedding", axes))
    for layer in range(config.num_hidden_layers):
        rows += _layer_rows(config, f"layers/{layer}", f"{decoder}.layers.{layer}")
    if config.final_norm:
        rows += _norm_rows(config, "final_norm", f"{decoder}.norm")
    rows.append(Parameter("head/kernel", f"{output}.weight", "head", ("embed", "vocab"), (1, 0)))
    if config.output_bias:
        rows.append(Parameter("head/bias", f"{output}.bias", "bias", ("vocab",)))
    return NameMap(tuple(rows))


def infer(shapes: Mapping[str, tuple[int, ...]], **settings: Any) -> dict[str, Any]:
    """The config of a `state_dict`; shapes do not tell `num_heads`, `norm_first`, `memory`, ...

    Raises:
      InputError: tensors that are not those of the model, or no `num_heads` in `settings`.
    """
    shapes = {name.removeprefix("module."): shape for name, shape in shapes.items()}
    found = {m[1] for n in shapes if (m := re.fullmatch(r"(.+)\.layers\.0\.norm3\.weight", n))}
    if len(found) != 1:
        raise InputError("checkpoint: no nn.TransformerDecoder in it (no layers.0.norm3.weight)")
    if "num_heads" not in settings:
        raise InputError("transformer_decoder: shapes do not tell the heads; pass num_heads=")
    decoder = found.pop()
    tables = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and not name.startswith(f"{decoder}.")
    ]
    if len(tables) not in (2, 3):
        raise InputError(f"checkpoint: embedding, positions and output expected, found {tables}")
    embedding, *learned, output = tables
    feedforward, d_model = shapes[f"{decoder}.layers.0.linear1.weight"]
    return {
        "model_type": "transformer_decoder",
        "vocab_size": shapes[f"{embedding}.weight"][0],
        "d_model": d_model,
        "dim_feedforward": feedforward,
        "num_hidden_layers": sum(name.endswith(".norm3.weight") for name in shapes),
        "bias": f"{decoder}.layers.0.linear1.bias" in shapes,
        "output_bias": f"{output}.bias" in shapes,
        "final_norm": f"{decoder}.norm.weight" in shapes,
        "positions": "learned" if learned else "sinusoidal",
        "max_positions": shapes[f"{learned[0]}.weight"][0] if learned else 512,
        "names": [embedding, learned[0] if learned else "positions", decoder, output],
    } | settings


def _layer_rows(config: TransformerDecoderConfig, ours: str, theirs: str) -> list[Parameter]:
    rows = []

    def linear(path: str, name: str, logical: tuple[str, str], part: Any = None) -> None:
        dot = "_" if part else "."  # in_proj_weight, but out_proj.weight
        for leaf, kind in (("kernel", "weight"), ("bias", "bias"))[: 1 + config.bias]:
            rows.append(
                Parameter(
                    f"{ours}/{path}/{leaf}",
                    f"{theirs}.{name}{dot}{kind}",
                    "linear" if leaf == "kernel" else "bias",
                    logical if leaf == "kernel" else logical[1:],
                    axes=(1, 0) if leaf == "kernel" else None,
                    part=part,
                )
            )

    for mine, name in (("self_attn", "self_attn"), ("cross_attn", "multihead_attn")):
        for index, p in enumerate("qkv"):
            linear(f"{mine}/{p}_proj", f"{name}.in_proj", ("embed", "heads"), (index, 3))
        linear(f"{mine}/o_proj", f"{name}.out_proj", ("heads", "embed"))
    linear("mlp/up_proj", "linear1", ("embed", "mlp"))
    linear("mlp/down_proj", "linear2", ("mlp", "embed"))
    for index in (1, 2, 3):
        rows += _norm_rows(config, f"{ours}/norm{index}", f"{theirs}.norm{index}")
    return rows


def _norm_rows(config: TransformerDecoderConfig, path: str, name: str) -> list[Parameter]:
    rows = [Parameter(f"{path}/scale", f"{name}.weight", "norm", ("embed",))]
    if config.bias:
        rows.append(Parameter(f"{path}/bias", f"{name}.bias", "norm", ("embed",)))
    return rows


def _linear(config: TransformerDecoderConfig, features: int, name: str) -> Linear:
    return Linear(features, config.bias, config.dtype, config.param_dtype, name=name)


def _norm(config: TransformerDecoderConfig, name: str | None = None) -> LayerNorm:
    return LayerNorm(
        config.layer_norm_epsilon, config.bias, config.dtype, config.param_dtype, name=name
    )
