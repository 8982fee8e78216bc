"""The axis algebra against arrays of numbers: what is unified must be one and the same index."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.core.readers.coupling.atoms import (
    Mismatch,
    axis_size,
    concatenated,
    cut_axis,
    factors,
    fresh,
    labels,
    places,
    segments,
    split_axis,
    take_range,
    unify,
)


@st.composite
def axes(draw, depth=2):
    """A random nest of products and sums."""
    if depth == 0 or draw(st.booleans()):
        return fresh(draw(st.integers(1, 4)))
    parts = draw(st.lists(axes(depth=depth - 1), min_size=1, max_size=3))
    if draw(st.booleans()):
        return tuple(atom for part in parts for atom in part)
    return concatenated(parts)


@given(axes())
def test_places_and_labels_agree(axis):
    """Index 0 of a leaf is at its offset, index 1 one stride further; labels are in range."""
    found = labels(axis)
    by_leaf = {}
    for atom, place, index in found:
        assert len(index) == axis_size(axis)
        assert set(np.unique(index[index >= 0])) == set(range(atom.size))
        assert int(np.flatnonzero(index == 0)[0]) == place[0]
        assert int(np.flatnonzero(index == 1)[0]) == sum(place)
        by_leaf.setdefault(atom, set()).add(place)
    assert by_leaf == {atom: set(where) for atom, where in places(axis).items()}


@given(axes())
def test_segments_are_the_axis(axis):
    total = [axis_size(segment) for segment in segments(axis)]
    assert sum(total) == axis_size(axis)
    joined = concatenated(segments(axis))
    assert places(joined) == places(axis)


@given(axes(), st.data())
def test_split_axis_splits_every_label(axis, data):
    size = axis_size(axis)
    minor = data.draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
    try:
        major_part, minor_part = split_axis(axis, minor)
    except Mismatch:
        return
    assert (axis_size(major_part), axis_size(minor_part)) == (size // minor, minor)
    assert places((*major_part, *minor_part)) == places(axis)


@given(axes(), st.data())
def test_cut_and_take_range(axis, data):
    size = axis_size(axis)
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    try:
        taken = take_range(axis, start, stop)
    except Mismatch:
        return
    assert axis_size(taken) == stop - start
    part = {(a, o - start, s) for a, (o, s), _ in labels(axis) if start <= o < stop}
    assert {(a, *place) for a, place, _ in labels(taken)} == part


@given(axes(), st.data())
def test_unify_makes_equal(axis, data):
    """Unified with another nest of the same size, both read the same at every position."""
    other = data.draw(axes().filter(lambda a: axis_size(a) == axis_size(axis)) | st.just(None))
    if other is None:
        other = fresh(axis_size(axis))
    try:
        unify(axis, other)
    except Mismatch:
        return
    assert places(axis) == places(other)
    for (atom, place, a), (atom2, place2, b) in zip(
        sorted(labels(axis), key=lambda x: (x[0].order, x[1])),
        sorted(labels(other), key=lambda x: (x[0].order, x[1])),
    ):
        assert (atom, place) == (atom2, place2)
        np.testing.assert_array_equal(a, b)


def test_refinement_is_seen_everywhere():
    """Heads: an axis met whole, then as (heads, features), then its halves."""
    whole = fresh(24)
    heads, features = fresh(3), fresh(8)
    unify(whole, (*heads, *features))
    first = take_range(features, 0, 4)
    assert len(factors(whole)) == 2
    assert places(whole)[factors(first)[0]] == ((0, 1),)
    assert len(places(whole)) == 3


def test_grouped_query_repeat():
    """q's heads are (kv heads, repeats): the free repeat axis takes what is left."""
    query, kv, repeats = fresh(12), fresh(3), fresh(4)
    unify(query, (*kv, *repeats))
    assert places(query) == places((*kv, *repeats))


def test_what_does_not_nest_is_refused():
    with pytest.raises(Mismatch, match="sizes 4 and 6"):
        unify(fresh(4), fresh(6))
    with pytest.raises(Mismatch, match="do not nest"):
        unify((*fresh(4), *fresh(3)), (*fresh(3), *fresh(4)))
    with pytest.raises(Mismatch, match="inside blocks of 3"):
        cut_axis((*fresh(4), *fresh(3)), 4)
    with pytest.raises(Mismatch):
        split_axis((*fresh(4), *fresh(3)), 2)
