"""Least squares of the entries that a mask keeps, every row by itself and all of them at once."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays.base import Array


class Refit(NamedTuple):
    """Refitted weights.

    Attributes:
      weight: float32 `[N, K]`, zero outside of the mask.
      before: float32 `[N]`, the error of every row as it came, (Q - W) H (Q - W)'.
      after: float32 `[N]`, its error now; never larger.
      iterations: int32 `[]`, steps of conjugate gradients.
    """

    weight: Array
    before: Array
    after: Array
    iterations: Array


def squared_error(weight: Array, result: Array, second_moment: Array) -> Array:
    """(Q - W) H (Q - W)' of every row, float32 `[N]`: the squared error of the outputs.

    Args:
      weight: W, `[N, K]`.
      result: Q, `[N, K]`.
      second_moment: H, `[K, K]`.
    """
    change = (result - weight).astype(jnp.float32)
    product = jnp.dot(change, second_moment.astype(jnp.float32), precision="highest")
    return jnp.sum(change * product, axis=-1)


@partial(jax.jit, static_argnames=("iterations",))
def refit(
    weight: Array,
    start: Array,
    mask: Array,
    second_moment: Array,
    *,
    iterations: int = 16,
    tolerance: float = 1e-6,
) -> Refit:
    """Fits the kept weights of every row anew, by conjugate gradients.

    Minimizes (Z - W) H (Z - W)' over the Z that are zero outside of the mask, from `start`, with
    H's diagonal as the preconditioner (Hestenes and Stiefel, 1952). The rows are independent and
    run in parallel: one product with H a step. A row that float32 would leave worse keeps its
    start. Inputs that were never active keep the weight that they start with.

    Args:
      weight: W, `[N, K]`: what the products should have been made with.
      start: `[N, K]`, first guess; the solver's weights, or W itself.
      mask: bool `[N, K]`, True = kept.
      second_moment: H = X'X `[K, K]` of the inputs, in any scale.
      iterations: most steps; few of them also keep from fitting noise of the inputs.
      tolerance: stop when a step takes less than this fraction off the first error, all rows
        together.
    """
    with jax.default_matmul_precision("highest"):
        weight, moment = weight.astype(jnp.float32), second_moment.astype(jnp.float32)
        diagonal = jnp.diagonal(moment)
        start = jnp.where(mask, start.astype(jnp.float32), 0)
        free = mask & (diagonal > 0)
        inverse = 1 / jnp.where(diagonal > 0, diagonal, 1)
        pull = (weight - start) @ moment
        before = jnp.sum((weight - start) * pull, axis=-1)
        residual = jnp.where(free, pull, 0)
        direction = residual * inverse
        enough = tolerance * jnp.sum(before)

        def unfinished(state: _Search) -> Array:
            return (state.iteration < iterations) & (state.gained > enough)

        def step(state: _Search) -> _Search:
            product = jnp.where(free, state.direction @ moment, 0)
            length = _ratio(state.power, _dot(state.direction, product))
            change = state.change + length * state.direction
            residual = state.residual - length * product
            power = _dot(residual, residual * inverse)
            turn = _ratio(power, state.power)
            return _Search(
                state.iteration + 1,
                change,
                residual,
                residual * inverse + turn * state.direction,
                power,
                jnp.sum(length * state.power),
            )

        power, infinite = _dot(residual, direction), jnp.float32(jnp.inf)
        search = _Search(jnp.int32(0), jnp.zeros_like(weight), residual, direction, power, infinite)
        search = lax.while_loop(unfinished, step, search)
        result = start + search.change
        after = squared_error(weight, result, moment)
        better = after < before
        return Refit(
            jnp.where(better[:, None], result, start),
            before,
            jnp.where(better, after, before),
            search.iteration,
        )


class _Search(NamedTuple):
    """State of conjugate gradients; `power` is the preconditioned square of the residual."""

    iteration: Array
    change: Array
    residual: Array
    direction: Array
    power: Array
    gained: Array


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=-1, keepdims=True)


def _ratio(a: Array, b: Array) -> Array:
    """a / b, and 0 where b is not positive: a row that has converged stays."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
