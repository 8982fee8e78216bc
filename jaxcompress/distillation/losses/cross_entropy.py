"""The hard loss: cross entropy with the right class."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-log softmax(logits)[label].

    The label's logit is picked by a comparison rather than a gather: where the classes are split
    over devices, each then needs its own piece only, and the gradient is no scatter.

    Args:
      logits: `[..., classes]`.
      labels: int `[...]`.

    Returns:
      Nats, `[...]`, in float32 or wider; NaN for a label that is no class.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    classes = logits.shape[-1]
    is_label = jnp.arange(classes) == labels[..., None]
    picked = jnp.where(is_label, logits, 0).sum(-1)
    picked = jnp.where((labels >= 0) & (labels < classes), picked, jnp.nan)
    return jax.nn.logsumexp(logits, axis=-1) - picked
