"""Factors and selections that the solver is made of."""

import jax.numpy as jnp
import numpy as np
import pytest
import solver_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.layerwise.factor import cholesky_by_panels, factor, invert_upper
from jaxcompress.layerwise.lowest import lowest, lowest_rows


@pytest.mark.parametrize("panel", [16, 48, 64])
def test_panels_are_those_of_the_papers_factor(panel):
    _, moment = oracle.problem(0, 1, 96)
    upper, _ = oracle.upper_factor(moment, 0.01)
    got = factor(jnp.asarray(moment), jnp.float32(0.01), panel)
    padded = np.eye(-(-96 // panel) * panel)
    padded[:96, :96] = upper
    for i, inverse in enumerate(np.asarray(got.inverses)):
        part = slice(i * panel, (i + 1) * panel)
        scale = np.abs(padded[part, part]).max()
        np.testing.assert_allclose(inverse, padded[part, part], atol=1e-4 * scale)
    np.testing.assert_allclose(np.asarray(got.upper) @ padded, np.eye(len(padded)), atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 7, 16, 100])
def test_triangles_are_inverted(size):
    rng = np.random.default_rng(size)
    upper = np.triu(rng.standard_normal((3, size, size)) / size) + np.eye(size)
    got = invert_upper(jnp.asarray(upper, jnp.float32))
    np.testing.assert_allclose(np.asarray(got), np.linalg.inv(upper), atol=1e-4)


@pytest.mark.parametrize(("size", "panel"), [(1, 8), (50, 16), (96, 32)])
def test_panels_of_a_factorization_are_those_of_the_whole(size, panel):
    rows = np.random.default_rng(size).standard_normal((2 * size, size)).astype(np.float32)
    matrix = rows.T @ rows
    want = np.linalg.cholesky(matrix.astype(np.float64))
    got = np.asarray(cholesky_by_panels(jnp.tril(matrix), panel))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    matrix[size // 2, size // 2] = -1  # not positive definite
    assert np.isnan(np.asarray(cholesky_by_panels(jnp.asarray(matrix), panel))[-1, -1])


@settings(max_examples=12)
@given(st.sampled_from([(1, 1), (3, 8), (16, 5)]), st.integers(1, 9), st.integers(0, 80))
def test_exactly_the_lowest_go_and_of_equal_ones_the_first(shape, values, count):
    scores = np.random.default_rng(count).integers(0, values, shape).astype(np.float32) / 7
    count = min(count, scores.size)
    want = np.zeros(scores.size, bool)
    want[np.argsort(scores.ravel(), kind="stable")[:count]] = True
    got = np.asarray(lowest(jnp.asarray(scores), jnp.int32(count)))
    np.testing.assert_array_equal(got, want.reshape(shape))


def test_infinite_scores_go_last():
    scores = jnp.array([jnp.inf, 3.0, 0.0, 1e38, 1e-45, jnp.inf])
    got = [np.flatnonzero(np.asarray(lowest(scores, jnp.int32(n)))).tolist() for n in (2, 4, 5)]
    assert got == [[2, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_lowest_of_every_column_go(count):
    scores = np.random.default_rng(0).integers(0, 3, (4, 50)).astype(np.float32)
    got = np.asarray(lowest_rows(jnp.asarray(scores), count))
    want = np.zeros(scores.shape, bool)
    np.put_along_axis(want, np.argsort(scores, axis=0, kind="stable")[:count], True, axis=0)
    np.testing.assert_array_equal(got, want)
