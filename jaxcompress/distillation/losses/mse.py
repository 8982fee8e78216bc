"""Squared difference of logits."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def mse(student: Array, teacher: Array) -> Array:
    """Mean over the classes of the squared difference of the logits.

    The mean over all rows is `torch.nn.functional.mse_loss`.

    Source: Ba and Caruana, "Do Deep Nets Really Need to be Deep?", arXiv:1312.6184, section 2.2.

    Args:
      student: logits `[..., classes]`.
      teacher: logits `[..., classes]`.

    Returns:
      `[...]`, in float32 or wider.
    """
    dtype = jnp.promote_types(student.dtype, jnp.float32)
    return jnp.square(student.astype(dtype) - teacher.astype(dtype)).mean(-1)
