"""Sparse arrays: which masks they hold, exactly, and how they nest. Decoding: `test_suite.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.core.arrays.affine import encode_affine, minmax_range
from jaxcompress.core.arrays.base import STORED
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.arrays.sparse import NMSparse, UnstructuredSparse
from jaxcompress.core.errors import InputError


@settings(max_examples=8)
@given(
    ratio=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8), (5, 32)]),
    runs=st.sampled_from([1, 6]),
    seed=st.integers(0, 2**31),
)
def test_runs_that_keep_fewer_than_n_come_back(ratio, runs, seed):
    n, m = ratio
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(3, runs * m)).astype(np.float32)
    ranks = rng.permuted(np.tile(np.arange(m), (3, runs, 1)), axis=-1)
    mask = (ranks < rng.integers(0, n + 1, (3, runs, 1))).reshape(matrix.shape)
    matrix[:, :2] = [-0.0, np.inf]
    leaf = NMSparse.from_mask(jnp.asarray(matrix), mask, n, m)
    decoded = np.asarray(leaf.decode())
    expected = np.where(mask, matrix, np.float32(0))
    np.testing.assert_array_equal(decoded.view(np.int32), expected.view(np.int32))
    counts = np.asarray(leaf.mask()).reshape(3, runs, m).sum(-1)
    np.testing.assert_array_equal(counts, n)
    assert not np.any(mask & ~np.asarray(leaf.mask()))


@settings(max_examples=8)
@given(columns=st.sampled_from([1, 32, 70]), density=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_any_mask_comes_back(columns, density, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(2, 3, columns)).astype(np.float32)
    mask = rng.random(matrix.shape) < density
    leaf = UnstructuredSparse.from_mask(jnp.asarray(matrix), mask)
    assert leaf.values.shape[-1] == mask.sum(-1).max()
    np.testing.assert_array_equal(leaf.mask(), mask)
    np.testing.assert_array_equal(leaf.decode(), np.where(mask, matrix, 0))
    # Past a row's own count there are zeros.
    room = np.arange(leaf.values.shape[-1]) >= mask.sum(-1, keepdims=True)
    assert not np.any(np.asarray(leaf.values)[room])


def test_bits_per_weight():
    """2:4 of int4 with groups of 32 kept: (4 + 2 + 16 / 32) / 2; unstructured: 1 + 16 density."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 256)), jnp.bfloat16)
    mask = np.tile(np.arange(256) % 4 < 2, (8, 1))

    def int4(values):
        scale, _ = minmax_range(values, bits=4, groups=4, symmetric=True)
        return encode_affine(values, scale, None, bits=4, dims=STORED)

    nested = NMSparse.from_mask(w, mask, 2, 4, encode=int4)
    assert 8 * nested.nbytes / nested.size == (4 + 2 + 16 / 32) / 2
    half = UnstructuredSparse.from_mask(w, mask)
    assert 8 * half.nbytes / half.size == 1 + 16 / 2


def test_made_under_jit():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), jnp.float32)

    @jax.jit
    def both(w):
        mask = jnp.abs(w) >= jnp.sort(jnp.abs(w).reshape(4, 16, 4), -1)[..., 2:3].repeat(
            4, -1
        ).reshape(4, 64)
        return (
            NMSparse.from_mask(w, mask, 2, 4),
            UnstructuredSparse.from_mask(w, mask, cap=40),
            jnp.where(mask, w, 0),
        )

    n_of_m, unstructured, expected = both(w)
    np.testing.assert_array_equal(n_of_m.decode(), expected)
    np.testing.assert_array_equal(unstructured.decode(), expected)
    assert unstructured.values.shape == (4, 40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w, m: NMSparse.from_mask(w, m, 2, 4), "mask: keeps 4 of 4 columns somewhere; 2:4"),
        (lambda w, m: NMSparse.from_mask(w, m, 2, 5), "2:5: 64 contracted columns"),
        (lambda w, m: NMSparse.from_mask(w, m, 5, 4), "5:4: keep 1 to m"),
        (lambda w, m: UnstructuredSparse.from_mask(w, m, cap=63), "cap 63: a row .* keeps 64"),
        (lambda w, m: Sum.of(LowRank(w[:, :2], w[:2])), "1 part"),
        (
            lambda w, m: Sum.of(LowRank(w[:, :2], w[:2]), LowRank(w[:, :2], w[:2], STORED)),
            "cannot be added",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make(jnp.ones((4, 64)), jnp.ones((4, 64), bool))


def test_a_sum_of_three_and_a_low_rank_product_without_the_dense_matrix():
    rng = np.random.default_rng(0)
    parts = [
        LowRank(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((512, 2), (2, 512))))
        for _ in range(3)
    ]
    total = Sum.of(*parts)
    x = jnp.asarray(rng.normal(size=(3, 512)), jnp.float32)
    wanted = sum(
        np.asarray(x, float) @ (np.asarray(p.a, float) @ np.asarray(p.b, float)).T for p in parts
    )
    np.testing.assert_allclose(total.product(x, "k"), wanted, rtol=1e-4, atol=1e-3)
    run = jax.jit(lambda total, x: jax.grad(lambda x: total.product(x, "k").sum())(x))
    assert "512,512" not in run.lower(total, x).as_text().replace("x", ",")
