"""Small networks that are cut: reference models, one in plain JAX, one of a third-party library."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.model import Model
from jaxcompress.models import (
    DecoderConfig,
    EncoderConfig,
    GPT2Config,
    LSTMConfig,
    MobileNetConfig,
    ResNetConfig,
    TransformerDecoderConfig,
    VGGConfig,
    build_model,
)

VOCAB = 50
CONFIGS = {
    "llama": DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
    ),
    "llama_scan": DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        scan_layers=True,
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=24, n_layer=2, n_head=4),
    "decoder": TransformerDecoderConfig(
        vocab_size=VOCAB,
        d_model=24,
        num_heads=4,
        dim_feedforward=40,
        num_hidden_layers=1,
        max_positions=16,
    ),
    "encoder": EncoderConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=6,
        intermediate_size=40,
        max_position_embeddings=16,
        pooler=False,
    ),
    "lstm": LSTMConfig(vocab_size=VOCAB, embedding_dim=10, hidden_size=12, num_hidden_layers=2),
    "resnet_a": ResNetConfig(stage_sizes=(1, 2), widths=(8, 16), shortcut="A"),
    "resnet_b": ResNetConfig(stage_sizes=(1, 2), widths=(8, 16), shortcut="B"),
    "vgg": VGGConfig(layers=(8, "M", 12, "M"), hidden=(16,), pool_size=2),
    "mobilenet": MobileNetConfig(
        stem_width=8,
        stem_stride=1,
        expanded=(0, 24, 24),
        widths=(8, 12, 12),
        strides=(1, 2, 1),
        last_width=20,
        num_classes=10,
    ),
}


def scrambled(tree: Any, seed: int = 0) -> Any:
    """Biases, norms and running statistics far from their initial values."""
    rng = np.random.default_rng(seed)

    def one(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.ndim > 1:
            return leaf
        noise = rng.standard_normal(leaf.shape)
        if name.endswith("var"):
            noise = rng.uniform(0.5, 1.5, leaf.shape)
        elif name.endswith("scale"):
            noise = 1 + 0.3 * noise
        else:
            noise = 0.3 * noise
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


@functools.lru_cache(maxsize=32)
def reference(name: str) -> Model:
    """A reference model with weights that are far from special."""
    model = build_model(CONFIGS[name], seed=3)
    return model.replace(params=scrambled(model.params))


def inputs_of(model: Model, samples: int = 4, length: int = 7, seed: int = 1) -> np.ndarray:
    """Token ids or images for a reference model."""
    rng = np.random.default_rng(seed)
    if hasattr(model.config, "vocab_size"):
        return rng.integers(0, VOCAB, (samples, length)).astype(np.int32)
    return rng.standard_normal((samples, 8, 8, 3)).astype(np.float32)


# ---------------------------------------------------------------- networks with nothing of ours


def plain_shapes(width: int = 12, heads: int = 3, hidden: int = 20, layers: int = 2) -> Any:
    block = {
        "norm": (width,),
        "wqkv": (width, 3 * heads * 4),
        "wo": (heads * 4, width),
        "w1": (width, hidden),
        "b1": (hidden,),
        "w2": (hidden, width),
        "b2": (width,),
    }
    return {"table": (VOCAB, width), "layers": [block] * layers, "out": (width, VOCAB)}


def plain(params: Any, ids: Any) -> Any:
    """A transformer as somebody else may write it: fused qkv, relu, no class and no config."""
    x = params["table"][ids]
    length = ids.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))
    for w in params["layers"]:
        y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * w["norm"]
        qkv = (y @ w["wqkv"]).reshape(*y.shape[:2], 3, -1, 4)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2.0
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = x + mixed.reshape(*y.shape[:2], -1) @ w["wo"]
        x = x + jax.nn.relu(x @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"]
    return x @ params["out"]


def drawn(shapes: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)

    def one(shape: tuple[int, ...]) -> Any:
        fan = shape[0] if len(shape) > 1 else 4
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan), jnp.float32)

    return jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, tuple))


def plain_model() -> Model:
    """A stranger's network: a function and its parameters."""
    return Model(plain, drawn(plain_shapes()))


def equinox_model() -> Model:
    """A network of Equinox modules; `apply` takes its arrays."""
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 5)

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        norm: eqx.nn.LayerNorm
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __call__(self, x: Any) -> Any:
            y = jax.vmap(self.norm)(x)
            x = x + self.attention(y, y, y)
            return x + jax.vmap(lambda t: self.down(jax.nn.relu(self.up(t))))(x)

    class Network(eqx.Module):
        inp: eqx.nn.Linear
        block: Block
        out: eqx.nn.Linear

        def __call__(self, x: Any) -> Any:
            return jax.vmap(self.out)(self.block(jax.vmap(self.inp)(x)))

    network = Network(
        eqx.nn.Linear(5, 12, key=keys[0]),
        Block(
            eqx.nn.MultiheadAttention(3, 12, key=keys[1]),
            eqx.nn.LayerNorm(12),
            eqx.nn.Linear(12, 20, key=keys[2]),
            eqx.nn.Linear(20, 12, key=keys[3]),
        ),
        eqx.nn.Linear(12, 4, key=keys[4]),
    )
    params, static = eqx.partition(network, eqx.is_array)

    def apply(params: Any, x: Any) -> Any:
        return jax.vmap(eqx.combine(params, static))(x)

    return Model(apply, params)


def close(got: Any, want: Any, tolerance: float = 1e-4) -> None:
    """Equal up to the tolerance of the largest entry."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6)
