"""KL divergence from the teacher's softened distribution to the student's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def kl(student: Array, teacher: Array, *, temperature: float = 2.0) -> Array:
    """KL(teacher || student) of both distributions at a temperature, times temperature^2.

    The factor keeps the size of the gradient whatever the temperature. The mean over all rows is
    what PyTorch calls "batchmean" once rows are flattened.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531,
    section 2.

    Args:
      student: logits `[..., classes]`.
      teacher: logits `[..., classes]`; -inf excludes a class.
      temperature: divides the logits of both.

    Returns:
      Nats, `[...]`, in float32 or wider.
    """
    dtype = jnp.promote_types(student.dtype, jnp.float32)
    logp = jax.nn.log_softmax(teacher.astype(dtype) / temperature)
    logq = jax.nn.log_softmax(student.astype(dtype) / temperature)
    p = jnp.exp(logp)
    # Where p is 0 the term is 0, though the difference may be inf - inf.
    terms = p * jnp.where(p > 0, logp - logq, 0)
    return terms.sum(-1) * temperature**2
