"""Layers that the reference models share.

Weights enter the computation through products, convolutions and gathers only, at most after a
cast: so compressed arrays in their place never have to be made dense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxcompress.core.activations import batch_split, rows_whole
from jaxcompress.core.errors import InputError
from jaxcompress.models.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
NO_WINDOW = 2**30


def activation(name: str) -> Callable[[Array], Array]:
    """The activation of that name in transformers.

    Raises:
      InputError: a name that is not known.
    """
    if name not in ACTIVATIONS:
        raise InputError(f"config: activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def product(subscripts: str, x: Array, weight: Array) -> Array:
    """An einsum that is summed in float32, in the dtype of `x`.

    Its gradients are summed in float32 too, over a batch that is spread over devices as well.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(subscripts, x, weight, preferred_element_type=dtype).astype(x.dtype)


def wide(x: Array) -> Array:
    """Half precision as float32: what is added to or scales a whole batch has its gradient there.

    One sum or product of half precision, made in float32 and rounded, is the same bits.
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Linear(nn.Module):
    """`x @ kernel (+ bias)` with a kernel `[in, out]`."""

    features: int
    use_bias: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., in]` to `[..., features]`."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
        y = product("...k,kn->...n", batch_split(x), kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape[1:], self.param_dtype)
            y = (wide(y) + wide(bias.astype(self.dtype))).astype(y.dtype)
        return batch_split(y)


class Embedding(nn.Module):
    """A table `[entries, features]`, read by rows or, tied, multiplied as the output layer."""

    entries: int
    features: int
    dtype: str = "float32"
    param_dtype: str = "float32"

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding",
            nn.initializers.normal(0.02),
            (self.entries, self.features),
            self.param_dtype,
        )

    def __call__(self, ids: Array) -> Array:
        """Rows of the table, `[..., features]`; NaN for an index beyond the table."""
        rows = jnp.take(rows_whole(self.embedding), ids, axis=0).astype(self.dtype)
        return batch_split(rows) if ids.ndim > 1 else rows  # positions have no batch

    def attend(self, x: Array) -> Array:
        """`[..., features]` to logits `[..., entries]`."""
        x = batch_split(x)
        return batch_split(product("...d,vd->...v", x, self.embedding.astype(self.dtype)))


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467), in float32."""

    epsilon: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., features]`, normalised over the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (wide(y.astype(self.dtype)) * wide(scale.astype(self.dtype))).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016, arXiv:1607.06450), in float32."""

    epsilon: float = 1e-5
    use_bias: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., features]`, normalised over the last axis."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        y = y * scale.astype(jnp.float32)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
            y = y + bias.astype(jnp.float32)
        return y.astype(self.dtype)


def causal_mask(queries: Array, keys: Array, window: int | Array | None = None) -> Array:
    """`[seq, keys]`, True where a query sees a key: not later, and nearer than `window`.

    Args:
      queries: positions of the queries, `[seq]`.
      keys: positions of the keys, `[keys]`.
      window: how many positions back, itself included, a query sees; None: all.
    """
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def attention(q: Array, k: Array, v: Array, mask: Array | None, scale: float | Array) -> Array:
    """Softmax attention; key and value heads may be fewer than query heads (GQA).

    The weights are tagged `attention_weights`, `[batch, heads, seq, keys]`.

    Args:
      q: `[batch, seq, heads, head_dim]`.
      k: `[batch, keys, kv_heads, head_dim]`; v likewise.
      mask: True where a query sees a key, `[seq, keys]` or anything else that broadcasts to
        `[batch, heads, seq, keys]`; or None.
      scale: factor of the scores.

    Returns:
      `[batch, seq, heads * head_dim]`.
    """
    batch, seq, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    # Queries that share a key head stand below each other: one plain product per key head, which
    # on a CPU takes two thirds of the time of the einsum over five axes.
    rows = heads // kv_heads * seq
    q = q.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, rows, head_dim)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkrd,bksd->bkrs", q, k).astype(jnp.float32) * scale
    scores = scores.reshape(batch, heads, seq, keys)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = checkpoint_name(weights, "attention_weights")
    weights = weights.reshape(batch, kv_heads, rows, keys)
    y = jnp.einsum("bkrs,bksd->bkrd", weights, v).reshape(batch, heads, seq, head_dim)
    return y.transpose(0, 2, 1, 3).reshape(batch, seq, heads * head_dim)


class _Unrolled(nn.Module):
    """Blocks one after another, children `0`, `1`, ..."""

    block: type[nn.Module]
    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Array, context: Any, settings: tuple[Any, ...], cache: Any
    ) -> tuple[Array, Any]:
        caches = []
        for index, setting in enumerate(settings):
            layer = self.block(self.config, name=str(index))
            x, new = layer(x, context, setting, None if cache is None else cache[index])
            caches.append(new)
        return x, None if cache is None else tuple(caches)


def block_stack(
    block: type[nn.Module], config: ModelConfig, settings: tuple[Any, ...]
) -> nn.Module:
    """All blocks of a model as one module, to be called `layers` by its owner.

    Called as `(x, context, stack_settings(config, settings), cache)`, it gives `(x, cache)`.

    Args:
      block: module class; `block(config)(x, context, setting, cache) -> (x, cache)`.
      config: its argument; `scan_layers`, `remat` and `remat_policy` are read here.
      settings: one number or None per block (attention window, scale).

    Raises:
      InputError: an unknown `remat_policy`.
    """
    if config.remat:
        policy = getattr(jax.checkpoint_policies, config.remat_policy, None)
        if policy is None:
            raise InputError(f"config: remat_policy {config.remat_policy!r} is unknown to JAX")
        block = nn.remat(block, policy=policy, prevent_cse=not config.scan_layers)
    if not config.scan_layers:
        return _Unrolled(block, config)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast if len(set(settings)) == 1 else 0, 0),
        length=len(settings),
    )
    return scanned(config)


def stack_settings(config: ModelConfig, settings: tuple[Any, ...]) -> Any:
    """What `block_stack` takes as its settings: as they are, one for all, or an array."""
    if not config.scan_layers:
        return settings
    if len(set(settings)) == 1:
        return settings[0]
    return jnp.asarray([NO_WINDOW if s is None else s for s in settings])
