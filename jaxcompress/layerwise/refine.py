"""A better mask than the greedy one: all entries at once, weights and mask in turn."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError
from jaxcompress.layerwise.factor import without_dead
from jaxcompress.layerwise.lowest import lowest, lowest_rows
from jaxcompress.layerwise.refit import refit, squared_error

FIRST_RHO = 0.1  # pull of the mask on the weights at first, with moments of unit diagonal
LAST_RHO = 24.0  # and at the end: the weights lie on the mask


class Refined(NamedTuple):
    """A sparse matrix with another mask.

    Attributes:
      weight: float32 `[N, K]`, zero outside of the mask.
      mask: bool `[N, K]`, True = kept; as many as came.
      before: float32 `[]`, the error of the matrix as it came.
      after: float32 `[]`, its error now; never larger.
    """

    weight: Array
    mask: Array
    before: Array
    after: Array


def refine(
    weight: Array,
    start: Array,
    mask: Array,
    second_moment: Array,
    output_moment: Array | None = None,
    *,
    n_m: tuple[int, int] | None = None,
    iterations: int = 60,
    damp: float | Array = 0.01,
    output_damp: float | Array = 0.1,
) -> Refined:
    """Finds a mask of as many entries with a smaller error, and its best weights.

    Minimizes tr(G (Q - W) H (Q - W)') over sparse Q by the alternating direction method of
    multipliers, with the pull between weights and mask rising from step to step; then `refit`.
    Where that is not better than refitting `start` under `mask`, that is the result (of single
    rows, where these are independent).

    Source: Meng et al., "ALPS", arXiv:2406.07831, section 3 and algorithm 1; without an output
    moment G is the unit matrix, as there. With both moments the weights' step is solved in their
    eigenbases: the curvature is their Kronecker product (Martens and Grosse, arXiv:1503.05671).

    Args:
      weight: W, `[N, K]`: what the products should have been made with.
      start: `[N, K]`, sparse weights to improve upon.
      mask: bool `[N, K]`, True = kept; how many are kept decides how many will be.
      second_moment: H = X'X `[K, K]` of the inputs, in any scale.
      output_moment: G `[N, N]` of the gradients by the outputs, in any scale; None: every output
        counts alike and by itself.
      n_m: (n, m): keep n of every m consecutive columns of a row; None: any entries.
      iterations: of the search for the mask, each four products (two without G).
      damp: fraction of the mean of H's diagonal that is added to it in the search.
      output_damp: fraction of the mean of G's diagonal that is added to it.

    Raises:
      InputError: m does not divide the columns.
    """
    if n_m and weight.shape[1] % n_m[1]:
        raise InputError(f"pattern {n_m}: does not divide the {weight.shape[1]} contracted columns")
    return _refine(
        n_m, iterations, weight, start, mask, second_moment, output_moment, damp, output_damp
    )


@partial(jax.jit, static_argnums=(0, 1))
def _refine(
    n_m: tuple[int, int] | None,
    iterations: int,
    weight: Array,
    start: Array,
    mask: Array,
    second_moment: Array,
    output_moment: Array | None,
    damp: Array,
    output_damp: Array,
) -> Refined:
    with jax.default_matmul_precision("highest"):
        weight = weight.astype(jnp.float32)
        moment, dead = without_dead(second_moment)
        outputs = None if output_moment is None else _damped(output_moment, output_damp)
        inputs = _Basis.of(_damped(moment, damp))
        rows = None if outputs is None else _Basis.of(outputs)
        # An input never seen keeps its weight for least, as it does nothing to the outputs.
        wanted = jnp.where(dead, 0, weight)
        sparse, other = _search(wanted, ~mask, inputs, rows, n_m, iterations)
        candidates = [
            (refit(weight, begin, kept, second_moment, outputs).weight, kept)
            for begin, kept in ((start, mask), (sparse, other))
        ]
        before, first, second = (
            squared_error(weight, q, second_moment, outputs)
            for q in (jnp.where(mask, start, 0), *(q for q, _ in candidates))
        )
        if n_m is None:  # rows exchange entries: all of them are taken from one candidate
            first, second = jnp.sum(first), jnp.sum(second)
        better = (second < first)[..., None]
        result, kept = (jnp.where(better, new, old) for old, new in zip(*candidates))
        return Refined(result, kept, jnp.sum(before), jnp.sum(jnp.minimum(first, second)))


class _Basis(NamedTuple):
    """A moment M scaled to a unit diagonal: M = S E diag(values) E' S."""

    scale: Array
    values: Array
    vectors: Array

    @classmethod
    def of(cls, moment: Array) -> _Basis:
        scale = jnp.sqrt(jnp.diagonal(moment))
        vectors, values = lax.linalg.eigh(moment / scale / scale[:, None])
        return cls(scale, jnp.maximum(values, 0), vectors)


def _damped(moment: Array, damp: Array) -> Array:
    """The moment with `damp` of its mean diagonal added; some, where all of it is zero."""
    moment = moment.astype(jnp.float32)
    mean = jnp.mean(jnp.diagonal(moment))
    return moment + jnp.where(mean > 0, damp * mean, 1) * jnp.eye(len(moment))


def _search(
    weight: Array,
    gone: Array,
    inputs: _Basis,
    rows: _Basis | None,
    n_m: tuple[int, int] | None,
    iterations: int,
) -> tuple[Array, Array]:
    """Sparse weights and their mask, by alternating directions in units of equal curvature."""
    scale = inputs.scale if rows is None else rows.scale[:, None] * inputs.scale
    values = inputs.values if rows is None else rows.values[:, None] * inputs.values
    growth = (LAST_RHO / FIRST_RHO) ** (1 / iterations)

    def to_bases(x: Array) -> Array:
        x = x @ inputs.vectors
        return x if rows is None else rows.vectors.T @ x

    def from_bases(x: Array) -> Array:
        x = x @ inputs.vectors.T
        return x if rows is None else rows.vectors @ x

    def project(x: Array) -> tuple[Array, Array]:
        kept = ~_lowest(jnp.abs(x), gone, n_m)
        return jnp.where(kept, x, 0), kept

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        sparse, dual, _ = state
        rho = FIRST_RHO * growth**i
        # (values + rho) x = values W + rho (sparse - dual), in the eigenbases.
        full = from_bases((values * wanted + rho * to_bases(sparse - dual)) / (values + rho))
        sparse, kept = project(full + dual)
        return sparse, (dual + full - sparse) / growth, kept

    wanted = to_bases(weight * scale)
    sparse, kept = project(weight * scale)
    state = (sparse, jnp.zeros_like(sparse), kept)
    sparse, _, kept = lax.fori_loop(0, iterations, step, state)
    return sparse / scale, kept


def _lowest(scores: Array, gone: Array, n_m: tuple[int, int] | None) -> Array:
    """As many of the lowest scores as are `gone`; or m - n of every m."""
    if n_m is None:
        return lowest(scores, jnp.sum(gone))
    n, m = n_m
    runs = scores.reshape(-1, m).T
    return lowest_rows(runs, m - n).T.reshape(scores.shape)
