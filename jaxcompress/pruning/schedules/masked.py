"""`masked`: an optimizer under masks that change by a rule. Gradual pruning, SET, RigL.

What a mask removes is 0 in the parameters themselves, so the forward pass needs to know nothing of
masks, and the gradient of a removed weight is there for a rule to see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.paths import map_with_paths
from jaxcompress.pruning.patterns import (
    keep_counted,
    keep_highest,
    removed_count,
    unit_mask,
    unit_scores,
)
from jaxcompress.pruning.schedules.targets import (
    Matrices,
    Targets,
    matrices_of,
    with_matrices,
)
from jaxcompress.training.masks import LEAST_SPARSITY


class MaskedState(NamedTuple):
    """State of `masked`.

    Attributes:
      step: int32, steps taken.
      masks: bool, a tree like the parameters, True = kept; a single True where nothing is pruned.
      key: uint32 data of a random key.
      inner: state of the optimizer underneath.
    """

    step: Array
    masks: Any
    key: Array
    inner: Any


class Moment(NamedTuple):
    """What a rule sees: the step (counted from 0), masks, weights, dense gradients, a key."""

    step: Array
    masks: Matrices
    weights: Matrices
    gradients: Matrices
    key: Array


Rule = Callable[[Moment], Matrices]
Due = Callable[[Array], Array]


def masked(
    inner: optax.GradientTransformation,
    where: Targets,
    rule: Rule | None = None,
    due: Due = lambda step: jnp.bool_(False),
    *,
    instead: bool = False,
    seed: int = 0,
) -> optax.GradientTransformation:
    """An optimizer that sees and moves kept weights only; removed ones are exactly 0.

    A matrix that has zeros already begins with them as its mask. A weight that comes back begins
    at 0, with what its moments have decayed to.

    Args:
      inner: the optimizer underneath; its gradients are 0 where a weight is removed.
      where: what is pruned.
      rule: gives the new masks in a step that is due.
      due: of a step, counted from 0, whether the rule applies.
      instead: such a step moves no weight and no moment; otherwise the rule sees weights that the
        step has moved.
      seed: of the keys.
    """

    def init(params: Any) -> MaskedState:
        key = jax.random.key_data(jax.random.key(seed))
        return MaskedState(jnp.int32(0), starting_masks(params, where), key, inner.init(params))

    def update(gradients: Any, state: MaskedState, params: Any = None) -> tuple[Any, MaskedState]:
        kept = jax.tree.map(_at_mask, state.masks, gradients)
        updates, moments = inner.update(kept, state.inner, params)
        is_due = due(state.step)
        if instead:
            updates = jax.tree.map(lambda u: jnp.where(is_due, 0, u), updates)
            moments = jax.tree.map(lambda n, o: jnp.where(is_due, o, n), moments, state.inner)
        updates = removing(state.masks, updates, params)
        masks = state.masks
        if rule is not None:
            moved = optax.apply_updates(params, updates)
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
            seen, weights, slopes = (matrices_of(t, where) for t in (masks, moved, gradients))
            moment = Moment(state.step, seen, weights, slopes, key)
            found = jax.lax.cond(is_due, rule, lambda m: m.masks, moment)
            masks = with_matrices(masks, where, found)
            updates = removing(masks, updates, params)
        return updates, MaskedState(state.step + 1, masks, state.key, moments)

    return optax.GradientTransformation(init, update)


def starting_masks(params: Any, where: Targets) -> Any:
    """Masks of what is not 0, at matrices that were pruned; True elsewhere."""

    def mask(path: str, leaf: Any) -> Any:
        if path not in where:
            return jax.tree.map(lambda _: jnp.bool_(True), leaf)
        zeros = jnp.mean(leaf == 0, dtype=jnp.float32)
        return (leaf != 0) | (zeros < LEAST_SPARSITY) | (zeros == 1)

    return map_with_paths(mask, params)


def removing(masks: Any, updates: Any, params: Any) -> Any:
    """`updates`, which take to exactly 0 what the masks remove."""
    return jax.tree.map(lambda m, u, p: jnp.where(m, u, -p), masks, updates, params)


def _at_mask(mask: Array, x: Array) -> Array:
    return jnp.where(mask, x, 0)


def every(begin: int, end: int, interval: int) -> Due:
    """The steps begin, begin + interval, ... up to `end`."""

    def due(step: Array) -> Array:
        return (step >= begin) & (step <= end) & ((step - begin) % interval == 0)

    return due


def lowest_removed(
    scores: Matrices,
    sparsities: Sequence[float],
    index: Array,
    *,
    pattern: str = "unstructured",
    scope: str = "layer",
) -> Matrices:
    """Masks that remove the lowest scores.

    Args:
      scores: of every matrix, `[*lead, N, K]`.
      sparsities: that occur.
      index: int32, which of them it is.
      pattern: "unstructured" or `block:RxC`.
      scope: what loses that share: every "layer", every "row", or "global": all together.
    """
    units = {path: unit_scores(s, pattern) for path, s in scores.items()}
    if scope == "global":
        flat = jnp.concatenate([u.reshape(-1) for u in units.values()])
        kept = keep_highest(flat, _counts(flat.size, sparsities)[index])
        ends = np.cumsum([u.size for u in units.values()])[:-1]
        parts = zip(units.items(), jnp.split(kept, ends), strict=True)
        masks = {path: part.reshape(u.shape) for (path, u), part in parts}
    else:
        masks = {}
        for path, u in units.items():
            *lead, n, k = u.shape
            counts = n * _counts(k, sparsities) if scope == "row" else _counts(n * k, sparsities)
            masks[path] = keep_counted(u, jnp.full(lead, counts[index]), scope=scope)
    return {path: unit_mask(mask, pattern) for path, mask in masks.items()}


def _counts(size: int, sparsities: Sequence[float]) -> Array:
    return jnp.asarray([removed_count(size, s) for s in sparsities], jnp.int32)
