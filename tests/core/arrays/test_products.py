"""Products with a compressed operand, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxcompress.core.arrays import chunked, products
from jaxcompress.core.arrays.affine import encode_affine, minmax_range
from jaxcompress.core.arrays.base import dims_of, to_matrix
from jaxcompress.core.arrays.low_rank import LowRank

# Every axis has its own letter: l and e lead, n and m are rows, k and j columns.
LETTERS = {"l": 2, "e": 3, "n": 4, "m": 2, "k": 5, "j": 3, "t": 3, "b": 2}


@functools.cache
def leaf_of(letters, lead):
    shape = tuple(LETTERS[c] for c in letters)
    dense = jax.random.normal(jax.random.key(len(letters)), shape)
    tail = letters[lead:]
    dims = dims_of(shape[lead:], tuple(i for i, c in enumerate(tail) if c in "kj"))
    matrix = to_matrix(dense, dims)
    scale, _ = minmax_range(matrix, bits=8, groups=1, symmetric=True)
    return encode_affine(matrix, scale, None, bits=8, dims=dims)


LEAVES = {"lenmkj": 2, "lknjm": 1, "nk": 0, "kn": 0, "enkmj": 1, "lke": 1}


@given(st.data())
@settings(max_examples=14)
def test_dot_general_in_any_arrangement(data):
    """Batch, free and contracted axes drawn; columns are contracted whole or free whole."""
    letters = data.draw(st.sampled_from(sorted(LEAVES)))
    leaf = leaf_of(letters, LEAVES[letters])
    columns = [c for c in letters if c in "kj"]
    others = [c for c in letters if c not in "kj"]
    over_columns = data.draw(st.booleans())
    roles = {c: data.draw(st.sampled_from(["batch", "free", "contracted"])) for c in others}
    contracted = [c for c in others if roles[c] == "contracted"] + columns * over_columns
    if not contracted:
        return
    batch = [c for c in others if roles[c] == "batch"]
    theirs = data.draw(st.permutations([*contracted, *batch, "t", "b"]))
    contracted = data.draw(st.permutations(contracted))
    batch = data.draw(st.permutations(batch))
    x = jax.random.normal(jax.random.key(7), tuple(LETTERS[c] for c in theirs))
    side = data.draw(st.sampled_from([0, 1]))
    operands = (letters, theirs) if side == 0 else (theirs, letters)
    numbers = tuple(
        tuple(tuple(operand.index(c) for c in which) for operand in operands)
        for which in (contracted, batch)
    )

    @jax.jit
    def both(leaf, x):
        dense = leaf.dense()
        operands = (dense, x) if side == 0 else (x, dense)
        expected = lax.dot_general(*operands, numbers, precision="highest")
        return products.dot_general(leaf, x, numbers, side, None, jnp.float32), expected

    out, expected = both(leaf, x)
    assert out is not None
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, atol=2e-4, rtol=2e-4)


def test_what_is_no_product_of_whole_columns():
    leaf = leaf_of("lknjm", 1)
    x = jnp.ones((5, 3))
    part = (((1,), (0,)), ((), ()))  # k, and not j
    assert products.dot_general(leaf, x, part, 0, None, jnp.float32) is None
    outer = (((), ()), ((), ()))
    assert products.dot_general(leaf, x, outer, 0, None, jnp.float32) is None


def factors(n, k):
    a, b = jax.random.split(jax.random.key(3))
    return LowRank(jax.random.normal(a, (n, 3)), jax.random.normal(b, (3, k)))


@pytest.mark.parametrize("rows", [1, 5, 8, 24, 100])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_chunks_of_any_size(monkeypatch, rows, lead):
    leaf = factors(24, 10)
    leaf = leaf.map(lambda b: jnp.broadcast_to(b, (*lead, *b.shape)))
    monkeypatch.setattr(chunked, "WHOLE_BELOW", 1)
    monkeypatch.setattr(chunked, "CHUNK", rows * 10 * int(np.prod(lead)))
    dense = np.asarray(leaf.matrix(), np.float64)
    x = jax.random.normal(jax.random.key(4), (*lead, 6, 10))
    y = jax.random.normal(jax.random.key(5), (*lead, 6, 24))
    np.testing.assert_allclose(
        chunked.product(leaf, x, "k"), np.asarray(x) @ np.swapaxes(dense, -1, -2), atol=1e-4
    )
    np.testing.assert_allclose(chunked.product(leaf, y, "n"), np.asarray(y) @ dense, atol=1e-4)


def test_narrow_sums_are_kept_in_float32(monkeypatch):
    """Sixteen partial sums in bfloat16 would lose what one product keeps."""
    monkeypatch.setattr(chunked, "WHOLE_BELOW", 1)
    monkeypatch.setattr(chunked, "CHUNK", 8)
    leaf = LowRank(jnp.ones((16, 1)), jnp.ones((1, 8)), casts=("bfloat16",))
    y = jnp.concatenate([jnp.full((1, 1), 256.0), jnp.ones((1, 15))], axis=1).astype(jnp.bfloat16)
    out = chunked.product(leaf, y, "n")
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0]) == float(jnp.bfloat16(271))


LAYOUTS = {"NHWC": ("NHWC", "HWIO", "NHWC"), "NCHW": ("NCHW", "OIHW", "NCHW")}
SETTINGS = {
    "plain": {},
    "strided": {"window_strides": (2, 1), "padding": ((1, 0), (2, 1))},
    "dilated": {"rhs_dilation": (2, 1), "lhs_dilation": (1, 2)},
    "in groups": {"feature_group_count": 2},
    "depthwise": {"feature_group_count": 6},
    "wide groups": {"feature_group_count": 3},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("chunk", [pytest.param(1 << 20, marks=pytest.mark.slow), 60])
def test_convolution_by_output_channels(monkeypatch, layout, name, chunk):
    """Whole, and a few output channels at a time, neither dividing the channels nor the groups."""
    monkeypatch.setattr(chunked, "WHOLE_BELOW", 1 if chunk == 60 else 1 << 20)
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    products._conv.clear_cache()
    numbers, options = LAYOUTS[layout], SETTINGS[name]
    options = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), **options}
    groups = options.get("feature_group_count", 1)
    sizes = {"N": 2, "H": 5, "W": 4, "C": 6}
    kernel_sizes = {"H": 3, "W": 2, "I": 6 // groups, "O": 18}
    x = jax.random.normal(jax.random.key(0), tuple(sizes[c] for c in numbers[0]))
    shape = tuple(kernel_sizes[c] for c in numbers[1])
    dims = dims_of(shape, tuple(i for i, c in enumerate(numbers[1]) if c != "O"))
    matrix = to_matrix(jax.random.normal(jax.random.key(1), shape), dims)
    scale, _ = minmax_range(matrix, bits=8, groups=1, symmetric=True)
    leaf = encode_affine(matrix, scale, None, bits=8, dims=dims)

    def convolve(kernel, product):
        def run(x, kernel):
            closed = jax.make_jaxpr(
                lambda x, w: lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)
            )(x, jnp.zeros(shape))
            (eqn,) = [e for e in closed.eqns if e.primitive.name == "conv_general_dilated"]
            if product:
                return products.conv_general_dilated(x, kernel, jnp.float32, **eqn.params)
            return lax.conv_general_dilated(
                x, kernel.dense(), dimension_numbers=numbers, precision="highest", **options
            )

        return run

    ours, theirs = convolve(leaf, True), convolve(leaf, False)
    np.testing.assert_allclose(jax.jit(ours)(x, leaf), jax.jit(theirs)(x, leaf), atol=1e-4)
    a, b = (
        jax.jit(jax.grad(lambda x, s, f=f: (f(x, leaf.replace(scale=s)) ** 2).sum(), (0, 1)))(
            x, leaf.scale
        )
        for f in (ours, theirs)
    )
    for u, v in zip(a, b, strict=True):
        np.testing.assert_allclose(u, v, atol=2e-3, rtol=2e-3)


def test_a_gather_out_of_bounds_and_with_kept_axes():
    leaf = leaf_of("nk", 0)

    def same(f):
        (eqn,) = [e for e in jax.make_jaxpr(f)(leaf.dense()).eqns if e.primitive.name == "gather"]
        keep = ("dimension_numbers", "slice_sizes", "mode", "fill_value")
        indices = jnp.array([[2, 0], [9, 0], [-3, 0]])[:, : len(f.__defaults__[0])]
        out = products.gather(leaf, indices, **{k: eqn.params[k] for k in keep})
        expected = lax.gather(leaf.dense(), indices, **{k: eqn.params[k] for k in keep})
        np.testing.assert_allclose(out, expected, atol=1e-6)

    ids = jnp.zeros((3, 1), jnp.int32)
    for mode in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.FILL_OR_DROP):
        numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
        same(
            lambda w, axes=(0,), mode=mode, numbers=numbers: lax.gather(
                w, ids, numbers, (1, 5), mode=mode
            )
        )
        kept = lax.GatherDimensionNumbers((0, 2), (), (0,))
        same(lambda w, axes=(0,), mode=mode, kept=kept: lax.gather(w, ids, kept, (1, 5), mode=mode))
    both = lax.GatherDimensionNumbers((1, 2), (), (0, 1))  # as vmap makes of a dynamic_slice
    same(
        lambda w, axes=(0, 1): lax.gather(
            w, jnp.zeros((3, 2), jnp.int32), both, (1, 5), mode=lax.GatherScatterMode.CLIP
        )
    )
