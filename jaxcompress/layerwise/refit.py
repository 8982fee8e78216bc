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
      before: float32 `[N]`, the error of every row as it came, (Q - W) H (Q - W)'; with an
        `output_moment` `[]`, of the matrix.
      after: the error now, alike; never larger.
      iterations: int32 `[]`, steps of conjugate gradients.
    """

    weight: Array
    before: Array
    after: Array
    iterations: Array


def squared_error(
    weight: Array, result: Array, second_moment: Array, output_moment: Array | None = None
) -> Array:
    """The squared error of the outputs: (Q - W) H (Q - W)' of every row.

    Args:
      weight: W, `[N, K]`.
      result: Q, `[N, K]`.
      second_moment: H, `[K, K]`.
      output_moment: G, `[N, N]`: tr(G (Q - W) H (Q - W)') instead, which weights the errors of the
        outputs by what they do further on.

    Returns:
      float32 `[N]`, or `[]` with an output moment.
    """
    change = (result - weight).astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        product = _curvature(change, second_moment.astype(jnp.float32), output_moment)
    return _dot(change, product, output_moment)


@partial(jax.jit, static_argnames=("iterations",))
def refit(
    weight: Array,
    start: Array,
    mask: Array,
    second_moment: Array,
    output_moment: Array | None = None,
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
      output_moment: G `[N, N]`, symmetric; minimizes tr(G (Z - W) H (Z - W)') instead, over all
        rows together: it is the matrix that never gets worse then.
      iterations: most steps; few of them also keep from fitting noise of the inputs.
      tolerance: stop when a step takes less than this fraction off the first error, all rows
        together.
    """
    with jax.default_matmul_precision("highest"):
        weight, moment = weight.astype(jnp.float32), second_moment.astype(jnp.float32)
        diagonal = jnp.diagonal(moment) + jnp.zeros_like(weight)
        if output_moment is not None:
            diagonal = diagonal * jnp.diagonal(output_moment)[:, None]
        free = mask & (diagonal > 0)
        inverse = jnp.where(free, 1 / jnp.where(free, diagonal, 1), 0)
        start = jnp.where(mask, start.astype(jnp.float32), 0)
        pull = _curvature(weight - start, moment, output_moment)
        before = _dot(weight - start, pull, output_moment)
        residual = jnp.where(free, pull, 0)
        direction = residual * inverse
        enough = tolerance * jnp.sum(before)

        def unfinished(state: _Search) -> Array:
            return (state.iteration < iterations) & (state.gained > enough)

        def step(state: _Search) -> _Search:
            product = _curvature(state.direction, moment, output_moment)
            length = _ratio(state.power, _dot(state.direction, product, output_moment))
            residual = jnp.where(free, state.residual - length[..., None] * product, 0)
            power = _dot(residual, residual * inverse, output_moment)
            turn = _ratio(power, state.power)
            return _Search(
                state.iteration + 1,
                state.change + length[..., None] * state.direction,
                residual,
                residual * inverse + turn[..., None] * state.direction,
                power,
                jnp.sum(length * state.power),
            )

        power = _dot(residual, direction, output_moment)
        search = _Search(
            jnp.zeros_like(power.sum(), jnp.int32),
            jnp.zeros_like(weight),
            residual,
            direction,
            power,
            jnp.inf + power.sum(),
        )
        search = lax.while_loop(unfinished, step, search)
        result = start + search.change
        after = squared_error(weight, result, moment, output_moment)
        better = after < before
        return Refit(
            jnp.where(better[..., None], result, start),
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


def _curvature(change: Array, moment: Array, output_moment: Array | None) -> Array:
    """Half the gradient of the error, G D H."""
    product = change @ moment
    return product if output_moment is None else output_moment @ product


def _dot(a: Array, b: Array, output_moment: Array | None) -> Array:
    """The scalar product of every row, or with an output moment that of the matrix."""
    return jnp.sum(a * b, axis=-1 if output_moment is None else (-2, -1))


def _ratio(a: Array, b: Array) -> Array:
    """a / b, and 0 where b is not positive: a row that has converged stays."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
