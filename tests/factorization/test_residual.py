"""Low rank plus a quantized rest: better than either, by the papers' own definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.codebook import Codebook
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.errors import InputError
from jaxcompress.factorization.kmeans import kmeans
from jaxcompress.factorization.residual import loftq, qera
from jaxcompress.layerwise.grid import grid_of, nearest
from jaxcompress.layerwise.low_rank import split

N, K = 32, 64
RNG = np.random.default_rng(0)


def weight():
    w = RNG.normal(size=(N, K))
    w += 4 * RNG.normal(size=(N, 2)) @ RNG.normal(size=(2, K)) / 2
    return w


def error(w, leaf):
    return np.square(w - np.asarray(leaf.dense(), np.float64)).sum()


def grid(w, bits, group):
    """Round to nearest in NumPy, float64."""
    runs = w.reshape(N, -1, group)
    scale = np.abs(runs).max(-1, keepdims=True) / ((2**bits - 1) / 2)
    q = np.clip(np.round(runs / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (q * scale).reshape(w.shape)


def best(w, rank):
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_loftq_is_the_alternation_of_the_paper():
    w = weight()
    low = np.zeros_like(w)
    for _ in range(3):
        rest = grid(w - low, 3, 16)
        low = best(w - rest, 4)
    leaf = loftq(jnp.asarray(w, jnp.float32), rank=4, bits=3, group_size=16, iterations=3)
    assert isinstance(leaf, Sum)
    assert [type(part) for part in leaf.parts] == [LowRank, Affine]
    # A weight on a tie may be rounded the other way in float32.
    assert error(w, leaf) == pytest.approx(np.square(w - low - rest).sum(), rel=0.02)


def test_each_part_helps():
    w = weight()
    given = jnp.asarray(w, jnp.float32)
    alone = error(w, nearest(grid_of(bits=3, group_size=16), given))
    for turns in (1, 5):
        both = error(w, loftq(given, rank=4, bits=3, group_size=16, iterations=turns))
        assert both < 0.85 * min(alone, np.square(w - best(w, 4)).sum())


def test_qera_mends_the_outputs():
    w = weight()
    x = RNG.normal(size=(300, K)) * np.geomspace(5, 0.05, K)
    rest = grid(w, 3, 16)
    least = np.square(np.linalg.svd(x @ (w - rest).T, compute_uv=False)[4:]).sum()
    moment = jnp.asarray(x.T @ x, jnp.float32)
    leaf = qera(jnp.asarray(w, jnp.float32), moment, rank=4, bits=3, group_size=16, damp=1e-7)
    got = np.square(x @ (w - np.asarray(leaf.dense(), np.float64)).T).sum()
    assert got == pytest.approx(least, rel=0.02)


def test_the_rest_may_be_in_any_format():
    w = weight()
    leaf = split(jnp.asarray(w, jnp.bfloat16), lambda m: kmeans(m, bits=2), 4)
    assert isinstance(leaf.second, Codebook)
    assert leaf.dtype == leaf.first.a.dtype == jnp.bfloat16
    with pytest.raises(InputError, match="rank 33: 1 to 32"):
        loftq(jnp.ones((N, K)), rank=33)
    with pytest.raises(InputError, match="iterations 0"):
        loftq(jnp.ones((N, K)), iterations=0)
