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


def reference(w, bits, group, steps=20, whole_start=False):
    """The formulas group by group in float64: scales, zero points, dense."""
    runs = w.reshape(-1, group)
    levels = 2**bits - 1
    dense = np.empty_like(runs)
    zeros = np.empty(len(runs))
    for i, g in enumerate(runs):
        scale = (g.max() - g.min()) / levels
        zero = -g.min() / scale
        zero = np.round(zero) if whole_start else zero
        tried = []
        for beta in BETA * KAPPA ** np.arange(steps + 1):
            q = np.clip(np.round(g / scale + zero), 0, levels)
            x = g - (q - zero) * scale
            tried.append(((np.abs(x) ** P).sum(), zero, (q - zero) * scale))
            size = np.maximum(np.abs(x), 1e-12)
            error = np.sign(x) * np.maximum(size - size ** (P - 1) / beta, 0)
            zero = (q - (g - error) / scale).mean()
        _, zeros[i], dense[i] = min(tried, key=lambda t: t[0])
    return zeros, dense.reshape(w.shape)


def loss(w, q):
    return (np.abs(w - np.asarray(q, np.float64)) ** P).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_formulas(bits):
    w = weights(bits)
    leaf = hqq(jnp.asarray(w, jnp.float32), bits=bits, group_size=32)
    zeros, dense = reference(w, bits, 32, whole_start=bits == 4)
    assert isinstance(leaf, Affine)
    assert (leaf.shape, leaf.scale.shape, leaf.zero_point.dtype) == (w.shape, (6, 2), jnp.float32)
    # A weight near a tie may go the other way in float32, and its group another way from there.
    same = np.isclose(np.asarray(leaf.zero_point).ravel(), zeros, rtol=1e-3, atol=1e-3)
    assert same.mean() >= (0.5 if bits == 8 else 0.75)
    assert loss(w, leaf.dense()) == pytest.approx(loss(w, dense), rel=0.02)


@pytest.mark.parametrize("bits", [3, 4])
def test_zero_points_are_nearly_the_best_there_are(bits):
    w = weights(seed=9, rows=8, columns=32)
    leaf = hqq(jnp.asarray(w, jnp.float32), bits=bits, group_size=32)
    levels = 2**bits - 1
    scale = (w.max(1) - w.min(1)) / levels
    shifts = np.linspace(-0.5, 0.5, 401)[:, None, None]

    def losses(zero):
        q = np.clip(np.round(w / scale[:, None] + zero), 0, levels)
        return (np.abs(w - (q - zero) * scale[:, None]) ** P).sum(-1)

    start = (-w.min(1) / scale)[:, None]
    best, first = losses(start + shifts).min(0), losses(start)
    got = (np.abs(w - np.asarray(leaf.dense(), np.float64)) ** P).sum(-1)
    assert got.sum() < first.sum()
    assert got.sum() - best.sum() < 0.75 * (first.sum() - best.sum())


def test_whole_zero_points_keep_zeros_and_are_no_worse_than_rounding():
    w = weights(rows=16)
    w[np.abs(w) < 0.5] = 0
    given = jnp.asarray(w, jnp.float32)
    for bits in (3, 4):
        leaf = hqq(given, bits=bits, group_size=32, zero="integer")
        assert leaf.zero_point.dtype == jnp.uint8
        np.testing.assert_array_equal(np.asarray(leaf.dense())[w == 0], 0)
        plain = rtn(given, bits=bits, group_size=32, symmetric=False)
        assert loss(w, leaf.dense()) <= loss(w, plain.dense()) * (1 + 1e-6)
        np.testing.assert_array_equal(leaf.scale, plain.scale)


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
