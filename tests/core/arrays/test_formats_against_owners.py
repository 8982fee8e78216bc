"""Number formats against their owners' libraries: the same bytes, bit for bit."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from bitsandbytes import functional
from compressed_tensors import quantization
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization.utils import helpers
from gguf import quants

from jaxcompress.core.arrays import minifloat
from jaxcompress.core.arrays.nested import about
from jaxcompress.core.arrays.tables import dynamic_map
from jaxcompress.quantization.rtn import rtn

ROWS, COLUMNS = 24, 256


def weights(dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Normal rows, and the hard ones: ties, zeros, one sign only, an outlier, tiny values."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    w[0] = 0
    w[1] = np.abs(w[1])
    w[2] = -np.abs(w[2])
    w[3] = rng.integers(-15, 16, COLUMNS) / 2
    w[4, 7] = 300.0
    w[5] *= 1e-20
    w[6:12] = np.linspace(-1, 1, COLUMNS) * np.arange(1, 7)[:, None]
    w[12] *= 2.0 ** rng.integers(-8, 8, COLUMNS)
    return w.astype(jnp.dtype(dtype))


def codes_of(leaf) -> np.ndarray:
    return np.asarray(leaf.integers())


# ------------------------------------------------------------------------ compressed-tensors


def to_torch(x):
    return torch.tensor(np.asarray(x, np.float32)).to(getattr(torch, str(x.dtype)))


SCHEMES = {
    "fp8 tensor": ("float-quantized", {"strategy": "tensor"}, 8),
    "fp8 channel": ("float-quantized", {"strategy": "channel"}, 8),
    "fp8 group": ("float-quantized", {"strategy": "group", "group_size": 64}, 8),
    "fp8 block": ("float-quantized", {"strategy": "block", "block_structure": [128, 128]}, 8),
    "mxfp8": ("mxfp8-quantized", {"strategy": "group", "group_size": 32}, 8),
    "mxfp6": ("mxfp6-pack-quantized", {"strategy": "group", "group_size": 32}, 6),
    "mxfp4": ("mxfp4-pack-quantized", {"strategy": "group", "group_size": 32}, 4),
    "nvfp4": ("nvfp4-pack-quantized", {"strategy": "tensor_group", "group_size": 16}, 4),
}


def owner(name: str, w: torch.Tensor):
    """Their compressed state, their scheme, and the decompressed weight."""
    form, strategy, bits = SCHEMES[name]
    scale_dtype = {"m": torch.uint8, "n": torch.float8_e4m3fn}.get(name[0])
    args = quantization.QuantizationArgs(
        num_bits=bits, type="float", symmetric=True, scale_dtype=scale_dtype, **strategy
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    low, high = extremes(name, w, strategy)
    shared = helpers.generate_gparam(w.amin(), w.amax()) if name == "nvfp4" else None
    scale, _ = helpers.calculate_qparams(low, high, args, global_scale=shared)
    state = {"weight": w, "weight_scale": scale}
    if shared is not None:
        state["weight_global_scale"] = shared
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(dict(stored), scheme)["weight"]


def extremes(name, w, strategy):
    if name == "fp8 tensor":
        return w.amin().reshape(1), w.amax().reshape(1)
    if name == "fp8 channel":
        return w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    if name == "fp8 block":
        high, wide = strategy["block_structure"]
        rows, columns = w.shape
        blocks = torch.nn.functional.pad(w, (0, -columns % wide, 0, -rows % high))
        blocks = blocks.reshape(-(-rows // high), high, -(-columns // wide), wide)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    grouped = w.reshape(len(w), -1, strategy["group_size"])
    return grouped.amin(-1), grouped.amax(-1)


def their_codes(name: str, stored) -> np.ndarray:
    if name.startswith("fp8") or name == "mxfp8":
        return stored["weight"].view(torch.uint8).numpy()
    packed = stored["weight_packed"].numpy()
    bits = SCHEMES[name][2]
    stream = np.unpackbits(packed, axis=-1, bitorder="little")
    fields = stream.reshape(len(packed), -1, bits)
    return (fields.astype(int) << np.arange(bits)).sum(-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_scales_and_weights_are_those_of_compressed_tensors(name, dtype):
    w = weights(dtype)
    if name == "fp8 block":  # ragged both ways
        w = np.concatenate([w] * 6)[:140]
        w = np.concatenate([w, w[:, :40]], axis=1)
    stored, decoded = owner(name, to_torch(w))
    kind, _, granularity = name.partition(" ")
    size = {"group": 64}.get(granularity, 128)
    leaf = rtn(jnp.asarray(w), dtype=kind, granularity=granularity or "group", group_size=size)
    assert leaf.dtype == dtype
    np.testing.assert_array_equal(codes_of(leaf), their_codes(name, stored))
    scale = stored["weight_scale"]
    if name == "fp8 block":
        assert str(leaf.scale.values.dtype) == dtype
        np.testing.assert_array_equal(
            np.asarray(leaf.scale.values, np.float32), scale.float().numpy()
        )
    elif leaf.scale.dtype == jnp.uint8:
        np.testing.assert_array_equal(np.asarray(leaf.scale), scale.view(torch.uint8).numpy())
    else:
        np.testing.assert_array_equal(
            np.asarray(leaf.scale, np.float32).ravel(), scale.float().numpy().ravel()
        )
    if name == "nvfp4":
        np.testing.assert_array_equal(
            np.asarray(leaf.global_scale).ravel(), stored["weight_global_scale"].numpy()
        )
    # Theirs of codes as scales come in bfloat16.
    mine = np.asarray(leaf.matrix(), np.float32)
    if kind != "fp8":
        mine = mine.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(mine, decoded.float().numpy())


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3fn", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_fp8_rounds_as_torch_casts(name, dtype):
    largest = minifloat.FORMATS[name].largest
    x = np.concatenate(
        [
            np.random.default_rng(0).normal(size=4000) * 2.0 ** np.linspace(-20, 8, 4000),
            np.linspace(-1, 1, 4001) * largest,
        ]
    ).astype(np.float32)
    theirs = torch.tensor(x).clamp(-largest, largest).to(dtype)
    mine = minifloat.to_codes(jnp.asarray(x), name)
    np.testing.assert_array_equal(np.asarray(mine), theirs.view(torch.uint8).numpy())


# ------------------------------------------------------------------------------------- gguf


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q5_0", 5), ("Q8_0", 8)])
def test_integers_are_those_of_gguf(kind, bits):
    w = weights()
    w[5] = 0
    form = quants.GGMLQuantizationType[kind]
    stored = quants.quantize(w, form)
    leaf = rtn(jnp.asarray(w), bits=bits, range="gguf")
    theirs = np.ascontiguousarray(stored.reshape(ROWS, COLUMNS // 32, -1)[..., :2])
    np.testing.assert_array_equal(np.asarray(leaf.scale), theirs.view(np.float16)[..., 0])
    np.testing.assert_array_equal(np.asarray(leaf.dense()), quants.dequantize(stored, form))
    assert leaf.nbytes == stored.nbytes


def test_mxfp4_is_that_of_gguf():
    w = weights()
    form = quants.GGMLQuantizationType.MXFP4
    stored = quants.quantize(w, form)
    leaf = rtn(jnp.asarray(w), dtype="mxfp4", range="gguf")
    scales = stored.reshape(ROWS, COLUMNS // 32, -1)[..., 0]
    np.testing.assert_array_equal(np.asarray(leaf.scale), scales)
    np.testing.assert_array_equal(np.asarray(leaf.dense()), quants.dequantize(stored, form))
    assert leaf.nbytes == stored.nbytes


# ----------------------------------------------------------------------------- bitsandbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_and_scales_are_those_of_bitsandbytes(kind, dtype):
    w = bnb_weights(dtype)
    packed, state = functional.quantize_4bit(to_torch(w), blocksize=64, quant_type=kind)
    leaf = rtn(jnp.asarray(w), dtype=kind)
    np.testing.assert_array_equal(np.asarray(leaf.scale).ravel(), state.absmax.numpy())
    theirs = functional.dequantize_4bit(packed, state).float().numpy()
    np.testing.assert_array_equal(np.asarray(leaf.matrix(), np.float32), theirs)


def bnb_weights(dtype: str, columns: int = COLUMNS) -> np.ndarray:
    w = np.tile(weights(), (1, -(-columns // COLUMNS)))[:, :columns]
    w[5] = 0  # the smallest numbers of theirs are subnormal
    return w.astype(jnp.dtype(dtype))


@pytest.mark.parametrize("columns", [64, 256, 16384, 32768])  # below, at and above 256 scales
def test_double_quantization_is_that_of_bitsandbytes(columns):
    w = bnb_weights("float32", columns)
    packed, state = functional.quantize_4bit(
        to_torch(w), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    leaf = rtn(jnp.asarray(w), dtype="nf4", scale_bits=8)
    np.testing.assert_allclose(leaf.scale.offset.item(), state.offset.item(), rtol=3e-6)
    # The mean of the scales is summed in another order. With theirs the rest is theirs.
    flat = rtn(jnp.asarray(w), dtype="nf4")
    offset = jnp.asarray(state.offset.numpy()).reshape(1, 1)
    nested = about(flat.scale, offset, bits=8, group_size=256)
    np.testing.assert_array_equal(np.asarray(nested.codes).ravel(), state.absmax.numpy())
    mine = flat.replace(scale=nested)
    theirs = functional.dequantize_4bit(packed, state).numpy()
    np.testing.assert_array_equal(np.asarray(mine.dense()), theirs)
    np.testing.assert_allclose(np.asarray(leaf.dense()), theirs, rtol=1e-5, atol=1e-5)


def test_the_dynamic_map_is_that_of_bitsandbytes():
    np.testing.assert_array_equal(dynamic_map(8), functional.create_dynamic_map().numpy())
