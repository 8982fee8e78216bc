"""Lottery tickets: iterative magnitude pruning that goes back to the weights of an early step."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError
from jaxcompress.pruning.patterns import Scope, check_sparsity, keep_highest
from jaxcompress.pruning.schedules.masked import lowest_removed, masked, removing
from jaxcompress.pruning.schedules.targets import (
    Matrices,
    Targets,
    matrices_of,
    with_matrices,
)
from jaxcompress.pruning.scores import magnitude

Control = Literal["none", "random", "reinit"]


class LotteryState(NamedTuple):
    """State of `lottery`.

    Attributes:
      step: int32, steps since the network was new, or would be, had it not been rewound.
      round: int32, prunings done.
      early: the weights of step `rewind`.
      early_inner: the optimizer's state then.
      inner: the state of the optimizer under its masks.
    """

    step: Array
    round: Array
    early: Any
    early_inner: Any
    inner: Any


def lottery(
    inner: optax.GradientTransformation,
    where: Targets,
    *,
    sparsity: float,
    rounds: int,
    steps: int,
    rewind: int = 0,
    scope: Scope = "layer",
    control: Control = "none",
    seed: int = 0,
) -> optax.GradientTransformation:
    """Train, prune the smallest weights, rewind the others, and again; then train the ticket.

    A network trains for `steps` steps; then the same share of what is left of each matrix goes,
    and weights and optimizer, its learning rate included, are as they were after step `rewind`.
    After `rounds` times that, `training_steps` in all, the ticket has trained to the end.

    Source: Frankle and Carbin, "The Lottery Ticket Hypothesis", arXiv:1803.03635, section 2;
    rewinding: Frankle et al., "Stabilizing the Lottery Ticket Hypothesis", arXiv:1903.01611.

    Args:
      inner: the optimizer.
      where: what is pruned.
      sparsity: of the last ticket; that of round r is 1 - (1 - sparsity)^(r / rounds).
      rounds: prunings.
      steps: of one training from the new network to its end.
      rewind: k, the step to whose end everything goes back; 0: the weights before training.
      scope: in which the smallest go: every "layer", every "row" or "global".
      control: at the last rewinding put a control in the ticket's place: "random": its weights,
        and a random mask of as many entries in each matrix; "reinit": its mask, and in each matrix
        the weights of the step `rewind` in random order.
      seed: of the control.

    Returns:
      A transformation; weights go back up to the rounding of one float32 addition.

    Raises:
      InputError: a number out of range, or an unknown control.
    """
    check_sparsity(sparsity)
    if rounds < 1 or not 0 <= rewind < steps:
        raise InputError(
            f"rounds {rounds}, rewind {rewind}: one round or more, and back to a step before the "
            f"last of {steps}"
        )
    if control not in ("none", "random", "reinit"):
        raise InputError(f"control {control!r}: use none, random or reinit")
    sparsities = round_sparsities(sparsity, rounds)
    # Masks come from the lottery below: the rule sets none.
    under = masked(inner, where, seed=seed)

    def init(params: Any) -> LotteryState:
        first = under.init(params)
        early = jax.tree.map(jnp.copy, params)
        return LotteryState(jnp.int32(0), jnp.int32(0), early, inner.init(params), first)

    def update(gradients: Any, state: LotteryState, params: Any = None) -> tuple[Any, LotteryState]:
        updates, after = under.update(gradients, state.inner, params)
        moved = optax.apply_updates(params, updates)
        step = state.step + 1
        is_early = (state.round == 0) & (step == rewind)
        early = _where(is_early, moved, state.early)
        early_inner = _where(is_early, after.inner, state.early_inner)

        def rewound(_: None) -> tuple[Any, Any, Any]:
            masks, weights = _ticket(state.round, moved, after.masks, early, after.key)
            back = jax.tree.map(jnp.subtract, weights, params)
            return removing(masks, back, params), masks, early_inner

        over = (step == steps) & (state.round < rounds)
        updates, masks, moments = jax.lax.cond(
            over, rewound, lambda _: (updates, after.masks, after.inner), None
        )
        new = LotteryState(
            step=jnp.where(over, rewind, step),
            round=state.round + over,
            early=early,
            early_inner=early_inner,
            inner=after._replace(masks=masks, inner=moments),
        )
        return updates, new

    def _ticket(number: Array, trained: Any, masks: Any, early: Any, key: Array) -> tuple[Any, Any]:
        """Masks and weights with which the next training begins."""
        scores = {path: magnitude(w) for path, w in matrices_of(trained, where).items()}
        found = lowest_removed(scores, sparsities, number, scope=scope)
        before = matrices_of(masks, where)
        found = {path: mask & before[path] for path, mask in found.items()}
        weights = early
        if control != "none":
            is_last = number == rounds - 1
            drawn = jax.random.split(jax.random.wrap_key_data(key), len(found))
            keys = dict(zip(found, drawn, strict=True))
            if control == "random":
                found = {p: jnp.where(is_last, _drawn(m, keys[p]), m) for p, m in found.items()}
            else:
                mixed = _shuffled(matrices_of(early, where), keys)
                weights = _where(is_last, with_matrices(early, where, mixed), early)
        return with_matrices(masks, where, found), weights

    return optax.GradientTransformation(init, update)


def training_steps(steps: int, rounds: int, rewind: int = 0) -> int:
    """Steps of all trainings of a lottery together."""
    return steps + rounds * (steps - rewind)


def round_sparsities(sparsity: float, rounds: int) -> list[float]:
    """Sparsities after each round, of which each removes the same share of what is left."""
    return [1 - (1 - sparsity) ** (r / rounds) for r in range(1, rounds)] + [sparsity]


def _where(condition: Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda y, n: jnp.where(condition, y, n), yes, no)


def _drawn(mask: Array, key: Array) -> Array:
    """A random mask of as many entries in every `[N, K]`."""
    scores = jax.random.uniform(key, (*mask.shape[:-2], mask.shape[-2] * mask.shape[-1]))
    removed = (~mask).sum((-2, -1))
    return keep_highest(scores, removed).reshape(mask.shape)


def _shuffled(matrices: Matrices, keys: dict[str, Array]) -> Matrices:
    """Every `[N, K]` in random order."""

    def shuffled(matrix: Array, key: Array) -> Array:
        flat = matrix.reshape(*matrix.shape[:-2], -1)
        mixed = jax.random.permutation(key, flat, axis=-1, independent=True)
        return mixed.reshape(matrix.shape)

    return {path: shuffled(matrix, keys[path]) for path, matrix in matrices.items()}
