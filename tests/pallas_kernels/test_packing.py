"""Packing against NumPy's own bit order and against compressed-tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import packing


def numpy_pack(u: np.ndarray, bits: int) -> np.ndarray:
    """The bitstream, one bit at a time."""
    *lead, k = u.shape
    u = np.pad(u, [(0, 0)] * len(lead) + [(0, -k % 32)])
    stream = ((u[..., None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(*lead, -1)
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4")


@given(
    bits=st.integers(1, 8),
    k=st.integers(1, 131),
    lead=st.lists(st.integers(1, 3), max_size=2),
    seed=st.integers(0, 2**31),
)
def test_the_bitstream_is_numpys_and_comes_back(bits, k, lead, seed):
    u = np.random.default_rng(seed).integers(0, 2**bits, (*lead, k), dtype=np.uint8)
    words = jax.jit(packing.pack, static_argnums=1)(u, bits)
    assert words.dtype == jnp.int32
    assert words.shape == (*lead, packing.packed_words(k, bits))
    np.testing.assert_array_equal(words, numpy_pack(u, bits))
    unpack = jax.jit(packing.unpack, static_argnums=(1, 2))
    back = unpack(words, bits, k)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, u)
    padded = unpack(words, bits, None)
    assert padded.shape[-1] == packing.codes_in(words.shape[-1], bits) == k + (-k % 32)
    np.testing.assert_array_equal(np.asarray(padded)[..., k:], 0)
    by_bitcast = jax.jit(packing.unpack_by_bitcast, static_argnums=(1, 2))(words, bits, k)
    np.testing.assert_array_equal(by_bitcast, u)


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_the_words_are_those_of_compressed_tensors(bits):
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    u = np.random.default_rng(bits).integers(0, 2**bits, (6, 96))
    signed = torch.tensor(u - 2 ** (bits - 1), dtype=torch.int8)
    theirs = helpers.pack_to_int32(signed, bits).numpy()
    np.testing.assert_array_equal(packing.pack(u, bits), theirs)


def test_only_the_low_bits_are_stored():
    np.testing.assert_array_equal(packing.pack([16 + 3, 1], 4), packing.pack([3, 1], 4))


def test_vmap_and_jit_change_nothing():
    u = np.random.default_rng(0).integers(0, 8, (2, 3, 40), dtype=np.uint8)
    words = packing.pack(u, 3)
    mapped = jax.jit(jax.vmap(lambda w: packing.unpack(w, 3, 40)))(words)
    np.testing.assert_array_equal(mapped, u)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_that_are_constants_of_a_program(bits):
    """XLA folds them; a bitcast to a type of less than a byte was folded to wrong values."""
    u = np.random.default_rng(0).integers(0, 2**bits, (8, 64), dtype=np.uint8)
    words = packing.pack(u, bits)
    np.testing.assert_array_equal(jax.jit(lambda: packing.unpack(words, bits, 64))(), u)


@pytest.mark.parametrize("bits", [0, 9])
def test_a_width_out_of_range_is_refused(bits):
    with pytest.raises(ValueError, match="1 to 8 bits"):
        packing.pack(np.zeros(32, np.uint8), bits)


def test_words_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="not a multiple of 3"):
        packing.unpack(np.zeros(4, np.int32), 3)
    with pytest.raises(ValueError, match="hold 32 codes"):
        packing.unpack(np.zeros(4, np.int32), 4, 33)
