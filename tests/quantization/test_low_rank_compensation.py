"""Low rank parts that mend quantized weights, against closed forms in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.errors import InputError
from jaxcompress.layerwise.grid import grid_of, nearest
from jaxcompress.layerwise.low_rank import cholesky_root, compensated
from jaxcompress.quantization.low_rank import eora, svdquant

N, K, TOKENS = 24, 64, 400
RNG = np.random.default_rng(0)
X = RNG.normal(size=(TOKENS, K)) @ RNG.normal(size=(K, K)) * np.geomspace(4, 0.1, K)
W = RNG.normal(size=(N, K)) + 3 * RNG.normal(size=(N, 2)) @ RNG.normal(size=(2, K))
GIVEN = jnp.asarray(W, jnp.float32), jnp.asarray(X.T @ X, jnp.float32)
OPTIONS = {"rank": 4, "bits": 3, "group_size": 16}


def output_error(leaf):
    return np.square(X @ (W - np.asarray(leaf.dense(), np.float64)).T).sum()


def error(leaf):
    return np.square(W - np.asarray(leaf.dense(), np.float64)).sum()


def eigenspace_projection(d, rank):
    """EoRA's section 3.2: the truncated SVD of D Q sqrt(L), taken back."""
    values, vectors = np.linalg.eigh(X.T @ X)
    root = vectors * np.sqrt(np.maximum(values, 0))
    u, s, vt = np.linalg.svd(d @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_eora_is_the_projection_of_the_paper(rounding):
    leaf = eora(*GIVEN, rounding=rounding, **OPTIONS)
    assert isinstance(leaf, Sum)
    assert [type(part) for part in leaf.parts] == [LowRank, Affine]
    rest = np.asarray(leaf.second.dense(), np.float64)
    want = np.square(X @ (W - rest - eigenspace_projection(W - rest, 4)).T).sum()
    least = np.square(np.linalg.svd(X @ (W - rest).T, compute_uv=False)[4:]).sum()
    assert want == pytest.approx(least, rel=1e-6)
    assert output_error(leaf) == pytest.approx(least, rel=0.02)
    assert output_error(leaf) < 0.8 * output_error(leaf.second)


def test_gptq_leaves_less_to_mend():
    found = {how: eora(*GIVEN, rounding=how, **OPTIONS) for how in ("nearest", "gptq")}
    assert output_error(found["gptq"]) < 0.7 * output_error(found["nearest"])
    plain = nearest(grid_of(bits=3, group_size=16), GIVEN[0])
    np.testing.assert_array_equal(found["nearest"].second.dense(), plain.dense())


def test_any_quantized_matrix_is_mended():
    rest = nearest(grid_of("int", bits=2, group_size=32, symmetric=False), GIVEN[0])
    root = cholesky_root(GIVEN[1])
    errors = [output_error(compensated(GIVEN[0], rest, rank, root)) for rank in (1, 4, 16, N)]
    assert sorted(errors, reverse=True) == errors
    assert errors[-1] < 1e-6 * output_error(rest)
    plain = compensated(GIVEN[0], rest, 4)
    s = np.linalg.svd(W - np.asarray(rest.dense(), np.float64), compute_uv=False)
    assert error(plain) == pytest.approx(np.square(s[4:]).sum(), rel=1e-4)


def rounded(w, bits, group):
    runs = w.reshape(N, -1, group)
    scale = np.abs(runs).max(-1, keepdims=True) / ((2**bits - 1) / 2)
    q = np.clip(np.round(runs / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (q * scale).reshape(w.shape)


def best(w, rank):
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("iterations", [1, 3])
def test_svdquant_takes_the_low_rank_first(iterations):
    low = best(W, 4)
    for _ in range(iterations - 1):
        low = best(W - rounded(W - low, 3, 16), 4)
    want = np.square(W - low - rounded(W - low, 3, 16)).sum()
    leaf = svdquant(GIVEN[0], iterations=iterations, **OPTIONS)
    # A weight on a tie may be rounded the other way in float32.
    assert error(leaf) == pytest.approx(want, rel=0.03)
    assert error(leaf) < 0.7 * np.square(W - rounded(W, 3, 16)).sum()


def test_other_formats_dtypes_and_stacks():
    w = jnp.stack([GIVEN[0], 2 * GIVEN[0]]).astype(jnp.bfloat16)
    moments = jnp.stack([GIVEN[1]] * 2)
    leaf = eora(w, moments, rank=2, dtype="nf4", group_size=64)
    assert (leaf.dtype, leaf.first.a.dtype, leaf.shape) == (jnp.bfloat16, jnp.bfloat16, w.shape)
    one = jax.jit(lambda w, h: eora(w, h, rank=2, dtype="nf4", group_size=64).dense())
    got, want = (np.asarray(x, np.float32) for x in (leaf.dense()[1], one(w[1], moments[1])))
    assert np.abs(got - want).mean() < 0.02 * np.abs(want).mean()
    assert svdquant(w, rank=2, dtype="fp8", group_size=64).shape == w.shape


def test_what_does_not_fit_is_refused():
    for options, words in (
        ({"rank": 25}, "rank 25: 1 to 24"),
        ({"rank": 0}, "rank 0"),
        ({"group_size": 48}, "group size 48"),
        ({"dtype": "int99"}, "99"),
    ):
        with pytest.raises(InputError, match=words):
            eora(*GIVEN, **{**OPTIONS, **options})
    with pytest.raises(InputError, match="iterations 0"):
        svdquant(GIVEN[0], iterations=0, **OPTIONS)
