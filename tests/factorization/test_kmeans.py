"""K-means in one dimension against Lloyd's algorithm and the optimum, in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from jaxcompress.core.errors import InputError
from jaxcompress.factorization.kmeans import kmeans
from jaxcompress.layerwise.kmeans import clusters


def lloyd(values, centers, steps=10_000):
    """Lloyd's algorithm as its definition has it."""
    for _ in range(steps):
        codes = np.abs(values[:, None] - centers).argmin(1)
        means = np.array(
            [values[codes == i].mean() if (codes == i).any() else c for i, c in enumerate(centers)]
        )
        if np.allclose(means, centers, rtol=0, atol=1e-12):
            break
        centers = means
    return centers


def optimum(values, weights, count):
    """The least weighted error of `count` intervals, by dynamic programming over all cuts."""
    order = np.argsort(values)
    v, w = values[order], weights[order]
    sums = [np.concatenate([[0], np.cumsum(x)]) for x in (w, w * v, w * v * v)]

    def error(i, j):
        mass, first, second = (s[j] - s[i] for s in sums)
        return second - first**2 / mass

    least = np.array([0.0] + [np.inf] * len(v))
    for _ in range(count):
        least = np.array(
            [0.0] + [min(least[i] + error(i, j) for i in range(j)) for j in range(1, len(v) + 1)]
        )
    return least[-1]


def error_of(values, weights, centers):
    return (weights * np.square(np.abs(values[:, None] - centers).min(1))).sum()


@pytest.mark.parametrize("count", [2, 8])
def test_lloyd_from_the_linear_start_of_the_paper(count):
    values = np.random.default_rng(count).normal(size=3000).astype(np.float32)
    found = clusters(jnp.asarray(values), jnp.ones(3000), count=count, init="linear", steps=2000)
    wide = values.astype(np.float64)
    want = lloyd(wide, np.linspace(wide.min(), wide.max(), count))
    np.testing.assert_allclose(found, want, atol=2e-3)
    assert error_of(wide, 1, np.asarray(found, np.float64)) == pytest.approx(
        error_of(wide, 1, want), rel=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_drawn_starts_end_near_the_optimum(seed):
    rng = np.random.default_rng(seed)
    values, weights = rng.standard_t(3, size=120), rng.uniform(0.1, 2, size=120)
    best = optimum(values, weights, 6)
    found = clusters(
        jnp.asarray(values, jnp.float32),
        jnp.asarray(weights, jnp.float32),
        count=6,
        init="kmeans++",
        seed=seed,
    )
    assert np.all(np.diff(found) > 0)
    got = error_of(values, weights, np.asarray(found, np.float64))
    assert best * (1 - 1e-5) <= got <= 1.35 * best
    linear = clusters(
        jnp.asarray(values, jnp.float32), jnp.asarray(weights, jnp.float32), count=6, init="linear"
    )
    assert best * (1 - 1e-5) <= error_of(values, weights, np.asarray(linear, np.float64))


@pytest.mark.parametrize("size", slow_but([1, 3, 120, 600], [3, 600]))
@pytest.mark.parametrize("count", [4, 16])
def test_the_optimum_is_found(size, count):
    rng = np.random.default_rng(size)
    values, weights = rng.standard_t(3, size=size), np.exp(2 * rng.normal(size=size))
    weights[0] = 0
    found = clusters(
        jnp.asarray(values, jnp.float32), jnp.asarray(weights, jnp.float32), count=count
    )
    assert bool(jnp.isfinite(found).all())
    best = optimum(values[1:], weights[1:], min(count, size - 1)) if size > 1 else 0
    got = error_of(values, weights, np.asarray(found, np.float64))
    # Of more than 256 values, cuts lie at 256 places.
    assert got <= best * (1 + 1e-4 if size <= 256 else 1.03) + 1e-9


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_every_weight_is_the_nearest_value_of_its_table_and_every_value_their_mean(granularity):
    w = np.random.default_rng(1).normal(size=(8, 96)).astype(np.float32)
    w[:, 0] *= 10
    leaf = kmeans(jnp.asarray(w), bits=3, granularity=granularity, group_size=32)
    scale = np.ones((8, 1)) if leaf.scale is None else np.asarray(leaf.scale, np.float64)
    spread = np.repeat(scale, 96 // scale.shape[-1], -1)
    table = np.broadcast_to(np.asarray(leaf.table, np.float64), (8, 8))
    away = np.abs(w[:, :, None] / spread[:, :, None] - table[:, None])
    np.testing.assert_array_equal(np.asarray(leaf.integers()), away.argmin(-1))
    assert leaf.table.shape[0] == (8 if granularity == "channel" else 1)
    together = (
        np.arange(8)[:, None] == np.arange(8) if granularity == "channel" else np.ones((1, 8))
    )
    for rows in together.astype(bool):
        codes, share, values = (np.asarray(x)[rows] for x in (leaf.integers(), spread, w))
        for code in range(8):
            here = codes == code
            if here.any():
                mean = (share * values)[here].sum() / (share**2)[here].sum()
                assert table[rows][0, code] == pytest.approx(mean, rel=1e-4, abs=1e-5)


def test_stacked_matrices_are_clustered_each_for_itself():
    w = jax.random.normal(jax.random.key(0), (2, 3, 8, 64))
    leaf = kmeans(w, bits=2)
    assert leaf.shape == w.shape
    assert leaf.table.shape == (2, 3, 1, 4)
    np.testing.assert_array_equal(leaf[1, 2].dense(), kmeans(w[1, 2], bits=2).dense())


@pytest.mark.parametrize("init", ["optimal", "kmeans++", "linear"])
@pytest.mark.parametrize("granularity", ["tensor", "group"])
def test_zeros_stay_zero(init, granularity):
    w = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    w[np.abs(w) < 0.8] = 0
    leaf = kmeans(jnp.asarray(w), bits=3, init=init, granularity=granularity, group_size=32)
    got = np.asarray(leaf.dense())
    np.testing.assert_array_equal(got[w == 0], 0)
    assert (got[w != 0] != 0).mean() > 0.99
    assert np.square(got - w).sum() < 0.05 * np.square(w).sum()


def test_few_distinct_values_are_kept_exactly():
    values = np.array([-1.5, -0.25, 0.0, 0.5, 2.0], np.float32)
    w = values[np.random.default_rng(0).integers(0, 5, (6, 40))]
    leaf = kmeans(jnp.asarray(w, jnp.bfloat16), bits=3)
    np.testing.assert_array_equal(np.asarray(leaf.dense(), np.float32), w)
    assert (leaf.dtype, leaf.table.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert not np.any(kmeans(jnp.zeros((4, 32))).dense())


def test_more_bits_err_less_and_weigh_more():
    w = jax.random.normal(jax.random.key(1), (256, 512))
    found = {bits: kmeans(w, bits=bits) for bits in (2, 4, 6)}
    errors = [float(jnp.square(leaf.dense() - w).mean()) for leaf in found.values()]
    # The least error of n values for a normal distribution (Max 1960, table I).
    assert errors[0] == pytest.approx(0.1175, rel=0.02)
    assert errors[1] == pytest.approx(0.00950, rel=0.02)
    assert errors[2] < 0.1 * errors[1]
    assert [leaf.nbytes for leaf in found.values()] == [
        256 * 512 * bits // 8 + 4 * 2**bits for bits in found
    ]


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="bits 9"):
        kmeans(jnp.ones((4, 32)), bits=9)
    with pytest.raises(InputError, match="group size 48"):
        kmeans(jnp.ones((4, 64)), granularity="group", group_size=48)
