"""Low rank against closed forms in float64, and ranks against brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.factorization import METHODS, ranks
from jaxcompress.factorization.svd import factorized, survey, svd
from jaxcompress.factorization.whitened_svd import asvd, diagonal_root, svd_llm
from jaxcompress.layerwise.low_rank import cholesky_root
from jaxcompress.methods import compress

N, K, TOKENS = 24, 40, 200
RNG = np.random.default_rng(0)


def matrix(*shape, decay=0.8):
    """A matrix whose singular values fall, as those of trained ones do."""
    u, _, vt = np.linalg.svd(RNG.normal(size=shape), full_matrices=False)
    return (u * decay ** np.arange(u.shape[-1])) @ vt


def inputs(features=K, tokens=TOKENS):
    """Correlated inputs with a few large features."""
    mix = RNG.normal(size=(features, features)) * np.geomspace(8, 0.05, features)
    return RNG.normal(size=(tokens, features)) @ mix


def tail(values, rank):
    return float(np.square(values[rank:]).sum())


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_svd_leaves_exactly_the_small_singular_values(rank):
    w = matrix(N, K)
    low = svd(jnp.asarray(w, jnp.float32), rank=rank)
    assert isinstance(low, LowRank)
    assert (low.rank, low.shape) == (rank, (N, K))
    got = np.square(w - np.asarray(low.dense(), np.float64)).sum()
    want = tail(np.linalg.svd(w, compute_uv=False), rank)
    assert got == pytest.approx(want, rel=1e-4)
    # Balanced: both factors have the same Gram diagonal.
    a, b = np.asarray(low.a, np.float64), np.asarray(low.b, np.float64)
    np.testing.assert_allclose((a**2).sum(0), (b**2).sum(1), rtol=1e-4)


def test_leading_axes_are_matrices_of_their_own():
    w = jnp.asarray(matrix(3, 2, N, K), jnp.float32)
    low = svd(w, rank=4)
    assert low.shape == w.shape
    one = svd(w[1, 0], rank=4)
    np.testing.assert_allclose(low[1, 0].dense(), one.dense(), atol=1e-5)


@pytest.mark.parametrize(("ratio", "rank"), [(0.5, 7), (0.25, 3), (0.001, 1)])
def test_a_ratio_is_the_share_of_the_numbers(ratio, rank):
    low = svd(jnp.ones((N, K)), ratio=ratio)
    assert low.rank == rank
    held = low.a.size + low.b.size
    assert held <= ratio * N * K or rank == 1
    assert held + N + K > ratio * N * K


def test_energy_takes_the_least_rank_that_holds_it():
    w = matrix(N, K)
    values = np.linalg.svd(w, compute_uv=False)
    for energy in (0.5, 0.9, 0.99):
        low = svd(jnp.asarray(w, jnp.float32), energy=energy)
        assert tail(values, low.rank) <= (1 - energy) * tail(values, 0) + 1e-6
        assert tail(values, low.rank - 1) > (1 - energy) * tail(values, 0) - 1e-6
    traced = jax.eval_shape(lambda w: svd(w, energy=0.9), jax.ShapeDtypeStruct((N, K), jnp.float32))
    assert (traced.shape, traced.rank) == ((N, K), N)


def test_what_would_not_be_smaller_stays_as_it_is():
    w = jnp.asarray(matrix(8, 8), jnp.bfloat16)
    assert svd(w, rank=4) is w
    assert svd(w, energy=1.0) is w
    low = svd(w, rank=3)
    assert (low.dtype, low.a.dtype, low.b.dtype) == (w.dtype,) * 3


@pytest.mark.parametrize("tokens", [TOKENS, K // 2])
def test_whitened_svd_has_the_least_error_of_the_outputs(tokens):
    w, x = matrix(N, K), inputs(tokens=tokens)
    moment = jnp.asarray(x.T @ x, jnp.float32)
    weight = jnp.asarray(w, jnp.float32)
    for rank in (2, 6):
        # |X W' - X W'_r|: the best approximation of the outputs, which lies in W's reach.
        best = tail(np.linalg.svd(x @ w.T, compute_uv=False), rank)
        errors = {
            name: np.square(x @ (w - np.asarray(low.dense(), np.float64)).T).sum()
            for name, low in {
                "svd_llm": svd_llm(weight, moment, rank=rank, damp=1e-7),
                "damped": svd_llm(weight, moment, rank=rank),
                "asvd": asvd(weight, jnp.asarray(np.abs(x).sum(0), jnp.float32), rank=rank),
                "svd": svd(weight, rank=rank),
            }.items()
        }
        assert errors["svd_llm"] == pytest.approx(best, rel=0.01)
        assert best < errors["damped"] * 1.0001 < 1.1 * best
        assert errors["svd_llm"] < errors["asvd"] < errors["svd"]


def test_asvd_is_the_svd_of_the_scaled_matrix():
    w, x = matrix(N, K), inputs()
    x[:, 3] = 0  # an input that is never active
    scale = (np.abs(x).sum(0) / np.abs(x).sum(0).max()) ** 0.3
    scale = np.maximum(scale, 1e-6**0.3)
    u, s, vt = np.linalg.svd(w * scale, full_matrices=False)
    want = (u[:, :5] * s[:5]) @ vt[:5] / scale
    low = asvd(jnp.asarray(w, jnp.float32), jnp.asarray(np.abs(x).sum(0)), rank=5, alpha=0.3)
    np.testing.assert_allclose(low.dense(), want, atol=1e-3)
    plain = svd(jnp.asarray(w, jnp.float32), rank=5).dense()
    zero = asvd(jnp.asarray(w, jnp.float32), jnp.asarray(np.abs(x).sum(0)), rank=5, alpha=0.0)
    np.testing.assert_allclose(zero.dense(), plain, atol=1e-4)


def test_stacked_whitening_is_that_of_each():
    w = jnp.asarray(matrix(2, N, K), jnp.float32)
    moments = jnp.stack([jnp.asarray(x.T @ x, jnp.float32) for x in (inputs(), inputs())])
    both = svd_llm(w, moments, rank=4)
    for i in range(2):
        one = svd_llm(w[i], moments[i], rank=4)
        np.testing.assert_allclose(both[i].dense(), one.dense(), atol=1e-4)


# ------------------------------------------------------------------------ the budget


def kept_energy(values, shapes, found):
    whole = [not ranks.pays(n, k, r) for (n, k), r in zip(shapes, found)]
    return sum(1.0 if w else 1 - tail(v, r) / tail(v, 0) for v, r, w in zip(values, found, whole))


def cost(shapes, found):
    return sum(r * (n + k) if ranks.pays(n, k, r) else n * k for (n, k), r in zip(shapes, found))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), ratio=st.floats(0.35, 1.0))
def test_ranks_under_a_budget_are_nearly_those_of_brute_force(seed, ratio):
    rng = np.random.default_rng(seed)
    shapes = [(12, 12), (16, 8), (10, 20)]
    values = [np.sort(rng.exponential(size=min(s)) ** 2)[::-1] for s in shapes]
    found = ranks.allocate(values, shapes, ratio)
    budget = ratio * sum(n * k for n, k in shapes)
    assert cost(shapes, found) <= budget
    every = [range(1, min(s) + 1) for s in shapes]
    best = max(
        kept_energy(values, shapes, choice)
        for choice in itertools.product(*every)
        if cost(shapes, choice) <= budget
    )
    # Greedy loses at most what one more purchase would earn.
    assert kept_energy(values, shapes, found) > best - 0.35
    assert kept_energy(values, shapes, found) <= best + 1e-9


def test_the_budget_goes_where_the_energy_is():
    flat, steep = np.ones(32), 0.3 ** np.arange(32)
    found = ranks.allocate([flat, steep], [(32, 32), (32, 32)], 0.5)
    assert found[1] < 8 < found[0]
    assert ranks.allocate([flat, flat], [(32, 32), (32, 32)], 1.0) == [32, 32]
    stacked = ranks.allocate([np.stack([flat, steep]), flat], [(32, 32)] * 2, 0.4)
    assert cost([(32, 32)] * 3, [stacked[0], *stacked]) <= 0.4 * 3 * 32 * 32
    with pytest.raises(InputError, match="not even rank 1"):
        ranks.allocate([flat], [(32, 32)], 0.01)


def test_a_survey_decides_over_all_matrices():
    steep = jnp.asarray(matrix(32, 32, decay=0.3), jnp.float32)
    flat = jnp.asarray(RNG.normal(size=(32, 32)), jnp.float32)
    x = RNG.normal(size=(64, 32))
    statistics = {"second_moment": jnp.asarray(x.T @ x, jnp.float32)}
    for root_of, given_ in ((lambda: None, {}), (cholesky_root, statistics)):
        pairs = [(steep, {**given_, "path": "a"}), (flat, {**given_, "path": "b"})]
        assert survey(root_of, lambda pairs=pairs: pairs) is None
        each = survey(root_of, lambda pairs=pairs: pairs, allocate="global", ratio=0.4)
        done = [decide(w, **given_) for decide, (w, _) in zip(each, pairs)]
        assert done[0].rank < done[1].rank
        assert sum(low.a.size + low.b.size for low in done) <= 0.4 * 2 * 32 * 32
    with pytest.raises(InputError, match="needs a ratio"):
        survey(diagonal_root, list, allocate="global", rank=3)


@pytest.mark.parametrize("method", ["svd", "svd_llm", "asvd"])
def test_one_budget_for_a_model(method):
    """Through `compress`: the steep matrix gets fewer numbers, all of them together the budget."""
    params = {
        "steep": jnp.asarray(matrix(32, 32, decay=0.3), jnp.float32),
        "flat": jnp.asarray(RNG.normal(size=(32, 32)), jnp.float32),
    }
    model = Model(lambda p, x: jnp.tanh(x @ p["steep"]) @ p["flat"], params)
    data = {} if method == "svd" else {"calibration": RNG.normal(size=(64, 32)).astype(np.float32)}
    small = compress(model, method, include="*", ratio=0.4, allocate="global", **data).params
    assert small["steep"].rank < small["flat"].rank
    assert sum(low.a.size + low.b.size for low in small.values()) <= 0.4 * 2 * 32 * 32


def test_what_does_not_fit_is_refused():
    w = jnp.ones((4, 8))
    with pytest.raises(InputError, match="rank and energy: give one"):
        factorized(w, None, rank=1, energy=0.5)
    with pytest.raises(InputError, match=r"ratio 1\.5: must be a share"):
        svd(w, ratio=1.5)
    with pytest.raises(InputError, match="rank 0"):
        svd(w, rank=0)


def test_every_method_says_what_it_needs():
    assert METHODS["svd"].needs == METHODS["kmeans"].needs == METHODS["loftq"].needs == "nothing"
    assert METHODS["svd_llm"].statistics == METHODS["qera"].statistics == ("second_moment",)
    assert METHODS["asvd"].statistics == ("sum_abs",)
    for name, method in METHODS.items():
        assert method.summary, name
        for option in method.options.values():
            assert option.help, f"{name}: {option.name}"
