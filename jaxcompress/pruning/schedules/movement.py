"""Movement pruning: weights that training moves away from 0 stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError
from jaxcompress.pruning.patterns import Scope, check_sparsity, keep_counted, removed_count
from jaxcompress.pruning.schedules.gates import (
    Gated,
    gated,
    seen_through,
    with_gates,
    without_gates,
)
from jaxcompress.pruning.schedules.gradual import cubic
from jaxcompress.pruning.schedules.targets import Targets
from jaxcompress.training.transform import Transform


def movement(
    where: Targets,
    *,
    sparsity: float,
    begin: int,
    end: int,
    interval: int,
    scope: Scope = "layer",
    score_rate: float = 1.0,
) -> Transform:
    """Hard movement pruning: the highest scores stay, fewer and fewer; a score is -sum rate g w.

    g is the gradient of the loss by the masked weight, which reaches the scores of removed weights
    too; these may come back. Scores begin at 0 and move by plain gradient descent: their scale
    decides nothing here.

    Source: Sanh et al., "Movement Pruning", arXiv:2005.07683, section 4.

    Args:
      where: what is pruned. Which entries are 0 is decided anew, whatever was 0 before.
      sparsity: in the end.
      begin: t_i, the step (counted from 0) after which pruning begins.
      end: the step after which the sparsity stays.
      interval: steps between two changes of the sparsity; masks change in every step.
      scope: what has the sparsity: every "layer" or every "row".
      score_rate: learning rate of the scores.

    Raises:
      InputError: a number out of range.
    """
    check_sparsity(sparsity)
    if interval < 1 or not 0 <= begin < end or scope == "global":
        raise InputError(
            f"begin {begin}, end {end}, interval {interval}, scope {scope!r}: 0 <= begin < end, an "
            "interval of 1 step or more, and scope layer or row"
        )
    sparsities = cubic(0.0, sparsity, (end - begin) // interval)

    def state(path: str, scores: Array, step: Array) -> Array:
        index = jnp.clip((step - begin) // interval, 0, len(sparsities) - 1)
        return _highest(scores, sparsities, index, scope).astype(jnp.float32)

    def final(leaf: Gated) -> Array:
        return _masked(leaf, leaf.state)

    return Transform(
        optimizer=lambda inner: gated(inner, optax.sgd(score_rate), state),
        objective=seen_through(where, lambda leaf, key: _straight_through(leaf, leaf.state)),
        begin=lambda params: with_gates(params, where, _begin),
        end=lambda params: without_gates(params, final),
        paths=tuple(where),
    )


def soft_movement(
    where: Targets, *, threshold: float = 0.1, strength: float = 1.0, score_rate: float = 1e-2
) -> Transform:
    """Soft movement pruning: a weight stays while the sigmoid of its score is above a threshold.

    How many go is not asked but found: the penalty strength * mean sigmoid(scores) pulls all
    scores down.

    Source: Sanh et al., arXiv:2005.07683, section 4.

    Args:
      where: as of `movement`.
      threshold: tau.
      strength: lambda_mvp.
      score_rate: learning rate of Adam for the scores.

    Raises:
      InputError: a threshold outside of (0, 0.5): all scores begin at a sigmoid of 0.5.
    """
    if not 0 < threshold < 0.5 or strength < 0:
        raise InputError(
            f"threshold {threshold}, strength {strength}: between 0 and 0.5, and 0 or more"
        )

    def mask(leaf: Gated) -> Array:
        return (jax.nn.sigmoid(leaf.gates) > threshold).astype(jnp.float32)

    def penalty(leaves: Sequence[Gated]) -> Array:
        total = jnp.stack([jax.nn.sigmoid(leaf.gates).sum() for leaf in leaves]).sum()
        return strength * total / sum(leaf.gates.size for leaf in leaves)

    def begin(path: str, matrix: Array) -> dict[str, Any]:
        return {"gates": jnp.zeros(matrix.shape, jnp.float32)}

    return Transform(
        optimizer=lambda inner: gated(inner, optax.adam(score_rate)),
        objective=seen_through(
            where, lambda leaf, key: _straight_through(leaf, mask(leaf)), penalty
        ),
        begin=lambda params: with_gates(params, where, begin),
        end=lambda params: without_gates(params, lambda leaf: _masked(leaf, mask(leaf))),
        paths=tuple(where),
    )


def _begin(path: str, matrix: Array) -> dict[str, Any]:
    return {
        "gates": jnp.zeros(matrix.shape, jnp.float32),
        "state": jnp.ones(matrix.shape, jnp.float32),
    }


def _straight_through(leaf: Gated, mask: Array) -> Array:
    """The masked weight; the gradient of a score is that of the masked weight, times the weight."""
    weight, mask = leaf.weight, jax.lax.stop_gradient(mask)
    scores = leaf.gates - jax.lax.stop_gradient(leaf.gates)  # 0
    return weight * mask + scores * jax.lax.stop_gradient(weight)


def _masked(leaf: Gated, mask: Any) -> Array:
    return jnp.where(mask > 0, leaf.weight, 0)


def _highest(scores: Array, sparsities: Sequence[float], index: Array, scope: str) -> Array:
    *lead, n, k = scores.shape
    rows = n if scope == "row" else 1
    counts = [rows * removed_count(n * k // rows, s) for s in sparsities]
    removed = jnp.full(lead, jnp.asarray(counts, jnp.int32)[index])
    return keep_counted(scores, removed, scope=scope)
