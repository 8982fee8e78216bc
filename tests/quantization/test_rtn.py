"""Round to nearest against NumPy in float64 and the properties a user relies on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.convert import _rows_stay_apart
from jaxcompress.core.errors import InputError
from jaxcompress.quantization.rtn import rtn


def matrix(seed: int = 0, shape: tuple[int, ...] = (6, 64)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def brute(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> np.ndarray:
    """Float64, one group at a time."""
    out = np.empty(weight.shape)
    for row in range(weight.shape[0]):
        for at in range(0, weight.shape[1], group):
            part = weight[row, at : at + group].astype(np.float64)
            if symmetric:
                scale, zero = np.abs(part).max() / ((2**bits - 1) / 2), 2 ** (bits - 1)
            else:
                low, high = min(part.min(), 0), max(part.max(), 0)
                scale = (high - low) / (2**bits - 1)
                zero = np.round(-low / scale)
            u = np.clip(np.round(part / scale) + zero, 0, 2**bits - 1)
            out[row, at : at + group] = (u - zero) * scale
    return out


@given(st.integers(0, 99), st.sampled_from([2, 3, 4, 8]), st.sampled_from([16, 64]), st.booleans())
def test_equals_brute_force(seed, bits, group, symmetric):
    w = matrix(seed)
    got = np.array(rtn(w, bits=bits, group_size=group, symmetric=symmetric).dense())
    want = brute(np.array(w), bits, group, symmetric)
    step = np.abs(np.array(w)).max() / (2 ** (bits - 1))
    # A symmetric scale puts the largest weight of a group on a tie, which float32 may round the
    # other way: then the two differ by one step and err alike.
    differ = np.abs(got - want) > 1e-5
    assert differ.mean() <= 1 / group if symmetric else differ.mean() < 0.01
    assert np.abs(np.abs(got - np.array(w)) - np.abs(want - np.array(w))).max() < 1e-4 + 1e-3 * step


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searched_range_never_errs_more_and_mostly_less(bits, symmetric):
    w = matrix(3, (64, 128))
    errors = {
        how: float(
            jnp.square(
                rtn(w, bits=bits, group_size=64, symmetric=symmetric, range=how).dense() - w
            ).sum()
        )
        for how in ("minmax", "mse")
    }
    assert errors["mse"] < 0.97 * errors["minmax"]


def test_granularities_have_their_numbers_of_scales():
    w = matrix(0, (3, 6, 64))
    assert rtn(w, granularity="tensor").scale.shape == (3, 1, 1)
    assert rtn(w, granularity="channel").scale.shape == (3, 6, 1)
    assert rtn(w, group_size=16).scale.shape == (3, 6, 4)
    assert rtn(w, group_size=-1).scale.shape == (3, 6, 1)
    assert rtn(w, group_size=4, granularity="block").scale.values.shape == (3, 2, 16)


@given(
    st.sampled_from([1, 2, 3, 4, 5, 8, 16]),
    st.booleans(),
    st.sampled_from(["minmax", "percentile", "mse"]),
)
def test_exact_zeros_stay_zero(bits, symmetric, how):
    w = jnp.where(matrix(1) > 0.3, 0, matrix(1))
    got = rtn(w, bits=bits, group_size=16, symmetric=symmetric, range=how).dense()
    np.testing.assert_array_equal(np.array(got)[np.array(w) == 0], 0)


@pytest.mark.parametrize(
    "dtype", ["fp8", "fp8_e5m2", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "nf4", "fp4", "ternary"]
)
def test_exact_zeros_stay_zero_in_every_format(dtype):
    w = jnp.where(matrix(1) > 0.3, 0, matrix(1)).at[2].set(0)
    got = rtn(w, dtype=dtype, group_size=128 if dtype[0] in "mn" else -1).dense()
    np.testing.assert_array_equal(np.array(got)[np.array(w) == 0], 0)


def test_a_layer_axis_is_a_batch_of_matrices():
    w = matrix(5, (3, 4, 32))
    together = rtn(w, group_size=8).dense()
    np.testing.assert_array_equal(together[1], rtn(w[1], group_size=8).dense())


def test_tensor_granularity_searches_too():
    w = matrix(3, (2, 64, 128)).at[:, 0, 0].set(5)
    errors = [
        float(jnp.square(rtn(w, bits=3, granularity="tensor", range=how).dense() - w).sum())
        for how in ("mse", "percentile", "minmax")
    ]
    assert errors[0] < errors[1] < errors[2]


@given(st.integers(0, 99), st.sampled_from([1, 2, 4, 8]), st.sampled_from([16, 64, -1]))
def test_the_textbooks_form(seed, bits, group):
    w = np.array(matrix(seed)) + 0.5
    leaf = rtn(jnp.asarray(w), bits=bits, group_size=group, range="textbook")
    runs = w.reshape(6, -1, 64 if group == -1 else group).astype(np.float64)
    low, high = runs.min(-1, keepdims=True), runs.max(-1, keepdims=True)
    at = (runs - low) / (high - low) * (2**bits - 1) + 0.5
    codes = np.floor(at)
    clear = np.abs(at - np.round(at)) > 1e-4  # float32 may fall on the other side of a half
    clear |= (runs == low) | (runs == high)
    mine = np.array(leaf.integers()).reshape(runs.shape)
    np.testing.assert_array_equal(mine[clear], codes[clear])
    values = mine * (high - low) / (2**bits - 1) + low
    np.testing.assert_allclose(np.array(leaf.dense()), values.reshape(w.shape), atol=1e-5)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_the_textbooks_form_holds_both_ends_and_constant_rows(granularity):
    w = matrix(2, (3, 8, 32)).at[:, 1].set(0.3)
    got = np.array(rtn(w, bits=3, granularity=granularity, range="textbook").dense())
    axes = -1 if granularity == "channel" else (-2, -1)
    np.testing.assert_allclose(got.min(axes), np.array(w).min(axes), atol=1e-6)
    np.testing.assert_allclose(got.max(axes), np.array(w).max(axes), atol=1e-6)
    if granularity == "channel":
        np.testing.assert_allclose(got[:, 1], 0.3, rtol=1e-6)
    assert len(np.unique(got[0, 0])) <= 8


FORMATS = {  # bits of a weight of a 64 x 512 matrix: codes, scales, tables
    "int3": 3 + 32 / 128,
    "int16": 16 + 32 / 128,
    "fp8": 8 + 32 / 128,
    "fp8_e5m2": 8 + 32 / 128,
    "mxfp8": 8 + 8 / 32,
    "mxfp6": 6 + 8 / 32,
    "mxfp4": 4 + 8 / 32,
    "nvfp4": 4 + 8 / 16 + 32 / (64 * 512),
    "nf4": 4 + 32 / 64 + 16 * 32 / (64 * 512),
    "fp4": 4 + 32 / 64 + 16 * 32 / (64 * 512),
    "ternary": 2 + 32 / 128,
}


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_format_has_its_bits_and_its_error(dtype):
    w = matrix(4, (64, 512))
    leaf = rtn(w, dtype=dtype)
    assert (leaf.shape, leaf.dtype) == (w.shape, w.dtype)
    assert leaf.nbytes * 8 / leaf.size == FORMATS[dtype]
    error = float(jnp.square(leaf.dense() - w).mean())
    # Rate and distortion: at least as many bits as the error is worth, but not many more.
    bits = FORMATS[dtype] if dtype != "int16" else 16
    assert 2.0 ** (-2 * bits) < error < 2.0 ** (-2 * bits) * (6000 if "8" in dtype else 40)


@pytest.mark.parametrize("dtype", ["int", "mxfp4", "nf4", "fp8"])
def test_rows_may_come_in_pieces(dtype):
    w = matrix(6, (8, 128))
    pieces = [rtn(w[i : i + 2], dtype=dtype) for i in range(0, 8, 2)]
    together = rtn(w, dtype=dtype)
    apart = np.concatenate([np.array(piece.dense()) for piece in pieces])
    np.testing.assert_array_equal(apart, np.array(together.dense()))


def test_16_and_8_bit_scales():
    w = matrix(7, (64, 512))
    bits = [rtn(w, group_size=64, scale_bits=b) for b in (0, 16, 8)]
    sizes = [leaf.nbytes * 8 / leaf.size for leaf in bits]
    assert sizes[:2] == [4.5, 4.25]
    assert 4.125 < sizes[2] < 4.45  # the map of 256 values is a good part of so small a matrix
    errors = [float(jnp.square(leaf.dense() - w).sum()) for leaf in bits]
    assert max(errors) < 1.02 * min(errors)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 9}, "1 to 8 bits"),
        ({"group_size": 48}, "use --group-size 64"),
        ({"group_size": 0}, "positive"),
        ({"dtype": "int12"}, "1 to 8 bits"),
        ({"dtype": "float"}, "use one of"),
        ({"dtype": "mxfp4", "group_size": 48}, "group of 32"),
        ({"dtype": "fp8", "range": "textbook"}, "integers"),
        ({"range": "gguf", "bits": 3}, "gguf"),
        ({"scale_bits": 32}, "scale_bits"),
    ],
)
def test_bad_input_is_one_clear_line(options, words):
    with pytest.raises(InputError, match=words) as caught:
        rtn(matrix(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "apart"),
    [
        ({"group_size": 32}, True),
        ({"dtype": "mxfp4"}, True),
        ({"dtype": "fp8", "granularity": "channel"}, True),
        ({"granularity": "tensor"}, False),
        ({"granularity": "block"}, False),
        ({"dtype": "nvfp4"}, False),
        ({"group_size": 32, "scale_bits": 8}, False),
    ],
)
def test_only_formats_of_independent_rows_stream_by_rows(options, apart):
    like = jax.eval_shape(lambda w: rtn(w, **options), matrix(shape=(256, 512)))
    assert _rows_stay_apart(like) == apart
