"""What a matrix should be to give, from the inputs that it gets now, the dense model's outputs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from jaxcompress.core.arrays.base import Array
from jaxcompress.layerwise.descent import damped
from jaxcompress.layerwise.factor import damped_cholesky, without_dead
from jaxcompress.layerwise.refit import refit

PRUNED = 0.01  # share of zeros from which on a matrix was pruned, and its mask is kept


def dense_target(
    weight: Array,
    second_moment: Array,
    cross_moment: Array,
    *,
    fraction: float | Array = 1.0,
    damp: float | Array = 0.01,
) -> Array:
    """The matrix T whose products X T' come nearest to the dense model's Y W'.

    X are the inputs that the model compressed so far gives, Y those of the dense model at the same
    places. T minimizes |X T' - (f Y + (1 - f) X) W'|^2 + d |T - W|^2, which is

        T' = W' + f (X'X + d)^-1 (X'Y - X'X) W'

    To compress T instead of W makes up for errors made before this matrix; GPTAQ
    (arXiv:2504.02692) puts the same idea into the column solver. Of a pruned W it is the best one
    with the same zeros.

    Args:
      weight: W, `[*lead, N, K]`.
      second_moment: X'X `[*lead, K, K]`.
      cross_moment: X'Y `[*lead, K, K]`, in the same scale.
      fraction: f; 0 aims at what W does to X, 1 at what it does to Y.
      damp: d, as a fraction of the mean of X'X's diagonal; grows where X'X is singular.

    Returns:
      T, float32 `[*lead, N, K]`. The weight of an input that is always 0 stays.
    """
    target = _target(weight, second_moment, cross_moment, fraction, damp)
    if jnp.mean(weight == 0) > PRUNED:  # no `cond`: a dense matrix need not compile the other side
        target = _under_mask(weight, target, second_moment, damp)
    return target


@jax.jit
@partial(jnp.vectorize, signature="(n,k),(k,k),(k,k),(),()->(n,k)")
def _target(
    weight: Array,
    second_moment: Array,
    cross_moment: Array,
    fraction: float | Array,
    damp: float | Array,
) -> Array:
    with jax.default_matmul_precision("highest"):
        weight = weight.astype(jnp.float32)
        moment, _ = without_dead(second_moment)
        lower, _ = damped_cholesky(moment, jnp.float32(damp))
        shift = (cross_moment - second_moment).astype(jnp.float32) @ weight.T
        return weight + fraction * cho_solve((lower, True), shift).T


@jax.jit
@partial(jnp.vectorize, signature="(n,k),(n,k),(k,k),()->(n,k)")
def _under_mask(weight: Array, target: Array, second_moment: Array, damp: float | Array) -> Array:
    """The T that is zero where W is: |X T' - ...|^2 is a quadratic around the free one."""
    return refit(target, weight, weight != 0, damped(second_moment, damp)).weight
