"""HQQ against its formulas in NumPy and against the best zero point that a search finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.errors import InputError
from jaxcompress.quantization.hqq import hqq
from jaxcompress.quantization.rtn import rtn

P, BETA, KAPPA = 0.7, 10.0, 1.01


def weights(seed=0, rows=6, columns=64):
    """Heavy tails, as trained weights have; off the middle, as groups of them are."""
    return np.random.default_rng(seed).standard_t(3, size=(rows, columns)) + 0.3


def reference(w, bits, group, steps=20):
    """The formulas row by row in float64: zero points, and the dense matrix."""
    levels = 2**bits - 1
    rows, zeros = [], []
    for row in w.reshape(len(w), -1, group):
        scale = (row.max(-1, keepdims=True) - row.min(-1, keepdims=True)) / levels
        zero = -row.min(-1, keepdims=True) / scale
        zero = np.round(zero) if bits == 4 else zero
        least = np.inf
        for beta in BETA * KAPPA ** np.arange(steps):
            q = np.clip(np.round(row / scale + zero), 0, levels)
            x = row - (q - zero) * scale
            size = np.maximum(np.abs(x), 1e-12)
            error = np.sign(x) * np.maximum(size - size ** (P - 1) / beta, 0)
            zero = (q - (row - error) / scale).mean(-1, keepdims=True)
            if not np.abs(x).mean() < least:
                break
            least = np.abs(x).mean()
        q = np.clip(np.round(row / scale + zero), 0, levels)
        rows.append(((q - zero) * scale).ravel())
        zeros.append(zero.ravel())
    return np.stack(zeros), np.stack(rows)


def loss(w, q):
    return (np.abs(w - np.asarray(q, np.float64)) ** P).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_formulas(bits):
    w = weights(bits, rows=24)
    leaf = hqq(jnp.asarray(w, jnp.float32), bits=bits, group_size=32)
    zeros, dense = reference(w, bits, 32)
    assert isinstance(leaf, Affine)
    assert (leaf.shape, leaf.scale.shape, leaf.zero_point.dtype) == (w.shape, (24, 2), jnp.float32)
    # A weight near a tie may go the other way in float32, and its row another way from there.
    same = np.isclose(np.asarray(leaf.zero_point), zeros, rtol=1e-4, atol=1e-4)
    assert same.mean() > 0.8
    assert loss(w, leaf.dense()) == pytest.approx(loss(w, dense), rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_many_err_less_than_with_the_zero_point_of_the_range(bits):
    w = weights(seed=9, rows=64)
    given = jnp.asarray(w, jnp.float32)
    start, end = (hqq(given, bits=bits, group_size=64, steps=steps) for steps in (0, 20))
    np.testing.assert_array_equal(start.scale, end.scale)
    assert loss(w, end.dense()) < 0.99 * loss(w, start.dense())
    if bits > 2:  # where zero is one of four values, the many are there
        plain = rtn(given, bits=bits, group_size=64, symmetric=False)
        assert loss(w, end.dense()) < loss(w, plain.dense())


def test_rows_layers_and_narrow_dtypes():
    w = jnp.asarray(weights(rows=12), jnp.bfloat16).reshape(3, 4, 64)
    leaf = hqq(w, bits=3, group_size=-1)
    assert (leaf.dtype, leaf.scale.dtype, leaf.scale.shape) == (jnp.bfloat16,) * 2 + ((3, 4, 1),)
    np.testing.assert_array_equal(leaf[1].dense(), hqq(w[1], bits=3, group_size=-1).dense())
    one = hqq(w[1, 2:3], bits=3, group_size=-1).dense()
    np.testing.assert_array_equal(leaf.dense()[1, 2:3], one)
    flat = jnp.full((2, 32), 0.25).at[1].set(0)
    np.testing.assert_allclose(hqq(flat, bits=4, group_size=32).dense(), flat, atol=1e-6)
    assert bool(jnp.isfinite(jax.jit(lambda x: hqq(x).dense())(jnp.zeros((2, 64)))).all())


def test_what_does_not_fit_is_refused():
    for options, words in (
        ({"bits": 16}, "bits 16"),
        ({"group_size": 48}, "group size 48"),
        ({"steps": -1}, "steps -1"),
    ):
        with pytest.raises(InputError, match=words):
            hqq(jnp.ones((2, 64)), **options)
