"""SynFlow: synaptic flow."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array


def synflow(weight: Array, synflow: Array) -> Array:
    """SynFlow: the weights go that carry least of the flow from inputs to outputs; no labels.

    |w dR/d|w||, R the sum of the outputs of the network of absolute weights for an input of ones.
    The paper prunes in many small steps with scores made anew, which keeps whole layers from
    vanishing: give it a schedule.

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving
    synaptic flow", arXiv:2006.05467, equations 1 and 2 and algorithm 1.

    Args:
      weight: `[*lead, N, K]`.
      synflow: dR/d|w|, `[*lead, N, K]`.
    """
    return jnp.abs(weight * synflow)
