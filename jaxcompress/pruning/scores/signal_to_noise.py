"""Signal to noise of the gradient."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array


def signal_to_noise(weight: Array, gradient: Array, gradient_variance: Array) -> Array:
    """Signal to noise: the weights go about which the batches disagree most.

    The squared mean of the gradient over its variance: high where every batch pulls the same way,
    which is what generalizes and trains stably; low where the gradient is noise of the batch. A
    factor in front of the weight changes nothing, so it does not see how large the weight is.

    Source: Liu et al., "Understanding Why Neural Networks Generalize Well Through GSNR of
    Parameters", arXiv:2001.07384, section 2.

    Args:
      weight: `[*lead, N, K]`.
      gradient: mean over the batches, `[*lead, N, K]`.
      gradient_variance: its variance over the batches, `[*lead, N, K]`.
    """
    noisy = gradient_variance > 0
    return jnp.where(noisy, jnp.square(gradient) / jnp.where(noisy, gradient_variance, 1), 0)
