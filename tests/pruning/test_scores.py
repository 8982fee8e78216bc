"""Every criterion against its formula in NumPy; Wanda against the paper's own procedure."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.core.errors import InputError
from jaxcompress.pruning import METHODS
from jaxcompress.pruning.scores import SCORES
from jaxcompress.pruning.unstructured import method

N, K, TOKENS = 12, 16, 40


def case(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(TOKENS, K)) * np.exp(rng.normal(size=K))
    gradients = rng.normal(size=(5, N, K))
    return {
        "weight": rng.normal(size=(N, K)),
        "sum_squares": (x**2).sum(0),
        "second_moment": x.T @ x,
        "gradient": gradients.mean(0),
        "squared_gradient": (gradients**2).mean(0),
        "gradient_variance": gradients.var(0),
        "hessian_gradient": rng.normal(size=(N, K)),
        "synflow": np.abs(rng.normal(size=(N, K))),
    }


def lamp_of(w):
    squares = np.sort(w.reshape(-1) ** 2)
    return np.array([v**2 / squares[squares >= v**2].sum() for v in w.reshape(-1)]).reshape(w.shape)


def obs_of(w, h, damp=0.01):
    inverse = np.linalg.inv(h + damp * np.diag(h).mean() * np.eye(len(h)))
    return w**2 / np.diag(inverse)


def ria_of(w, squares, a=0.5):
    size = np.abs(w)
    relative = size / size.sum(0, keepdims=True) + size / size.sum(1, keepdims=True)
    return relative * np.sqrt(squares) ** a


FORMULAS = {
    "magnitude": lambda s: np.abs(s["weight"]),
    "sensitivity": lambda s: np.abs(s["gradient"]),
    "taylor": lambda s: np.abs(s["weight"] * s["gradient"]),
    "snip": lambda s: np.abs(s["weight"] * s["gradient"]),
    "fisher": lambda s: s["weight"] ** 2 * s["squared_gradient"] / 2,
    "grasp": lambda s: s["weight"] * s["hessian_gradient"],
    "synflow": lambda s: np.abs(s["weight"]) * s["synflow"],
    "wanda": lambda s: np.abs(s["weight"]) * np.sqrt(s["sum_squares"]),
    "ria": lambda s: ria_of(s["weight"], s["sum_squares"]),
    "signal_to_noise": lambda s: s["gradient"] ** 2 / s["gradient_variance"],
    "reconstruction": lambda s: s["weight"] ** 2 * s["sum_squares"],
    "obs": lambda s: obs_of(s["weight"], s["second_moment"]),
    "lamp": lambda s: lamp_of(s["weight"]),
}


def given_to(name, values):
    names = [
        p.name
        for p in inspect.signature(SCORES[name]).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    return [jnp.asarray(values[n], jnp.float32) for n in names]


def test_every_score_has_a_formula_here():
    assert set(FORMULAS) | {"random"} == set(SCORES)


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_a_score_is_its_formula_alone_and_stacked(name):
    cases = [case(seed) for seed in (0, 1)]
    score = jax.jit(SCORES[name])
    each = [np.array(score(*given_to(name, c))) for c in cases]
    for found, values in zip(each, cases, strict=True):
        np.testing.assert_allclose(found, FORMULAS[name](values), rtol=2e-4)
    pairs = zip(*(given_to(name, c) for c in cases), strict=True)
    together = np.array(score(*(jnp.stack(pair) for pair in pairs)))
    np.testing.assert_allclose(together, np.stack(each), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_a_method_removes_the_lowest_scores(name):
    """By default in the scope of its paper, from whatever the score function says."""
    given = given_to(name, case())
    chosen = METHODS[name]
    options = {"scope": "layer"} if chosen.options["scope"].default == "global" else {}
    out = np.array(chosen.function(*given, sparsity=0.3, **options))
    scores = np.array(jax.jit(SCORES[name])(*given))
    removed = out == 0
    if chosen.options["scope"].default == "row":
        assert (removed.sum(1) == int(0.3 * K)).all()
        for row, gone in zip(scores, removed, strict=True):
            assert row[gone].max() <= row[~gone].min()
    else:
        assert removed.sum() == math.floor(0.3 * N * K)
        assert scores[removed].max() <= scores[~removed].min()
    np.testing.assert_array_equal(out[~removed], np.array(given[0])[~removed])


def test_obs_is_the_error_left_once_the_others_make_up_for_it():
    """For each weight: the least squared error in the output with that weight at zero."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(TOKENS, K)) @ rng.normal(size=(K, K))
    w = rng.normal(size=K)
    given = jnp.asarray(w[None], jnp.float32), jnp.asarray(x.T @ x, jnp.float32)
    scores = jax.jit(functools.partial(SCORES["obs"], damp=0.0))(*given)
    for j in range(K):
        others = np.delete(x, j, axis=1)
        fitted, *_ = np.linalg.lstsq(others, x @ w, rcond=None)
        error = ((others @ fitted - x @ w) ** 2).sum()
        assert float(scores[0, j]) == pytest.approx(error, rel=2e-2)


def test_obs_of_an_input_that_is_always_zero_is_zero():
    values = case()
    h = values["second_moment"].copy()
    h[3] = h[:, 3] = 0
    scores = np.array(jax.jit(SCORES["obs"])(*given_to("obs", {**values, "second_moment": h})))
    assert (scores[:, 3] == 0).all()
    assert (np.delete(scores, 3, axis=1) > 0).all()


# ------------------------------------------------------------------------------- Wanda's paper


def wanda_of_the_paper(weight, norms, sparsity=None, n_m=None):
    """The pseudocode of arXiv:2306.11695 (algorithm 1, and its n:m form), True = kept."""
    metric = torch.from_numpy(np.abs(weight)) * torch.from_numpy(norms)
    gone = torch.zeros(metric.shape, dtype=torch.bool)
    if n_m is None:
        order = torch.sort(metric, dim=-1, stable=True)[1]
        gone.scatter_(1, order[:, : int(metric.shape[1] * sparsity)], True)
    else:
        n, m = n_m
        for at in range(0, metric.shape[1], m):
            lowest = torch.topk(metric[:, at : at + m], m - n, dim=1, largest=False)[1]
            gone.scatter_(1, at + lowest, True)
    return ~gone.numpy()


@given(st.integers(0, 10_000))
def test_wanda_makes_the_papers_mask_for_half_and_for_2_of_4(seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(24, 32)).astype(np.float32)
    squares = rng.gamma(0.5, size=32).astype(np.float32)
    given = jnp.asarray(weight), jnp.asarray(squares)
    wanda = METHODS["wanda"].function
    norms = np.sqrt(squares)
    np.testing.assert_array_equal(
        np.array(wanda(*given, sparsity=0.5) != 0), wanda_of_the_paper(weight, norms, sparsity=0.5)
    )
    np.testing.assert_array_equal(
        np.array(wanda(*given, pattern="2:4") != 0), wanda_of_the_paper(weight, norms, n_m=(2, 4))
    )


def test_wanda_of_a_large_matrix_in_bfloat16_has_the_papers_mask():
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(96, 256)), jnp.bfloat16)  # many equal scores
    squares = rng.gamma(0.5, size=256).astype(np.float32)
    out = METHODS["wanda"].function(weight, jnp.asarray(squares), sparsity=0.5)
    assert out.dtype == jnp.bfloat16
    expected = wanda_of_the_paper(np.array(weight, np.float32), np.sqrt(squares), sparsity=0.5)
    np.testing.assert_array_equal(np.array(out != 0), expected)


# ------------------------------------------------------------------------------------- the rest


def test_random_masks_differ_by_matrix_and_seed_and_stacking_changes_nothing():
    weight = jax.random.normal(jax.random.key(0), (3, 32, 32))
    prune = METHODS["random"].function
    masks = np.array(prune(weight) == 0)
    assert (masks.sum((1, 2)) == 512).all()
    np.testing.assert_array_equal(masks[1], np.array(prune(weight[1]) == 0))
    for one, other in [
        (masks[0], masks[1]),
        (masks[0], np.array(prune(weight, random_seed=1) == 0)[0]),
    ]:
        assert 0.4 < (one != other).mean() < 0.6  # independent: half
    np.testing.assert_array_equal(masks, np.array(prune(weight) == 0))


def test_lamp_is_magnitude_within_a_layer_and_keeps_the_largest_of_every_layer():
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(3, 8, 8)) * np.array([1, 1e-3, 1e2])[:, None, None])
    out = np.array(METHODS["lamp"].function(weight.astype(jnp.float32), sparsity=0.98))
    kept = (out != 0).reshape(3, -1)
    assert kept.sum() == 192 - int(0.98 * 192)
    size = np.abs(np.array(weight, np.float32)).reshape(3, -1)
    for layer in range(3):
        assert kept[layer, size[layer].argmax()]
        assert size[layer][kept[layer]].min() >= size[layer][~kept[layer]].max()


def test_lamp_of_equal_weights_goes_by_index():
    out = np.array(METHODS["lamp"].function(jnp.ones((2, 4)), sparsity=0.5, scope="layer"))
    np.testing.assert_array_equal(out, [[0, 0, 0, 0], [1, 1, 1, 1]])


def test_grasp_removes_the_most_negative_first():
    weight = jnp.asarray([[1.0, -2.0, 3.0, -4.0]])
    flow = jnp.asarray([[1.0, 1.0, -1.0, -1.0]])  # scores 1, -2, -3, 4
    out = METHODS["grasp"].function(weight, flow, sparsity=0.5)
    np.testing.assert_array_equal(np.array(out), [[1.0, 0.0, 0.0, -4.0]])


@pytest.mark.parametrize("deviations", [0.5, 1.0, 2.5])
def test_threshold_keeps_what_is_as_large_as_so_many_deviations(deviations):
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(2, 20, 30)) * np.array([1, 7])[:, None, None]).astype(np.float32)
    out = np.array(METHODS["threshold"].function(jnp.asarray(weight), deviations=deviations))
    for w, pruned in zip(weight, out, strict=True):
        np.testing.assert_array_equal(pruned, np.where(np.abs(w) >= deviations * w.std(), w, 0))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: METHODS["threshold"].function(jnp.ones((2, 2)), deviations=-1.0), "deviations -1"),
        (
            lambda: METHODS["taylor"].function(jnp.ones((2, 2)), jnp.full((2, 2), jnp.nan)),
            "taylor: scores are NaN or infinite",
        ),
        (lambda: METHODS["magnitude"].function(jnp.ones((2, 2)), pattern="rows"), "pattern 'rows'"),
        (lambda: METHODS["magnitude"].function(jnp.ones((2, 2)), sparsity=1.0), "sparsity 1.0"),
    ],
)
def test_bad_input_is_one_clear_line(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_score_of_ones_own_is_a_method_with_its_options_and_statistics():
    def spread(weight: jax.Array, max_abs: jax.Array, *, power: float = 2.0) -> jax.Array:
        """Spread: |w| times a power of the largest input.

        Args:
          weight: the matrix.
          max_abs: of each input.
          power: of the input.
        """
        return jnp.abs(weight) * max_abs[..., None, :] ** power

    made = method(spread, scope="row")
    assert made.statistics == ("max_abs",)
    assert made.needs == "calibration"
    assert made.summary == "Spread: |w| times a power of the largest input."
    options = made.options
    assert options["power"].default == 2.0
    assert options["power"].help == "of the input."
    assert options["scope"].default == "row"
    assert options["scope"].choices == ("layer", "row", "global")
    assert all(option.help for option in options.values())
    out = made.function(jnp.ones((2, 3)), max_abs=jnp.asarray([1.0, 3.0, 2.0]), sparsity=0.34)
    np.testing.assert_array_equal(np.array(out), [[0, 1, 1]] * 2)
