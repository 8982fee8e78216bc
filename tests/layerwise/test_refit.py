"""Least squares of kept weights, and the target, against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import solver_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.layerwise import dense_target, refit, solve, squared_error


def exact(weight, mask, moment):
    """The best weights under a mask, row by row."""
    weight, moment = np.asarray(weight, np.float64), np.asarray(moment, np.float64)
    best = np.zeros(weight.shape)
    for row, kept in enumerate(np.asarray(mask)):
        kept = kept & (np.diag(moment) > 0)
        normal = moment[np.ix_(kept, kept)]
        best[row, kept] = np.linalg.lstsq(normal, moment[kept] @ weight[row], rcond=None)[0]
    return best


@pytest.mark.parametrize("pattern", [{"n_m": (2, 4)}, {"sparsity": 0.6}], ids=str)
@pytest.mark.parametrize("dead", [0, 5])
def test_reaches_the_least_squares_solution(pattern, dead):
    weight, moment = oracle.problem(0, 24, 80, dead=dead)
    start = solve(jnp.asarray(weight), jnp.asarray(moment), **pattern)
    got = refit(jnp.asarray(weight), start.weight, start.mask, jnp.asarray(moment), iterations=200)
    best = exact(weight, start.mask, moment)
    assert not np.asarray(got.weight)[~np.asarray(start.mask)].any()
    least, came = (oracle.error(weight, q, moment) for q in (best, start.weight))
    assert least <= oracle.error(weight, got.weight, moment) < least + 1e-3 * (came - least)
    assert float(got.before.sum()) == pytest.approx(came, rel=1e-3)
    assert float(got.after.sum()) == pytest.approx(least, rel=1e-2)


@settings(max_examples=5)
@given(
    st.integers(1, 9), st.integers(1, 70), st.floats(0, 1), st.integers(0, 99), st.integers(1, 9)
)
def test_improves_any_mask_and_no_row_gets_worse(rows, columns, density, seed, iterations):
    weight, moment = oracle.problem(seed, rows, columns, tokens=max(columns // 2, 1))
    mask = np.random.default_rng(seed).random(weight.shape) < density
    start = np.where(mask, weight, 0)
    arguments = map(jnp.asarray, (weight, start, mask, moment))
    got = np.asarray(refit(*arguments, iterations=iterations).weight)
    change = np.stack([start, got]).astype(np.float64) - weight
    before, after = np.einsum("brk,kl,brl->br", change, moment.astype(np.float64), change)
    assert (
        after <= before * (1 + 1e-5) + 1e-9 * np.einsum("rk,kl,rl", weight, moment, weight)
    ).all()
    if 0.2 < density < 0.8 and rows * columns > 100:
        assert after.sum() < before.sum()


def test_what_is_best_already_stays():
    weight, moment = oracle.problem(1, 12, 40)
    mask = np.random.default_rng(0).random(weight.shape) < 0.5
    best = exact(weight, mask, moment).astype(np.float32)
    got = refit(*map(jnp.asarray, (weight, best, mask, moment)))
    np.testing.assert_allclose(np.asarray(got.weight), best, atol=1e-4)
    assert int(got.iterations) <= 2


def test_inputs_never_seen_keep_their_weight():
    weight, moment = oracle.problem(2, 6, 40, dead=4)
    mask = np.random.default_rng(0).random(weight.shape) < 0.5
    got = np.asarray(refit(*map(jnp.asarray, (weight, weight, mask, moment))).weight)
    dead = np.diag(moment) == 0
    np.testing.assert_array_equal(got[:, dead], np.where(mask, weight, 0)[:, dead])


def test_a_batch_of_matrices_is_refitted_as_each_alone():
    pairs = [oracle.problem(seed, 6, 40) for seed in range(3)]
    weights, moments = (jnp.stack([jnp.asarray(pair[i]) for pair in pairs]) for i in (0, 1))
    masks = jax.random.uniform(jax.random.key(0), weights.shape) < 0.5
    together = jax.vmap(refit)(weights, weights, masks, moments).weight
    alone = jnp.stack([refit(*each).weight for each in zip(weights, weights, masks, moments)])
    np.testing.assert_allclose(np.asarray(together), np.asarray(alone), atol=2e-3)


def test_squared_error_is_that_of_the_outputs():
    rng = np.random.default_rng(0)
    inputs, weight, result = (rng.standard_normal(shape) for shape in ((50, 8), (3, 8), (3, 8)))
    got = squared_error(*(jnp.asarray(x) for x in (weight, result, inputs.T @ inputs)))
    want = np.square(inputs @ (result - weight).T).sum(0)
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4)


def two_streams(seed, columns, tokens, dead=0):
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((tokens, columns)) @ rng.standard_normal((columns, columns))
    now = dense + 0.3 * rng.standard_normal(dense.shape) * np.std(dense)
    now[:, :dead] = 0
    return now, dense


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_the_target_minimizes_the_distance_to_the_dense_outputs(fraction):
    x, y = two_streams(0, 24, 200)
    weight = np.random.default_rng(1).standard_normal((7, 24))
    moment, cross = x.T @ x, x.T @ y
    ridge = 0.02 * np.diag(moment).mean()
    # The ridge as further rows of the least squares problem.
    wanted = (fraction * y + (1 - fraction) * x) @ weight.T
    left = np.vstack([x, np.sqrt(ridge) * np.eye(24)])
    right = np.vstack([wanted, np.sqrt(ridge) * weight.T])
    want = np.linalg.lstsq(left, right, rcond=None)[0].T
    arguments = (jnp.asarray(a, jnp.float32) for a in (weight, moment, cross))
    got = np.asarray(dense_target(*arguments, fraction=fraction, damp=0.02))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_the_target_of_a_pruned_matrix_keeps_its_zeros_and_is_the_best_that_does():
    x, y = two_streams(3, 24, 200)
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((7, 24)) * (rng.random((7, 24)) < 0.5)
    moment, cross = x.T @ x, x.T @ y
    left = np.vstack([x, np.sqrt(0.02 * np.diag(moment).mean()) * np.eye(24)])
    right = np.vstack([y @ weight.T, left[len(x) :] @ weight.T])
    want = np.zeros_like(weight)
    for row, kept in enumerate(weight != 0):  # every row is a problem of its own
        want[row, kept] = np.linalg.lstsq(left[:, kept], right[:, row], rcond=None)[0]
    arguments = [jnp.asarray(a, jnp.float32) for a in (weight, moment, cross)]
    got = np.asarray(dense_target(*arguments, damp=0.02))
    np.testing.assert_array_equal(got == 0, weight == 0)
    np.testing.assert_allclose(got, want, rtol=5e-3, atol=5e-3)


def test_the_target_of_singular_moments_and_dead_inputs_is_finite():
    x, y = two_streams(2, 24, 10, dead=3)
    weight = np.random.default_rng(1).standard_normal((7, 24))
    arguments = [jnp.asarray(a, jnp.float32) for a in (weight, x.T @ x, x.T @ y)]
    got = np.asarray(dense_target(*arguments, damp=0.0))
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[:, :3], weight.astype(np.float32)[:, :3])
    gap = [np.square(x @ t.T - y @ weight.T).sum() for t in (got, weight)]
    assert gap[0] < 0.1 * gap[1]


def test_targets_take_leading_axes():
    streams = [two_streams(seed, 12, 60) for seed in range(3)]
    weight = jax.random.normal(jax.random.key(0), (3, 5, 12))
    moment = jnp.stack([jnp.asarray(x.T @ x) for x, _ in streams])
    cross = jnp.stack([jnp.asarray(x.T @ y) for x, y in streams])
    together = dense_target(weight, moment, cross)
    alone = jnp.stack([dense_target(*each) for each in zip(weight, moment, cross)])
    np.testing.assert_allclose(np.asarray(together), np.asarray(alone), rtol=1e-4, atol=1e-5)
