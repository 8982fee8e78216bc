"""L0 by hard-concrete gates: a penalty on how many weights, rows or columns there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError
from jaxcompress.pruning.schedules.gates import (
    Gated,
    gated,
    seen_through,
    with_gates,
    without_gates,
)
from jaxcompress.pruning.schedules.targets import Targets
from jaxcompress.training.transform import Transform

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # temperature and ends of the stretched interval, section 2.1


def hard_concrete(
    where: Targets,
    *,
    strength: float = 1.0,
    groups: str = "weights",
    start: float = 0.9,
    gate_rate: float = 1e-2,
) -> Transform:
    """Every weight, row or column is multiplied by a random gate, which learns to be 0 or 1.

    The loss grows by strength * the expected share of weights that are not 0. In the end a gate is
    what `final_gate` says, and multiplied into the weights.

    Source: Louizos et al., "Learning Sparse Neural Networks through L0 Regularization",
    arXiv:1712.01312, equations 9 to 13.

    Args:
      where: what is pruned. Which entries are 0 is decided anew, whatever was 0 before.
      strength: lambda, of the share.
      groups: what has a gate: "weights", "rows" or "columns".
      start: sigmoid(log alpha) in the beginning, near 1: nearly all gates open.
      gate_rate: learning rate of Adam for the gates.

    Raises:
      InputError: a number out of range, or unknown groups.
    """
    if groups not in ("weights", "rows", "columns"):
        raise InputError(f"groups {groups!r}: use weights, rows or columns")
    if not 0 < start < 1 or strength < 0:
        raise InputError(f"start {start}, strength {strength}: between 0 and 1, and 0 or more")

    def begin(path: str, matrix: Array) -> dict[str, Any]:
        *lead, n, k = matrix.shape
        shape = {"weights": (n, k), "rows": (n, 1), "columns": (1, k)}[groups]
        return {"gates": jnp.full((*lead, *shape), math.log(start / (1 - start)), jnp.float32)}

    def sampled(leaf: Gated, key: Array) -> Array:
        tiny = jnp.finfo(jnp.float32).tiny
        drawn = jax.random.uniform(key, leaf.gates.shape, minval=tiny)
        return leaf.weight * gate(leaf.gates, drawn)

    def penalty(leaves: Sequence[Gated]) -> Array:
        each = [open_probability(x.gates).mean() * x.weight.size for x in leaves]
        return strength * jnp.stack(each).sum() / sum(leaf.weight.size for leaf in leaves)

    def final(leaf: Gated) -> Array:
        return leaf.weight * final_gate(leaf.gates)

    return Transform(
        optimizer=lambda inner: gated(inner, optax.adam(gate_rate)),
        objective=seen_through(where, sampled, penalty),
        begin=lambda params: with_gates(params, where, begin),
        end=lambda params: without_gates(params, final),
        paths=tuple(where),
    )


def gate(log_alpha: Array, drawn: Array) -> Array:
    """A sample of the gate from one of the uniform distribution: equations 10 and 11."""
    concrete = jax.nn.sigmoid((jnp.log(drawn) - jnp.log1p(-drawn) + log_alpha) / BETA)
    return jnp.clip(concrete * (ZETA - GAMMA) + GAMMA, 0, 1)


def open_probability(log_alpha: Array) -> Array:
    """The probability that a gate is not 0: equation 12."""
    return jax.nn.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def final_gate(log_alpha: Array) -> Array:
    """The gate without its noise: equation 13."""
    return jnp.clip(jax.nn.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)
