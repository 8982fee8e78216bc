"""Against compressed-tensors' own compressors and transformers' own loading, bit for bit."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcompress.checkpoints.compressed_tensors import (
    encode_module,
    quantization_config,
    scheme_of,
)
from jaxcompress.checkpoints.compressed_tensors_reader import CompressedTensors, decode_module
from jaxcompress.checkpoints.huggingface import open_checkpoint
from jaxcompress.checkpoints.huggingface_writer import write_checkpoint
from jaxcompress.checkpoints.tensors import TensorInfo
from jaxcompress.core.arrays.affine import Affine, encode_affine, minmax_range
from jaxcompress.core.arrays.base import KERNEL, STORED, densify
from jaxcompress.core.arrays.floats import Float
from jaxcompress.core.errors import InputError
from jaxcompress.quantization.rtn import rtn as round_to_nearest

torch = pytest.importorskip("torch")
ct = pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationScheme  # noqa: E402


class Tensors(dict):
    """A `TensorSource` in memory."""

    def info(self, name):
        return TensorInfo(self[name].shape, self[name].dtype)

    def read(self, name):
        return np.array(self[name])

    def read_rows(self, name, start, stop):
        return self[name][start:stop]

    def keys(self):
        return list(super().keys())


def to_torch(array):
    array = np.array(array)
    if array.dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        kind = {2: torch.bfloat16, 1: torch.float8_e4m3fn}[array.dtype.itemsize]
        return torch.tensor(array.view({2: np.int16, 1: np.uint8}[array.dtype.itemsize])).view(kind)
    return torch.tensor(array)


def to_numpy(tensor):
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.numpy()


def stream(u, bits):
    """The bitstream of `u` [rows, n], one bit at a time, in whole periods of 32 codes."""
    u = np.pad(u, ((0, 0), (0, -u.shape[1] % 32))).astype(np.uint8)
    each_bit = ((u[..., None] >> np.arange(bits)) & 1).reshape(len(u), -1).astype(np.uint8)
    return np.packbits(each_bit, axis=1, bitorder="little").view("<i4")


def affine(
    bits, strategy, symmetric, *, rows=24, columns=64, groups=4, dims=STORED, dtype="bfloat16"
):
    """Random codes, scales and zero points."""
    rng = np.random.default_rng(bits)
    u = rng.integers(0, 2**bits, (rows, columns))
    shape = {"tensor": (1, 1), "channel": (rows, 1), "group": (rows, groups)}[strategy]
    scale = jnp.asarray(rng.uniform(0.5, 1, shape), dtype)
    zero = None if symmetric else jnp.asarray(rng.integers(0, 2**bits, shape), jnp.uint8)
    return Affine(jnp.asarray(stream(u, bits)), scale, zero, bits, -columns % 32, dims, (dtype,))


def arguments_of(leaf):
    return quantization_config({"X": scheme_of(leaf)})


def their_scheme(config):
    group = config["config_groups"]["group_0"]
    return QuantizationScheme(targets=["Linear"], weights=group["weights"])


def same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


CASES = [
    (bits, strategy, symmetric)
    for bits in range(1, 9)
    for strategy in ("tensor", "channel", "group")
    for symmetric in (True, False)
    if bits > 1 or symmetric
]


@pytest.mark.parametrize(("bits", "strategy", "symmetric"), CASES)
def test_our_tensors_are_those_of_their_compressor(bits, strategy, symmetric):
    leaf = affine(bits, strategy, symmetric, dtype="float32")
    ours = encode_module("X", leaf)
    # The weights that their rounding takes to our codes exactly: the codes' own values.
    state = {
        "weight": torch.tensor(np.array(leaf.dense())),
        "weight_scale": torch.tensor(ours["X.weight_scale"]),
    }
    if not symmetric:
        zero = np.asarray(leaf.zero_point).astype(np.int16) - 2 ** (bits - 1)
        shape = (1,) if strategy == "tensor" else zero.shape
        state["weight_zero_point"] = torch.tensor(zero.astype(np.int8).reshape(shape))
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.compress(state, their_scheme(arguments_of(leaf)))
    assert {name.removeprefix("X.") for name in ours} == set(theirs)
    for name, tensor in theirs.items():
        assert same(ours[f"X.{name}"], to_numpy(tensor)), name


@pytest.mark.parametrize(("bits", "strategy", "symmetric"), CASES)
def test_they_decompress_ours_to_the_weights_we_say(bits, strategy, symmetric):
    leaf = affine(bits, strategy, symmetric, rows=40)
    state = {n.removeprefix("X."): to_torch(t) for n, t in encode_module("X", leaf).items()}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.decompress(state, their_scheme(arguments_of(leaf)))["weight"]
    assert same(to_numpy(theirs), leaf.dense())


@pytest.mark.parametrize(
    ("rows", "columns", "groups"), [(40, 64, 4), (5, 33, 3), (1, 20, 4), (3, 7, 7)]
)
@pytest.mark.parametrize(("bits", "strategy", "symmetric"), CASES)
def test_every_bit_comes_back(bits, strategy, symmetric, rows, columns, groups):
    leaf = affine(bits, strategy, symmetric, rows=rows, columns=columns, groups=groups)
    tensors = Tensors(encode_module("X", leaf))
    assert tensors["X.weight_packed"].shape == (rows, -(-columns * bits // 32))
    back = decode_module(tensors, "X", arguments_of(leaf))
    assert isinstance(back, Affine)
    assert (back.bits, back.pad, back.dims, back.casts) == (
        leaf.bits, leaf.pad, leaf.dims, leaf.casts,
    )  # fmt: skip
    assert same(back.codes, leaf.codes)
    assert same(back.scale, leaf.scale)
    assert (back.zero_point is None) == symmetric
    assert symmetric or same(back.zero_point, leaf.zero_point)


def test_kernels_lie_transposed():
    leaf = affine(4, "group", True, dims=KERNEL)
    tensors = Tensors(encode_module("X", leaf))
    assert leaf.shape == (64, 24)
    np.testing.assert_array_equal(tensors["X.weight_shape"], [24, 64])
    config = arguments_of(leaf)
    assert same(decode_module(tensors, "X", config).dense(), leaf.dense().T)
    assert same(decode_module(tensors, "X", config, dims=KERNEL).dense(), leaf.dense())


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize(("rows", "columns"), [(40, 160), (40, 32), (6, 20), (1, 3), (3, 11)])
def test_the_older_padded_layout_is_told_apart(bits, rows, columns):
    """A word of 32 // bits whole codes, as compressed-tensors wrote until June 2026."""
    rng = np.random.default_rng(0)
    u = rng.integers(0, 2**bits, (rows, columns), np.uint32)
    u[0] = 2**bits - 1  # so that the dense stream has its high bits set

    def padded(u):
        per_word = 32 // bits
        u = np.pad(u, ((0, 0), (0, -u.shape[1] % per_word))).reshape(len(u), -1, per_word)
        return (u << (np.arange(per_word, dtype=np.uint32) * bits)).sum(-1).astype(np.uint32)

    zero = rng.integers(0, 2**bits, (rows, 1), np.uint32)
    tensors = Tensors(
        {
            "X.weight_packed": padded(u).view(np.int32),
            "X.weight_scale": np.ones((rows, 1), np.float32),
            "X.weight_shape": np.array([rows, columns]),
            "X.weight_zero_point": np.ascontiguousarray(padded(zero.T).T.view(np.int32)),
        }
    )
    weights = {"num_bits": bits, "symmetric": False, "strategy": "channel"}
    config = {"config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}
    leaf = decode_module(tensors, "X", config)
    np.testing.assert_array_equal(leaf.integers(), u)
    np.testing.assert_array_equal(leaf.zero_point, zero)


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_assigned_to_groups_freely_become_dense(symmetric):
    leaf = affine(4, "group", symmetric)
    tensors = Tensors(encode_module("X", leaf))
    tensors["X.weight_g_idx"] = np.random.default_rng(0).permutation(64).astype(np.int32) // 16
    dense = decode_module(tensors, "X", arguments_of(leaf))
    state = {n.removeprefix("X."): to_torch(t) for n, t in tensors.items()}
    q = np.asarray(leaf.integers()).astype(np.float32) - 8
    zero = (
        0
        if symmetric
        else np.asarray(leaf.zero_point).astype(np.float32)[:, state["weight_g_idx"]] - 8
    )
    expected = (q - zero) * np.asarray(leaf.scale).astype(np.float32)[:, state["weight_g_idx"]]
    np.testing.assert_array_equal(dense, expected.astype(ml_dtypes.bfloat16))
    for trivial in [np.arange(64, dtype=np.int32) // 16, np.full(64, -1, np.int32)]:
        tensors["X.weight_g_idx"] = trivial
        assert same(decode_module(tensors, "X", arguments_of(leaf)).codes, leaf.codes)


def their_compressed(format_name, weights, rows=40, columns=64, extra=None):
    """What their compressor stores, and the dense weight that it decompresses to."""
    w = torch.tensor(np.random.default_rng(3).normal(size=(rows, columns)), dtype=torch.bfloat16)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(format_name)
    stored = compressor.compress({"weight": w, **extra(w.float())}, scheme)
    dense = compressor.decompress(dict(stored), scheme)["weight"]
    config = {"quantization_config": {"config_groups": {"g": {
        "targets": ["Linear"], "weights": json.loads(scheme.weights.model_dump_json()),
    }}}}  # fmt: skip
    tensors = Tensors({f"X.{n}": to_numpy(t) for n, t in stored.items()})
    return tensors, config, to_numpy(dense)


def bf16(x):
    return x.to(torch.bfloat16)


def power(x):
    return bf16(2.0 ** torch.floor(torch.log2(x / 4)))


FLOATS = {
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"},
                   lambda w: {"weight_scale": bf16(w.abs().max()[None] / 448)}),
    "fp8 channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"},
                    lambda w: {"weight_scale": bf16(w.abs().amax(1, True) / 448)}),
    "fp8 group": ("float-quantized",
                  {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 16},
                  lambda w: {"weight_scale": bf16(w.reshape(40, 4, 16).abs().amax(-1) / 448)}),
    "fp8 block": ("float-quantized",
                  {"num_bits": 8, "type": "float", "strategy": "block",
                   "block_structure": [24, 24]},
                  lambda w: {"weight_scale": bf16(torch.rand(2, 3) + 0.01)}),
    "fp8 one block": ("float-quantized",
                      {"num_bits": 8, "type": "float", "strategy": "block",
                       "block_structure": [128, 128]},
                      lambda w: {"weight_scale": bf16(torch.rand(1, 1) + 0.01)}),
    "fp8 oblong": ("float-quantized",
                  {"num_bits": 8, "type": "float", "strategy": "block",
                   "block_structure": [16, 32]},
                  lambda w: {"weight_scale": bf16(torch.rand(3, 2) + 0.01)}),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, "type": "float", "strategy": "group",
                                  "group_size": 32, "scale_dtype": "torch.uint8"},
              lambda w: {"weight_scale": power(w.reshape(40, 2, 32).abs().amax(-1) / 64)}),
    "mxfp6": ("mxfp6-pack-quantized", {"num_bits": 6, "type": "float", "strategy": "group",
                                       "group_size": 32, "scale_dtype": "torch.uint8"},
              lambda w: {"weight_scale": power(w.reshape(40, 2, 32).abs().amax(-1))}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group",
                                       "group_size": 32, "scale_dtype": "torch.uint8"},
              lambda w: {"weight_scale": power(w.reshape(40, 2, 32).abs().amax(-1))}),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group",
                                       "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
              lambda w: {"weight_scale": bf16(w.reshape(40, 4, 16).abs().amax(-1) * 100),
                         "weight_global_scale": torch.tensor([600.0])}),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOATS)
def test_floating_formats_are_decoded_as_they_decode_them(case):
    format_name, weights, scales = FLOATS[case]
    tensors, config, dense = their_compressed(format_name, weights, extra=scales)
    ours = decode_module(tensors, "X", config)
    assert isinstance(ours, Float)
    assert same(ours.dense(), dense)
    assert CompressedTensors(tensors, config).info("X.weight") == (ours.shape, ours.dtype)
    if case == "fp8 oblong":
        with pytest.raises(InputError, match="X: compressed-tensors has square blocks"):
            encode_module("X", ours)
        return
    again = encode_module("X", ours)
    assert set(again) == set(tensors)
    assert all(same(again[name], tensors[name]) for name in tensors)
    entry = quantization_config({"X": scheme_of(ours)})["config_groups"]["group_0"]
    said, wanted = (
        QuantizationScheme(targets=["Linear"], weights=w).weights
        for w in (entry["weights"], weights)
    )
    assert (entry["format"], said.model_dump(exclude={"zp_dtype"})) == (
        format_name, wanted.model_dump(exclude={"zp_dtype"}),
    )  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int_quantized_weights_become_affine(bits, symmetric):
    weights = {"num_bits": bits, "type": "int", "strategy": "channel", "symmetric": symmetric}

    def scales(w):
        scale = bf16(w.abs().amax(1, True) / (2 ** (bits - 1) - 0.5))
        return {"weight_scale": scale, "weight_zero_point": torch.ones(40, 1, dtype=torch.int8)}

    if symmetric:
        tensors, config, dense = their_compressed(
            "int-quantized", weights, extra=lambda w: {"weight_scale": scales(w)["weight_scale"]}
        )
    else:
        tensors, config, dense = their_compressed("int-quantized", weights, extra=scales)
    leaf = decode_module(tensors, "X", config)
    assert isinstance(leaf, Affine)
    assert leaf.bits == bits
    assert same(leaf.dense(), dense)


@pytest.mark.parametrize("columns", [64, 20])
@pytest.mark.parametrize("flat", [True, False])
def test_bitmask_formats_become_dense(columns, flat):
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(6, columns)).astype(ml_dtypes.bfloat16)
    order = np.argsort(np.abs(dense.astype(np.float32)).reshape(6, -1, 4), axis=-1)
    np.put_along_axis(dense.reshape(6, -1, 4), order[..., :2], 0, axis=-1)  # 2:4
    kept = dense != 0
    tensors = Tensors(
        {
            "X.compressed": dense[kept] if flat else dense[kept].reshape(6, -1),
            "X.bitmask": np.packbits(kept, axis=1, bitorder="little"),
            "X.shape": np.array([6, columns]) if flat else np.array([[6], [columns]]),
        }
    )
    if flat:
        tensors["X.row_offsets"] = np.cumsum(kept.sum(1)) - kept.sum(1)
    assert same(decode_module(tensors, "X", {}), dense)
    opened = CompressedTensors(tensors, {})
    assert opened.keys() == ["X.weight"]
    assert opened.info("X.weight") == (dense.shape, dense.dtype)


def test_dense_leaves_stay_as_they_are():
    w = np.ones((2, 3), np.float32)
    assert list(encode_module("X", w)) == ["X.weight"]
    assert same(decode_module(Tensors(encode_module("X", w)), "X", {}), w)


def test_groups_are_found_by_name_expression_and_class():
    def group(bits, *targets):
        return {"targets": list(targets), "weights": {"num_bits": bits, "symmetric": True}}

    config = {
        "config_groups": {
            "a": group(8, "Linear"),
            "b": group(4, "re:.*down_proj$"),
            "c": group(3, "layers.0.down_proj"),
        }
    }
    for name, bits in [("layers.0.down_proj", 3), ("layers.1.down_proj", 4), ("lm_head", 8)]:
        leaf = affine(bits, "channel", True, rows=4)
        back = decode_module(Tensors(encode_module(name, leaf)), name, config)
        assert back.bits == bits


def broken(**changes):
    leaf = affine(4, "group", False)
    tensors = Tensors(encode_module("X", leaf))
    for part, value in changes.items():
        if value is None:
            del tensors[f"X.{part}"]
        else:
            tensors[f"X.{part}"] = value
    return tensors, arguments_of(leaf)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_shape": np.array([24, 10**15])},
        {"weight_shape": np.array([10**15, 64])},
        {"weight_shape": np.array([24, -64])},
        {"weight_shape": np.array([24])},
        {"weight_shape": None},
        {"weight_scale": np.ones((24, 3), np.float32)},
        {"weight_scale": np.ones((23, 4), np.float32)},
        {"weight_scale": None},
        {"weight_zero_point": None},
        {"weight_zero_point": np.zeros((1, 4), np.int32)},
        {"weight_packed": np.zeros((24, 9), np.int32)},
        {"weight_packed": np.zeros((24,), np.int32)},
        {"weight_packed": None},
        {"weight_packed": np.zeros((24, 64), np.uint8)},
    ],
)
def test_contradictions_are_one_line_that_names_the_module(changes):
    tensors, config = broken(**changes)
    with pytest.raises(InputError, match="X") as caught:
        decode_module(tensors, "X", config)
    assert "\n" not in str(caught.value)


def test_what_has_no_place_in_the_format_is_refused():
    leaf = affine(4, "group", True)
    stacked = leaf.map(lambda buffer: buffer[None])
    with pytest.raises(InputError, match="stacked"):
        encode_module("X", stacked)
    from jaxcompress.core.arrays.training import Masked

    masked = Masked(jnp.ones((2, 2)), jnp.ones((2, 2), bool))
    with pytest.raises(InputError, match="no form for Masked"):
        encode_module("X", masked)
    with pytest.raises(InputError, match="no module is quantized"):
        quantization_config({})
    tensors = Tensors(encode_module("X", leaf))
    with pytest.raises(InputError, match="no group of quantization_config"):
        decode_module(tensors, "X", {})
    config = {"config_groups": {"a": {"weights": {"num_bits": 9}}}}
    with pytest.raises(InputError, match="not 1 to 8"):
        decode_module(tensors, "X", config)


def tiny_llama(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        initializer_range=0.2,
    )  # fmt: skip
    return config, transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def export(model, config, out, choose):
    """Quantize the linear layers of blocks; returns the state dict of the fake-quantized model."""
    state = {name: to_numpy(tensor) for name, tensor in model.state_dict().items()}
    tensors, schemes, fake = {}, {}, {}
    for name, array in state.items():
        module = name.removesuffix(".weight")
        if "_proj" in name:
            leaf = choose(module, jnp.asarray(array))
            schemes[module] = scheme_of(leaf)
            tensors.update(encode_module(module, leaf))
            fake[name] = to_torch(densify(leaf))
        else:
            tensors[name] = array
            fake[name] = to_torch(array)
    config = json.loads(config.to_json_string())
    config["quantization_config"] = quantization_config(schemes, ignore=["lm_head"])
    write_checkpoint(out, config, tensors.items())
    return fake


def rtn(bits, groups):
    def choose(_, w):
        scale, zero = minmax_range(w, bits=bits, groups=groups(w.shape[1]), symmetric=True)
        return encode_affine(w, scale, zero, bits=bits, dims=STORED)

    return choose


def mixed(module, w):
    return (
        rtn(8, lambda k: 1)(module, w) if "down" in module else rtn(4, lambda k: k // 32)(module, w)
    )


@pytest.mark.parametrize(
    "choose",
    [rtn(4, lambda k: k // 32), rtn(3, lambda k: 1), mixed],
    ids=["w4 group", "w3 channel", "mixed by name"],
)
def test_transformers_runs_what_we_export(tmp_path, choose):
    transformers = pytest.importorskip("transformers")
    config, model = tiny_llama(tmp_path)
    ids = torch.arange(32)[None]
    original = model(ids).logits
    fake = export(model, config, tmp_path / "out", choose)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16")
    model.load_state_dict(fake)
    expected = model(ids).logits
    assert (expected - original).abs().max() > 0.01  # it is quantized
    assert torch.equal(loaded(ids).logits, expected)
    opened = open_checkpoint(tmp_path / "out")
    read = CompressedTensors(opened, opened.config)
    assert sorted(read.keys()) == sorted(fake)
    for name, tensor in fake.items():
        leaf = read.read(name)
        assert read.info(name) == (leaf.shape, leaf.dtype)
        assert same(densify(leaf), to_numpy(tensor))


@pytest.mark.parametrize(
    "options", [{"scale_bits": 8}, {"granularity": "block"}, {"scale_bits": 16}]
)
def test_scales_of_other_forms_are_written_as_plain_ones(options):
    leaf = round_to_nearest(
        jnp.asarray(np.random.default_rng(0).normal(size=(24, 64)), jnp.float32),
        group_size=16,
        **options,
    )
    tensors = encode_module("m", leaf)
    scale = tensors["m.weight_scale"]
    assert scale.shape == (24, 4)
    plain = encode_affine(leaf.decode(), jnp.asarray(scale), None, bits=4, dims=leaf.dims)
    np.testing.assert_array_equal(np.asarray(plain.dense()), np.asarray(leaf.dense()))
    np.testing.assert_array_equal(tensors["m.weight_packed"], np.asarray(plain.codes))


@pytest.mark.parametrize("options", [{"bits": 16}, {"range": "textbook"}])
def test_integers_that_it_cannot_hold_say_so(options):
    with pytest.raises(InputError, match="m: compressed-tensors packs integers of 1 to 8 bits"):
        encode_module("m", round_to_nearest(jnp.ones((8, 64)), group_size=16, **options))
