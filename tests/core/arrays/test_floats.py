"""Narrow floats, packed codes, tables and nested scales against ml_dtypes and brute force."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.core.arrays import minifloat
from jaxcompress.core.arrays.floats import Float, encode_float
from jaxcompress.core.arrays.nested import quantize_scales
from jaxcompress.core.arrays.tables import NF4, dynamic_map
from jaxcompress.core.errors import InputError
from jaxcompress.quantization.rtn import rtn
from pallas_kernels.packing import codes_in, pack, unpack

TYPES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
each_format = pytest.mark.parametrize("name", minifloat.FORMATS)


def matrix(rows: int = 8, columns: int = 128, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, columns))


@each_format
def test_every_code_has_its_value_and_every_value_its_code(name):
    made = minifloat.FORMATS[name]
    codes = np.arange(2**made.bits, dtype=np.uint8)
    values = codes.view(TYPES[name]).astype(np.float32)
    mine = np.asarray(jax.jit(minifloat.from_codes, static_argnums=1)(codes, name))
    np.testing.assert_array_equal(mine, values)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(np.signbit(mine)[finite], np.signbit(values)[finite])
    assert np.abs(values[finite]).max() == made.largest == ml_dtypes.finfo(TYPES[name]).max
    back = np.asarray(minifloat.to_codes(jnp.asarray(values[finite]), name))
    np.testing.assert_array_equal(back, codes[finite])


@each_format
@given(seed=st.integers(0, 2**32 - 1), spread=st.integers(-6, 6))
def test_rounding_is_that_of_ml_dtypes(name, seed, spread):
    largest = minifloat.FORMATS[name].largest
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=64) * 2.0 ** (spread + rng.integers(-4, 4, 64))).astype(np.float32)
    x = np.concatenate([np.clip(x, -largest, largest), np.round(x * 4) / 8])
    x = np.clip(x, -largest, largest)  # halves between codes among them
    codes = np.asarray(minifloat.to_codes(jnp.asarray(x), name))
    np.testing.assert_array_equal(codes, x.astype(TYPES[name]).view(np.uint8))


@each_format
def test_what_is_too_large_becomes_the_largest(name):
    largest = minifloat.FORMATS[name].largest
    x = jnp.asarray([largest * 1.01, -largest * 3, jnp.inf, -jnp.inf])
    values = minifloat.from_codes(minifloat.to_codes(x, name), name)
    np.testing.assert_array_equal(np.asarray(values), np.asarray([1, -1, 1, -1]) * largest)


@pytest.mark.parametrize("bits", [3, 6, 16])
@given(count=st.sampled_from([1, 31, 70]), seed=st.integers(0, 2**32 - 1))
def test_packed_codes_come_back(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, count))
    words = pack(codes, bits)
    assert words.dtype == jnp.int32
    assert codes_in(words.shape[-1], bits) >= count
    back = unpack(words, bits, count)
    assert back.dtype == (jnp.uint8 if bits <= 8 else jnp.uint16)
    np.testing.assert_array_equal(np.asarray(back), codes)
    stream = np.unpackbits(np.asarray(words).view(np.uint8), axis=-1, bitorder="little")
    first = stream[:, : count * bits].reshape(3, count, bits)
    np.testing.assert_array_equal((first.astype(int) << np.arange(bits)).sum(-1), codes)


def test_powers_of_two():
    codes = np.arange(1, 255, dtype=np.uint8)
    want = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(minifloat.from_e8m0(jnp.asarray(codes))), want)
    assert np.isnan(minifloat.from_e8m0(jnp.uint8(255)))


@each_format
def test_a_power_of_two_brings_the_largest_into_range(name):
    """As large as it may be, and no magnitude beyond what rounds to the largest value."""
    absmax = np.exp2(np.linspace(-8, 8, 5001)).astype(np.float32)
    scale = minifloat.from_e8m0(minifloat.e8m0_covering(jnp.asarray(absmax), name))
    steps = absmax / np.asarray(scale)
    made = minifloat.FORMATS[name]
    half = 2.0 ** (made.largest_exponent - made.mantissa - 1)
    assert steps.max() <= made.largest + half
    assert steps.min() >= (made.largest + half) / 2 * (0.9 if made.special == "nan" else 1) - half
    assert minifloat.e8m0_covering(jnp.float32(0), name) == 0


def test_a_float_array_encodes_in_its_own_format():
    for dtype, options in {
        "fp8": {"group_size": 32},
        "fp8_e5m2": {"granularity": "tensor"},
        "mxfp4": {},
        "nvfp4": {},
    }.items():
        leaf = rtn(matrix(), dtype=dtype, **options)
        again = leaf.encode(matrix())
        assert jax.tree.structure(again) == jax.tree.structure(leaf)
        jax.tree.map(np.testing.assert_array_equal, again, leaf)


def test_decoding_under_jit_is_exact_and_wide_enough():
    leaf = rtn(matrix().astype(jnp.bfloat16), dtype="mxfp8")
    assert leaf.dtype == jnp.bfloat16
    assert leaf.decode().dtype == jnp.float32
    narrow = encode_float(
        matrix(), jnp.full((8, 1), 0.01, jnp.bfloat16), element="e4m3fn"
    )  # bfloat16 scales of float32 weights are computed with in float32
    assert narrow.decode().dtype == jnp.float32
    np.testing.assert_array_equal(
        np.asarray(narrow.decode()), np.asarray(jax.jit(Float.decode)(narrow))
    )


def test_nan_weights_stay_loud():
    broken = matrix().at[0, 0].set(jnp.nan)
    for dtype in ("int", "fp8", "mxfp4", "nf4"):
        assert np.isnan(np.asarray(rtn(broken, dtype=dtype, group_size=128).dense())).any()


# ----------------------------------------------------------------------------------- tables


def test_nf4_takes_the_nearest_value():
    w = np.asarray(matrix())
    leaf = rtn(jnp.asarray(w), dtype="nf4")
    table = np.asarray(NF4, np.float32)
    absmax = np.abs(w).reshape(8, 2, 64).max(-1)
    steps = w.reshape(8, 2, 64) / absmax[..., None]
    codes = np.abs(steps[..., None] - table).argmin(-1).reshape(8, 128)
    np.testing.assert_array_equal(np.asarray(leaf.integers()), codes)
    want = table[codes].reshape(8, 2, 64) * absmax[..., None]
    np.testing.assert_array_equal(np.asarray(leaf.dense()), want.reshape(8, 128))


def test_nf4_is_made_of_quantiles_of_a_normal_distribution():
    """QLoRA, appendix E: 8 quantiles below zero, 9 above, with one zero, over the largest."""
    from scipy.stats import norm

    end = 0.9677083
    positive = norm.ppf(np.linspace(end, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, [0], negative]))
    np.testing.assert_allclose(values / values.max(), NF4, atol=1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_dynamic_map_has_a_value_for_every_code(bits):
    values = dynamic_map(bits)
    assert values.shape == (2**bits,)
    assert (np.diff(values) > 0).all()
    assert values[-1] == 1
    assert 0 in values
    np.testing.assert_array_equal(values[values < 0], -values[values > 0][:-1][::-1])


# ---------------------------------------------------------------------------- nested scales


@pytest.mark.parametrize("dtype", ["int", "fp8", "nf4"])
@pytest.mark.parametrize("columns", [128, 384, 1024])
def test_scales_of_8_bits_cost_little(dtype, columns):
    w = matrix(64, columns) * jnp.exp(0.3 * matrix(64, 1, seed=1))
    plain = rtn(w, dtype=dtype, group_size=32)
    nested = rtn(w, dtype=dtype, group_size=32, scale_bits=8)
    np.testing.assert_array_equal(np.asarray(nested.codes), np.asarray(plain.codes))
    given, kept = np.asarray(plain.scale), np.asarray(nested.scale.dense())
    assert np.abs(kept - given).max() < 0.02 * np.abs(given - given.mean()).max()
    # A byte a scale and a float32 for each 256 of them; row numbers, the map and the mean.
    scales = plain.scale.size
    assert nested.scale.nbytes <= scales * (1 + 4 / 192) + 64 + 4 * 256 + 4
    assert nested.nbytes == nested.codes.nbytes + nested.scale.nbytes + 64 * (dtype == "nf4")
    errors = [float(jnp.square(x.dense() - w).sum()) for x in (nested, plain)]
    assert errors[0] < 1.05 * errors[1]


@pytest.mark.parametrize("bits", [4, 6])
def test_scales_of_fewer_bits_err_more(bits):
    w = matrix(16, 1024)
    plain = rtn(w, group_size=16)
    errors = [
        float(jnp.abs(quantize_scales(plain, bits=b).scale.dense() - plain.scale).mean())
        for b in (8, bits)
    ]
    assert errors[0] < errors[1] < 0.1


def test_a_stack_of_matrices_nests_one_by_one():
    w = jnp.stack([matrix(), 5 * matrix(seed=1)])
    both = rtn(w, group_size=16, scale_bits=8)
    for i in range(2):
        one = rtn(w[i], group_size=16, scale_bits=8)
        np.testing.assert_array_equal(np.asarray(both[i].dense()), np.asarray(one.dense()))


@pytest.mark.parametrize(
    ("dtype", "bits", "size", "says"),
    [
        ("mxfp4", 8, 256, "no float scales"),
        ("int", 9, 256, "2 to 8"),
        ("int", 8, 0, "positive"),
    ],
)
def test_what_cannot_nest_says_so(dtype, bits, size, says):
    with pytest.raises(InputError, match=says):
        quantize_scales(rtn(matrix(), dtype=dtype), bits=bits, group_size=size)
