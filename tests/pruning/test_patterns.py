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


def _scores(seed, n, k, kind):
    rng = np.random.default_rng(seed)
    if kind == "ties":
        return rng.integers(-1, 3, (n, k)).astype(np.float32)
    if kind == "zeros":  # both signs of zero are one and the same score
        return rng.choice(np.float32([0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38]), (n, k))
    drawn = rng.normal(size=(n, k)).astype(np.float32)
    return np.abs(drawn) if kind == "positive" else drawn


scores_strategy = st.builds(
    _scores,
    st.integers(0, 1000),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([4, 12, 24]),
    st.sampled_from(["positive", "signed", "ties", "zeros"]),
)
sparsity_strategy = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.999])


@given(scores_strategy, sparsity_strategy)
def test_rows_and_layers_equal_a_stable_sort(scores, sparsity):
    exact = Fraction(str(sparsity))
    per_row = np.array(patterns.keep(jnp.asarray(scores), sparsity, scope="row"))
    expected = np.stack([brute_mask(row, int(exact * row.size)) for row in scores])
    np.testing.assert_array_equal(per_row, expected)
    per_layer = np.array(patterns.keep(jnp.asarray(scores), sparsity))
    np.testing.assert_array_equal(
        per_layer, brute_mask(scores.reshape(-1), int(exact * scores.size)).reshape(scores.shape)
    )


@given(scores_strategy, st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4)]))
def test_n_of_m_keeps_the_best_of_every_group(scores, n_m):
    n, m = n_m
    if np.abs(scores[scores != 0]).min(initial=1) < 1e-40:
        return  # a processor may take numbers this small for zero when it compares them
    mask = np.array(patterns.keep(jnp.asarray(scores), 0.5, pattern=f"{n}:{m}")).reshape(-1, m)
    expected = np.stack([brute_mask(g, m - n) for g in scores.reshape(-1, m)])
    np.testing.assert_array_equal(mask, expected)


@given(
    st.integers(0, 1000),
    st.sampled_from([(2, 4), (8, 3)]),
    st.sampled_from(["layer", "row", "global"]),
    sparsity_strategy,
)
def test_blocks_go_whole_by_the_sum_of_their_scores(seed, block, scope, sparsity):
    rows, columns = block
    # Integers, whose sums are the same in any order; many of them equal.
    scores = np.random.default_rng(seed).integers(-2, 3, (2, 8, 12)).astype(np.float32)
    mask = np.array(
        patterns.keep(jnp.asarray(scores), sparsity, pattern=f"block:{rows}x{columns}", scope=scope)
    )
    sums = np.array(
        [
            [
                [s[i : i + rows, j : j + columns].sum() for j in range(0, 12, columns)]
                for i in range(0, 8, rows)
            ]
            for s in scores
        ]
    )
    units = {
        "layer": sums.reshape(2, -1),
        "row": sums.reshape(-1, sums.shape[-1]),
        "global": sums.reshape(1, -1),
    }[scope]
    exact = Fraction(str(sparsity))
    kept = np.stack([brute_mask(unit, int(exact * unit.size)) for unit in units])
    expected = np.kron(kept.reshape(sums.shape), np.ones((1, rows, columns), bool)).astype(bool)
    np.testing.assert_array_equal(mask, expected)


@given(st.integers(0, 1000), st.lists(st.integers(0, 24), min_size=3, max_size=3))
def test_counted_masks_remove_what_each_matrix_is_told(seed, removed):
    scores = np.random.default_rng(seed).integers(0, 3, (3, 4, 6)).astype(np.float32)
    given = jnp.asarray(scores), jnp.asarray(removed)
    per_layer = np.array(patterns.keep_counted(*given)).reshape(3, -1)
    for i, count in enumerate(removed):
        np.testing.assert_array_equal(per_layer[i], brute_mask(scores[i].reshape(-1), count))
    per_row = np.array(patterns.keep_counted(*given, scope="row"))
    for i, count in enumerate(removed):
        for row in range(4):
            mine = count // 4 + (row < count % 4)
            np.testing.assert_array_equal(per_row[i, row], brute_mask(scores[i, row], mine))


@given(scores_strategy)
def test_ordered_bits_are_in_the_order_of_the_scores(scores):
    flat = scores.reshape(-1)
    for bits in (patterns.ordered_bits_of(flat), np.array(patterns.ordered_bits(flat))):
        np.testing.assert_array_equal(
            np.argsort(bits, kind="stable"), np.argsort(flat, kind="stable")
        )


def test_leading_axes_are_separate_units():
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (3, 4, 8)))
    together = patterns.keep_per_layer(scores, 0.4)
    for i in range(3):
        np.testing.assert_array_equal(together[i], patterns.keep_per_layer(scores[i], 0.4))


def test_one_program_serves_every_sparsity():
    scores = jax.random.normal(jax.random.key(0), (5, 7))
    patterns.keep_highest.clear_cache()
    for removed in range(8):
        assert (np.array(patterns.keep_highest(scores, removed)).sum(-1) == 7 - removed).all()
    assert patterns.keep_highest._cache_size() == 1


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
        (lambda: patterns.parse_block("block:4"), "block:RxC"),
        (lambda: patterns.parse_block("block:0x4"), "block:RxC"),
        (lambda: patterns.keep(jnp.ones((2, 6)), 0.5, pattern="2:4"), "does not divide"),
        (lambda: patterns.keep(jnp.ones((2, 6)), 0.5, pattern="block:2x4"), "does not divide"),
    ],
)
def test_bad_input_is_one_clear_line(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
