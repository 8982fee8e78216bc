"""Affine arrays against compressed-tensors: the same scales, zero points and words, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.core.arrays.affine import encode_affine, minmax_range

torch = pytest.importorskip("torch")
quantization = pytest.importorskip("compressed_tensors.quantization")
pack_quantized = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
from compressed_tensors.quantization.utils.helpers import calculate_qparams  # noqa: E402

ROWS, COLUMNS = 24, 256


def weights(dtype: str) -> np.ndarray:
    """Normal rows, and the hard ones: ties, zeros, one sign only, an outlier, tiny values."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    w[0] = 0
    w[1] = np.abs(w[1])
    w[2] = -np.abs(w[2])
    w[3] = rng.integers(-15, 16, COLUMNS) / 2
    w[4, 7] = 300.0
    w[5] *= 1e-30
    w[6:12] = np.linspace(-1, 1, COLUMNS) * np.arange(1, 7)[:, None]
    return w.astype(jnp.dtype(dtype))


def to_torch(x):
    wide = torch.tensor(np.asarray(x, np.float32))
    return wide.to(getattr(torch, str(x.dtype)))


def same(mine, theirs):
    assert mine.dtype == str(theirs.dtype).removeprefix("torch.")
    np.testing.assert_array_equal(np.asarray(mine, np.float32), theirs.float().numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", [64, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "bits", [3, 4, 8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (5, 6, 7))]
)
def test_words_and_scales_are_theirs(bits, symmetric, group, dtype):
    w = weights(dtype)
    args = quantization.QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if group else "channel",
        group_size=group,
    )
    groups = COLUMNS // group if group else 1
    grouped = to_torch(w).reshape(ROWS, groups, -1)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    state = {"weight": to_torch(w), "weight_scale": scale, "weight_zero_point": zero}
    compressor = pack_quantized.PackedQuantizationCompressor
    theirs = compressor.compress(state, scheme)
    decoded = compressor.decompress(dict(theirs), scheme)["weight"]

    @jax.jit
    def encode(w):
        mine = minmax_range(w, bits=bits, groups=groups, symmetric=symmetric)
        return encode_affine(w, *mine, bits=bits)

    leaf = encode(jnp.asarray(w))
    same(leaf.scale, scale)
    if not symmetric:
        np.testing.assert_array_equal(
            np.asarray(leaf.zero_point, int) - 2 ** (bits - 1), zero.to(torch.int32).numpy()
        )
    np.testing.assert_array_equal(leaf.codes, theirs["weight_packed"].numpy())
    same(leaf.decode(), decoded)


def test_a_float32_scale_of_bfloat16_weights_divides_in_float32():
    w = weights("bfloat16")
    scale = minmax_range(jnp.asarray(w, jnp.float32), bits=4, groups=4, symmetric=True)[0]
    args = quantization.QuantizationArgs(num_bits=4, strategy="group", group_size=64)
    theirs = pack_quantized.quantize(
        x=to_torch(w), scale=torch.tensor(np.asarray(scale)), zero_point=None, args=args
    )
    leaf = encode_affine(jnp.asarray(w), scale, None, bits=4)
    np.testing.assert_array_equal(np.asarray(leaf.integers(), int) - 8, theirs.int().numpy())
