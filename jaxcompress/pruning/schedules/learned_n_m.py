"""Learned n:m: which of the patterns every m weights take, drawn with Gumbel noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError
from jaxcompress.pruning.patterns import keep_n_of_m, parse_n_m
from jaxcompress.pruning.schedules.gates import (
    Gated,
    gated,
    seen_through,
    with_gates,
    without_gates,
)
from jaxcompress.pruning.schedules.targets import Targets
from jaxcompress.training.transform import Transform

SCALES = (1e2, 5e2)  # kappa of the paper, from the first step to the last
TEMPERATURES = (4.0, 0.05)  # tau
DEVIATION = 0.01  # of the logits in the beginning
MOST_PATTERNS = 1000


def learned_n_m(
    where: Targets,
    *,
    steps: int,
    pattern: str = "2:4",
    prior: float = 3.0,
    strength: float = 0.0,
    gate_rate: float = 1e-3,
    seed: int = 0,
) -> Transform:
    """MaskLLM: a distribution over the patterns of every m weights, learned by the loss.

    The loss sees each weight times the mean of the patterns under softmax((log p + Gumbel noise) /
    tau), p = softmax(kappa * logits); kappa rises and tau falls linearly. In the end the likeliest
    pattern stays.

    Source: Fang et al., "MaskLLM", arXiv:2409.17481, section 3.2.

    Args:
      where: what becomes n:m. Which entries are 0 is decided anew, whatever was 0 before.
      steps: over which kappa and tau change.
      pattern: n:m.
      prior: alpha of the paper, how much patterns that look like magnitude pruning are preferred in
        the beginning.
      strength: of the reward of large weights that stay, strength * sum (mask * w)^2.
      gate_rate: learning rate of Adam for the logits.
      seed: of the logits in the beginning.

    Raises:
      InputError: another pattern, one of too many possibilities, or one that does not divide a
        matrix.
    """
    parsed = parse_n_m(pattern)
    if parsed is None or math.comb(parsed[1], parsed[0]) > MOST_PATTERNS:
        raise InputError(f"pattern {pattern!r}: use n:m of at most {MOST_PATTERNS} possibilities")
    n, m = parsed
    patterns = jnp.asarray(all_patterns(n, m), jnp.float32)  # [patterns, m]

    def begin(path: str, matrix: Array) -> dict[str, Any]:
        key = jax.random.fold_in(jax.random.key(seed), sorted(where).index(path))
        kept = keep_n_of_m(jnp.abs(matrix), n, m).astype(jnp.float32)
        logits = starting_logits(kept, patterns, prior, key)
        state = jnp.zeros((*matrix.shape[:-2], 1, 1), jnp.float32)
        return {"gates": logits.reshape(*matrix.shape[:-1], -1), "state": state, "unit": m}

    def soft_mask(leaf: Gated, noise: Array) -> Array:
        assert leaf.state is not None
        logits = _by_group(leaf.gates, len(patterns))
        progress = jax.lax.stop_gradient(leaf.state)[..., None]
        kappa = SCALES[0] + (SCALES[1] - SCALES[0]) * progress
        tau = TEMPERATURES[0] + (TEMPERATURES[1] - TEMPERATURES[0]) * progress
        chosen = jax.nn.softmax((jax.nn.log_softmax(kappa * logits) + noise) / tau)
        return (chosen @ patterns).reshape(leaf.weight.shape)

    def sampled(leaf: Gated, key: Array) -> Array:
        noise = jax.random.gumbel(key, _by_group(leaf.gates, len(patterns)).shape)
        return leaf.weight * soft_mask(leaf, noise)

    def reward(leaves: Sequence[Gated]) -> Array:
        kept = [leaf.weight * soft_mask(leaf, jnp.float32(0)) for leaf in leaves]
        return -strength * sum((jnp.square(x).sum() for x in kept), start=jnp.float32(0))

    def final(leaf: Gated) -> Array:
        best = _by_group(leaf.gates, len(patterns)).argmax(-1)
        return jnp.where(patterns[best].reshape(leaf.weight.shape) > 0, leaf.weight, 0)

    def progress(path: str, gates: Array, step: Array) -> Array:
        done = jnp.minimum((step + 1) / max(steps - 1, 1), 1)
        return jnp.full((*gates.shape[:-2], 1, 1), done, jnp.float32)

    return Transform(
        optimizer=lambda inner: gated(inner, optax.adam(gate_rate), progress),
        objective=seen_through(where, sampled, reward if strength else None),
        begin=lambda params: with_gates(params, where, begin),
        end=lambda params: without_gates(params, final),
        paths=tuple(where),
    )


def all_patterns(n: int, m: int) -> np.ndarray:
    """The masks that keep n of m, bool `[m choose n, m]`."""
    chosen = list(itertools.combinations(range(m), n))
    masks = np.zeros((len(chosen), m), bool)
    for row, kept in zip(masks, chosen, strict=True):
        row[list(kept)] = True
    return masks


def starting_logits(mask: Array, patterns: Array, prior: float, key: Array) -> Array:
    """Logits `[*lead, N, K/m, patterns]`: noise, and more where a pattern is like the mask.

    logits += prior * std(logits) * (overlap - mean overlap).
    """
    groups = mask.reshape(*mask.shape[:-1], -1, patterns.shape[-1])
    overlap = groups @ patterns.T
    overlap -= overlap.mean(-1, keepdims=True)
    logits = DEVIATION * jax.random.normal(key, overlap.shape)
    return logits + prior * DEVIATION * overlap


def _by_group(gates: Array, patterns: int) -> Array:
    """`[*lead, N, K/m, patterns]`."""
    return gates.reshape(*gates.shape[:-1], -1, patterns)
