"""Sensitivity-weighted k-means against the optimum by dynamic programming; outliers kept apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxcompress as jc
from jaxcompress.core.arrays.codebook import Codebook
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.csr import CSR
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Method
from jaxcompress.factorization.kmeans import kmeans
from jaxcompress.quantization.squeezellm import squeezellm


def problem(seed=0, rows=4, columns=64):
    """Weights, and sensitivities over some decades, as Fisher diagonals are."""
    rng = np.random.default_rng(seed)
    return rng.standard_t(4, size=(rows, columns)), np.exp(2 * rng.normal(size=(rows, columns)))


def optimum(values, weights, count):
    """The least weighted error of `count` intervals of a row, over all cuts, float64."""
    order = np.argsort(values)
    v, f = values[order], weights[order]
    sums = [np.concatenate([[0], np.cumsum(x)]) for x in (f, f * v, f * v * v)]
    i, j = np.meshgrid(range(len(v) + 1), range(len(v) + 1), indexing="ij")
    mass, first, second = (s[j] - s[i] for s in sums)
    cost = np.where(j > i, second - first**2 / np.where(mass > 0, mass, 1), np.inf)
    least = np.where(np.arange(len(v) + 1) == 0, 0, np.inf)
    for _ in range(count):
        least = np.minimum((least[:, None] + cost).min(0), np.where(least == 0, 0, np.inf))
    return least[-1]


def error(w, leaf, f=1.0):
    return (f * np.square(w - np.asarray(leaf.dense(), np.float64))).sum()


@pytest.mark.parametrize("bits", [2, 3])
def test_rows_come_near_the_optimum(bits):
    w, f = problem(bits)
    given = jnp.asarray(w, jnp.float32), jnp.asarray(f, jnp.float32)
    leaf = squeezellm(*given, bits=bits)
    assert isinstance(leaf, Codebook)
    assert leaf.table.shape == (4, 2**bits)
    best = sum(optimum(*row, 2**bits) for row in zip(w, f))
    assert error(w, leaf, f) == pytest.approx(best, rel=1e-3)
    assert error(w, leaf, f) < 0.7 * error(w, kmeans(given[0], bits=bits, granularity="channel"), f)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_tables_are_weighted_means(granularity):
    w, f = problem()
    leaf = squeezellm(
        jnp.asarray(w, jnp.float32),
        jnp.asarray(1e-12 * f, jnp.float32),  # only ratios count
        bits=3,
        granularity=granularity,
        group_size=32,
    )
    scale = np.ones((4, 1)) if leaf.scale is None else np.asarray(leaf.scale, np.float64)
    spread = np.repeat(scale, 64 // scale.shape[-1], -1)
    codes = np.asarray(leaf.integers())
    for row, table in enumerate(np.asarray(leaf.table, np.float64)):
        rows = slice(row, row + 1) if granularity == "channel" else slice(None)
        mass, size, value = ((f * spread**2)[rows], codes[rows], (w / spread)[rows])
        for code in np.unique(size):
            mean = np.average(value[size == code], weights=mass[size == code])
            assert table[code] == pytest.approx(mean, rel=1e-3, abs=1e-4)


def test_rows_that_nothing_feels_are_clustered_evenly():
    w, f = problem()
    f[2] = 0
    leaf = squeezellm(jnp.asarray(w, jnp.float32), jnp.asarray(f, jnp.float32), bits=3)
    plain = kmeans(jnp.asarray(w[2:3], jnp.float32), bits=3, granularity="channel")
    np.testing.assert_array_equal(leaf.dense()[2:3], plain.dense())


def test_outliers_and_what_is_felt_most_are_kept_apart():
    w, f = problem(5, rows=16, columns=128)
    w[3, 7], w[9, 100], f[4, 4] = 40, -30, 1e6
    given = jnp.asarray(w, jnp.float32), jnp.asarray(f, jnp.float32)
    leaf = squeezellm(*given, bits=3, sparse=0.01)
    assert isinstance(leaf, Sum)
    assert [type(part) for part in leaf.parts] == [CSR, Codebook]
    apart = np.asarray(leaf.first.mask())
    count = int(0.01 * w.size)
    assert apart.sum() == count
    np.testing.assert_allclose(np.asarray(leaf.dense())[apart], w[apart], rtol=1e-6)
    felt = np.argsort(f, axis=None)[-(count // 9) :]
    assert apart.ravel()[felt].all()
    rest = np.where(np.isin(np.arange(w.size), felt).reshape(w.shape), 0, np.abs(w))
    assert apart.ravel()[np.argsort(rest, axis=None)[-(count - count // 9) :]].all()
    assert error(w, leaf, f) < 0.85 * error(w, squeezellm(*given, bits=3), f)
    # With one table for the matrix, what is apart would have spoilt the ranges of its groups.
    both = {s: squeezellm(*given, granularity="group", bits=3, sparse=s) for s in (0.0, 0.01)}
    assert error(w, both[0.01]) < 0.5 * error(w, both[0.0])


@pytest.mark.slow
def test_stacked_matrices_are_solved_each_for_itself():
    w, f = (jnp.asarray(x, jnp.float32).reshape(2, 8, 64) for x in problem(rows=16))
    for sparse in (0.0, 0.05):
        leaf = squeezellm(w, f, bits=2, sparse=sparse)
        one = squeezellm(w[1], f[1], bits=2, sparse=sparse)
        np.testing.assert_allclose(leaf.dense()[1], one.dense(), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_over_a_model(tmp_path):
    model = jc.load(tiny.write_llama(tmp_path / "llama", layers=1))
    ids = np.random.default_rng(0).integers(0, 300, (4, 12)).astype(np.int32)
    method = Method(squeezellm, produces="quantized")
    assert method.needs == "calibration"
    small = jc.compress(model, method, calibration=ids, bits=4)
    kinds = {type(x) for x in jax.tree.leaves(small.params, is_leaf=lambda x: hasattr(x, "dims"))}
    assert Codebook in kinds
    assert bool(jnp.isfinite(small(ids)).all())


def test_what_does_not_fit_is_refused():
    w = jnp.ones((2, 64))
    for options, words in (
        ({"bits": 9}, "bits 9"),
        ({"sparse": 1.0}, "sparse 1.0"),
        ({"granularity": "group", "group_size": 48}, "group size 48"),
    ):
        with pytest.raises(InputError, match=words):
            squeezellm(w, w, **options)
