"""Counts, ties and budgets of what stays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.core.errors import InputError
from jaxcompress.pruning.structured.choice import best, choose, kept_count


@given(st.integers(1, 300), st.integers(0, 99), st.sampled_from([1, 8, 64]), st.integers(1, 10))
def test_counts(size, percent, multiple, minimum):
    kept = kept_count(size, percent / 100, multiple, minimum)
    exact = size - size * percent // 100
    assert kept <= size
    assert kept >= min(exact, size)
    assert kept >= min(minimum, size)
    assert kept == size or kept % multiple == 0
    assert kept - multiple < max(exact, minimum)


def test_counts_by_hand():
    assert kept_count(8, 0.3) == 6  # floor(2.4) go
    assert kept_count(10, 0.29) == 8  # read as a decimal fraction
    assert kept_count(344, 0.25, 64) == 320
    assert kept_count(4, 0.99) == 1
    with pytest.raises(InputError, match="multiple 0"):
        kept_count(4, 0.5, 0)
    with pytest.raises(InputError, match="sparsity 1"):
        kept_count(4, 1.0)


def test_the_lower_index_of_equal_scores_goes_first():
    assert best(np.array([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [1, 3]
    assert best(np.array([[1.0, 1.0], [3.0, 2.0]]), 1).tolist() == [[1], [0]]


def test_global_allocation_removes_the_lowest_relative_scores():
    scores = [np.array([1.0, 2.0, 3.0, 100.0]), np.array([20.0, 20.0, 20.0, 20.0])]
    kept = choose(scores, 0.5, allocation="global")
    # 1, 2, 3 over a mean of 26.5 are below 20 over 20; the fourth to go is a tie of the others.
    assert kept[0].tolist() == [3]
    assert kept[1].tolist() == [1, 2, 3]
    kept = choose(scores, 0.5, allocation="global", minimum=2)
    assert kept[0].tolist() == [2, 3]
    assert kept[1].tolist() == [2, 3]
    assert [len(k) for k in choose(scores, 0.5, allocation="uniform")] == [2, 2]


def test_global_allocation_needs_layers_one_by_one():
    with pytest.raises(InputError, match="scan_layers=False"):
        choose([np.ones((2, 4))], 0.5, allocation="global")
