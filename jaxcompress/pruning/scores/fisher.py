"""Fisher: the second order of Optimal Brain Damage."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array


def fisher(weight: Array, squared_gradient: Array) -> Array:
    """Fisher pruning (Optimal Brain Damage): the least increase of the loss, to second order.

    w^2 F / 2, the mean squared gradient F in the place of the Hessian's diagonal, to which it is
    equal in expectation where the model fits its data.

    Source: LeCun et al., "Optimal Brain Damage", NIPS 1989, section 2; F: Theis et al., "Faster
    gaze prediction with dense networks and Fisher pruning", arXiv:1801.05787, section 2.

    Args:
      weight: `[*lead, N, K]`.
      squared_gradient: mean over sequences of the squared gradient, `[*lead, N, K]`.
    """
    return jnp.square(weight) * squared_gradient / 2
