"""Views of compressed arrays are the views of their dense arrays, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxcompress.core.arrays import views
from jaxcompress.core.arrays.affine import encode_affine, minmax_range
from jaxcompress.core.arrays.base import dims_of, to_matrix
from jaxcompress.core.arrays.low_rank import LowRank


def array(shape, lead, contracted, per_tensor=False):
    """Int8 codes of a dense array whose axes `contracted` (after `lead` leading ones) are K."""
    dense = jax.random.normal(jax.random.key(sum(shape)), shape)
    dims = dims_of(shape[lead:], tuple(axis - lead for axis in contracted))
    matrix = to_matrix(dense, dims)
    scale, _ = minmax_range(matrix, bits=8, groups=1, symmetric=True, per_tensor=per_tensor)
    return encode_affine(matrix, scale, None, bits=8, dims=dims)


# [2 layers, 3 heads, 4 in, 2 in, 5 out]: leading, row, contracted, contracted, row
LEAF = array((2, 3, 4, 2, 5), 1, (2, 3))
SHARED = array((2, 3, 4, 2, 5), 1, (2, 3), per_tensor=True)
FACTORS = LowRank(
    jax.random.normal(jax.random.key(0), (2, 15, 3)),
    jax.random.normal(jax.random.key(1), (2, 3, 8)),
    LEAF.dims,
)
LEAVES = {"affine": LEAF, "per tensor": SHARED, "low rank": FACTORS}


def same(leaf, dense):
    assert leaf is not None
    assert leaf.shape == dense.shape
    np.testing.assert_allclose(leaf.dense(), dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LEAVES)
@given(data=st.data())
@settings(max_examples=10)
def test_transpose(name, data):
    leaf = LEAVES[name]
    order = data.draw(st.permutations(range(5)))
    out = views.transpose(leaf, order)
    keeps_columns = order.index(2) < order.index(3)
    # Layers that become rows would need rows in every buffer.
    moves_layers = order[0] != 0
    if not keeps_columns or (name == "low rank" and moves_layers):
        assert out is None
        return
    same(out, leaf.dense().transpose(order))
    back = [order.index(axis) for axis in range(5)]
    same(views.transpose(out, back), leaf.dense())


RESHAPES = {
    "layers split": ((1, 2, 3, 4, 2, 5), True),
    "columns merged": ((2, 3, 8, 5), True),
    "columns split": ((2, 3, 2, 2, 2, 5), True),
    "columns split otherwise": ((2, 3, 2, 4, 5), True),
    "ones anywhere": ((2, 1, 3, 1, 4, 2, 1, 5, 1), True),
    "layers and heads merged": ((6, 4, 2, 5), True),
    "rows with columns": ((2, 12, 2, 5), False),
    "columns with rows": ((2, 3, 4, 10), False),
    "all": ((240,), False),
}


@pytest.mark.parametrize("name", RESHAPES)
@pytest.mark.parametrize("kind", ["affine", "per tensor"])
def test_reshape(name, kind):
    leaf = LEAVES[kind]
    shape, possible = RESHAPES[name]
    out = views.reshape(leaf, shape)
    if not possible:
        assert out is None
        return
    same(out, leaf.dense().reshape(shape))
    same(views.reshape(out, leaf.shape), leaf.dense())


@given(st.data())
@settings(max_examples=6)
def test_slices(data):
    start, stop, step = [], [], []
    for axis, n in enumerate(LEAF.shape):
        whole = axis in (2, 3)
        a = 0 if whole else data.draw(st.integers(0, n - 1))
        start.append(a)
        stop.append(n if whole else data.draw(st.integers(a + 1, n)))
        step.append(1 if whole else data.draw(st.integers(1, 2)))
    for leaf in LEAVES.values():
        same(views.lax_slice(leaf, start, stop, step), lax.slice(leaf.dense(), start, stop, step))
        sizes = [b - a for a, b in zip(start, stop, strict=True)]
        traced = [jnp.int32(a + 1) for a in start]  # clamped where it does not fit
        same(
            views.dynamic_slice(leaf, traced, sizes),
            lax.dynamic_slice(leaf.dense(), traced, sizes),
        )


def test_slices_of_columns_are_not_views():
    assert views.lax_slice(LEAF, [0] * 5, (2, 3, 2, 2, 5), None) is None
    assert views.dynamic_slice(LEAF, [jnp.int32(0)] * 5, (2, 3, 2, 2, 5)) is None
    assert views.split(LEAF, (2, 2), 2) is None
    assert views.concatenate([LEAF, LEAF], 3) is None


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("axis", [0, 1, 4])
def test_split_concatenate_and_stack(name, axis):
    leaf = LEAVES[name]
    n = leaf.shape[axis]
    parts = views.split(leaf, (1, n - 1), axis)
    for part, dense in zip(parts, jnp.split(leaf.dense(), [1], axis), strict=True):
        same(part, dense)
    joined = views.concatenate(parts, axis)
    stacked = views.stack([leaf, leaf], axis)
    if name == "low rank" and axis:
        assert joined is None
    else:
        same(joined, leaf.dense())
    if name == "low rank" and axis == 4:  # among the tail; before it, the new axis leads
        assert stacked is None
    else:
        same(stacked, jnp.stack([leaf.dense()] * 2, axis))


def test_arrays_of_different_formats_are_not_joined():
    other = encode_affine(jnp.ones((2, 15, 8)), jnp.ones((2, 15, 2)), None, bits=8, dims=LEAF.dims)
    assert views.concatenate([LEAF, other], 0) is None
    assert views.concatenate([LEAF, FACTORS], 0) is None


BROADCASTS = {
    "in front": ((7, 2, 3, 4, 2, 5), (1, 2, 3, 4, 5)),
    "among the rows": ((2, 3, 4, 2, 6, 5), (0, 1, 2, 3, 5)),
    "among the columns": ((2, 3, 4, 6, 2, 5), (0, 1, 2, 4, 5)),
    "ones": ((1, 2, 1, 3, 4, 2, 5, 1), (1, 3, 4, 5, 6)),
}


@pytest.mark.parametrize("name", BROADCASTS)
@pytest.mark.parametrize("kind", LEAVES)
def test_broadcast(name, kind):
    leaf = LEAVES[kind]
    shape, places = BROADCASTS[name]
    same(
        views.broadcast_in_dim(leaf, shape, places),
        lax.broadcast_in_dim(leaf.dense(), shape, places),
    )


def test_axes_of_size_one_grow():
    leaf = array((1, 3, 1, 8), 1, (3,))
    shape = (4, 3, 5, 8)
    same(views.broadcast_in_dim(leaf, shape, (0, 1, 2, 3)), jnp.broadcast_to(leaf.dense(), shape))


def test_squeeze_and_casts():
    leaf = array((1, 3, 1, 8), 1, (3,))
    same(views.squeeze(leaf, (0, 2)), leaf.dense()[0, :, 0])
    half = views.convert_element_type(leaf, jnp.bfloat16)
    assert half.casts == ("float32", "bfloat16")
    back = views.convert_element_type(half, jnp.float32)
    same(back, leaf.dense().astype(jnp.bfloat16).astype(jnp.float32))
    assert views.convert_element_type(leaf, jnp.float32) is leaf
    assert views.convert_element_type(leaf, jnp.int32) is None


def test_the_layout_of_a_chip_is_kept_where_nothing_moves():
    canonical = array((2, 16, 8), 1, (1,))
    leaf = canonical.with_layout("tpu")
    kept = [
        views.transpose(leaf, (0, 2, 1)),
        views.reshape(leaf, (2, 4, 4, 8)),
        views.lax_slice(leaf, (1, 0, 0), (2, 16, 8), None),
        views.broadcast_in_dim(leaf, (3, 2, 16, 8), (1, 2, 3)),
        views.convert_element_type(leaf, jnp.bfloat16),
    ]
    assert all(view.layout == "tpu" for view in kept)
    same(kept[0], canonical.dense().transpose(0, 2, 1))
    same(kept[3], jnp.broadcast_to(canonical.dense(), (3, 2, 16, 8)))
    moved = views.lax_slice(leaf, (0, 0, 1), (2, 16, 5), None)
    assert moved.layout == "canonical"
    same(moved, canonical.dense()[:, :, 1:5])
