"""Patterns against brute force in NumPy."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.core.errors import InputError
from jaxcompress.pruning import patterns


def brute_mask(scores: np.ndarray, count: int) -> np.ndarray:
    order = np.argsort(scores, kind="stable")
    mask = np.ones(scores.shape, bool)
    mask[order[:count]] = False
    return mask


scores_strategy = st.builds(
    lambda seed, n, k, ties: (
        np.abs(np.random.default_rng(seed).normal(size=(n, k))).astype(np.float32)
        if not ties
        else np.random.default_rng(seed).integers(0, 3, (n, k)).astype(np.float32)
    ),
    st.integers(0, 1000),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([4, 12, 24]),
    st.booleans(),
)
sparsity_strategy = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.999])


@given(scores_strategy, sparsity_strategy)
def test_rows_and_layers_equal_a_stable_sort(scores, sparsity):
    exact = Fraction(str(sparsity))
    per_row = np.array(patterns.keep_per_row(jnp.asarray(scores), sparsity))
    expected = np.stack([brute_mask(row, int(exact * row.size)) for row in scores])
    np.testing.assert_array_equal(per_row, expected)
    per_layer = np.array(patterns.keep_per_layer(jnp.asarray(scores), sparsity))
    np.testing.assert_array_equal(
        per_layer, brute_mask(scores.reshape(-1), int(exact * scores.size)).reshape(scores.shape)
    )


@given(st.lists(scores_strategy, min_size=1, max_size=4), sparsity_strategy)
def test_global_threshold_equals_a_stable_sort_of_everything(matrices, sparsity):
    thresholds = patterns.global_thresholds(lambda: iter(matrices), sparsity)
    masks = [
        np.array(patterns.keep_above(jnp.asarray(scores), threshold)).reshape(-1)
        for scores, threshold in zip(matrices, thresholds, strict=True)
    ]
    everything = np.concatenate([m.reshape(-1) for m in matrices])
    expected = brute_mask(everything, int(Fraction(str(sparsity)) * everything.size))
    np.testing.assert_array_equal(np.concatenate(masks), expected)


@given(scores_strategy, st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4)]))
def test_n_of_m_keeps_the_best_of_every_group(scores, n_m):
    n, m = n_m
    mask = np.array(patterns.keep_n_of_m(jnp.asarray(scores), n, m)).reshape(-1, m)
    expected = np.stack([brute_mask(g, m - n) for g in scores.reshape(-1, m)])
    np.testing.assert_array_equal(mask, expected)


def test_leading_axes_are_separate_units():
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (3, 4, 8)))
    together = patterns.keep_per_layer(scores, 0.4)
    for i in range(3):
        np.testing.assert_array_equal(together[i], patterns.keep_per_layer(scores[i], 0.4))


@given(st.integers(1, 10_000), st.decimals(0, "0.999", places=3))
def test_removed_count_reads_the_sparsity_as_a_decimal(n, sparsity):
    assert patterns.removed_count(n, float(sparsity)) == int(Fraction(str(sparsity)) * n)


@pytest.mark.parametrize("amount", [0.1, 0.25, 0.5, 0.35])
@pytest.mark.parametrize("n", [5, 10, 14, 30])
def test_nearest_rounding_is_that_of_torch_prune(amount, n):
    layer = torch.nn.Linear(n, 1, bias=False)
    torch.nn.utils.prune.l1_unstructured(layer, "weight", amount)
    scores = jnp.abs(jnp.asarray(layer.weight_orig.detach().numpy()))
    mask = patterns.keep_per_layer(scores, amount, rounding="nearest")
    np.testing.assert_array_equal(np.array(mask), layer.weight_mask.numpy().astype(bool))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: patterns.removed_count(10, 1.5), "sparsity 1.5"),
        (lambda: patterns.removed_count(10, -0.1), "sparsity -0.1"),
        (lambda: patterns.removed_count(10, 0.5, "up"), "rounding"),
        (lambda: patterns.parse_n_m("4:2"), "n:m"),
        (lambda: patterns.parse_n_m("blocky"), "unstructured"),
        (lambda: patterns.keep_n_of_m(jnp.ones((2, 6)), 2, 4), "does not divide"),
    ],
)
def test_bad_input_is_one_clear_line(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
