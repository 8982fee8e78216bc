"""Whole directories: ours run in transformers, those of compressed-tensors run here."""

import json

import jax
import numpy as np
import pytest
from marks import slow_but

import jaxcompress as jc
from jaxcompress.checkpoints.huggingface import open_checkpoint
from jaxcompress.core.arrays.inputs import QuantizedInput
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers.lift import lift
from jaxcompress.quantization.activations import activations

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
ct = pytest.importorskip("compressed_tensors")

IDS = np.random.default_rng(0).integers(0, 300, (1, 16)).astype(np.int32)
INT8, FP8 = {"activations": "int8"}, {"activations": "fp8"}
STATIC = {"activation_scaling": "static"}
# Weights, inputs, the format, and by how much logits (to 0.9) may differ: what compressed-tensors'
# own directories differ from its own model before it is written, in bfloat16. Two programs never
# agree on the last bit of an activation, and where that decides what it is rounded to, logits jump.
SCHEMES = {
    "W4A16": ({"bits": 4}, None, "pack-quantized", 0.0049),
    "W3A16": ({"bits": 3}, None, "pack-quantized", 0.0039),
    "W8A16": ({"bits": 8}, None, "pack-quantized", 0.0039),
    "W8A8": ({"bits": 8, "group_size": -1}, INT8, "int-quantized", 0.0078),
    "W8A8 static, zero points": (
        {"bits": 8, "group_size": -1, "symmetric": False},
        INT8 | STATIC | {"activation_symmetric": False},
        "int-quantized",
        0.0078,
    ),
    "W4A8": ({"bits": 4}, INT8, "int-quantized", 0.0078),
    "W4AFP8": ({"bits": 4}, FP8, "int-quantized", 0.0078),
    "FP8": ({"dtype": "fp8", "granularity": "tensor"}, FP8 | STATIC, "float-quantized", 0.0186),
    "FP8_DYNAMIC": ({"dtype": "fp8", "granularity": "channel"}, FP8, "float-quantized", 0.0215),
    "FP8_BLOCK": (
        {"dtype": "fp8", "granularity": "block"},
        FP8 | {"activation_granularity": "group"},
        "float-quantized",
        0.0186,
    ),
    "NVFP4A16": ({"dtype": "nvfp4"}, None, "nvfp4-pack-quantized", 0.0039),
    "MXFP4A16": ({"dtype": "mxfp4"}, None, "mxfp4-pack-quantized", 0.0044),
    "MXFP6A16": ({"dtype": "mxfp6"}, None, "mxfp6-pack-quantized", 0.0039),
    "MXFP8A16": ({"dtype": "mxfp8"}, None, "mxfp8-quantized", 0.0039),
}


# compressed-tensors decodes these to bfloat16 whatever the model is in.
DECODED_TO_BFLOAT16 = ("NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A Llama of two blocks, width 128: directories by dtype."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    out = tmp_path_factory.mktemp("formats")
    for dtype in ("float32", "bfloat16"):
        model.to(getattr(torch, dtype)).save_pretrained(out / dtype)
    return {dtype: out / dtype for dtype in ("float32", "bfloat16")}


def quantized(dense, weights, inputs):
    model = jc.load(dense)
    one_scale = {"group_size": -1} if weights.get("granularity") in ("tensor", "channel") else {}
    small = jc.compress(model, "rtn", **weights, **one_scale)
    return activations(small, calibration=IDS, **inputs) if inputs else small


def their_model(directory):
    """With the weights decoded; and its logits, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    ids = torch.tensor(IDS.astype(np.int64))
    with torch.no_grad():
        model(ids)  # decompresses
        return model, torch.nn.Module.float(model)(ids).logits.numpy()


def our_logits(directory):
    model = jc.load(directory, dtype="float32")
    return np.asarray(jax.jit(lift(model.apply))(model.params, IDS))


def tensors_of(model):
    """The weights that the compressed leaves stand for, by the names of the checkpoint."""
    from jaxcompress.models import name_map_of

    return {n: np.asarray(jc.densify(x), np.float32)
            for n, x in name_map_of(model.config).tensors(model.params)}  # fmt: skip


def assert_same_leaves(a, b):
    ours, theirs = leaves_with_paths(a), leaves_with_paths(b)
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, x), (_, y) in zip(ours, theirs):
        assert jax.tree.structure(x) == jax.tree.structure(y), path
        for one, other in zip(jax.tree.leaves(x), jax.tree.leaves(y)):
            np.testing.assert_array_equal(one, other, err_msg=path)


QUICK = ("W4A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP8A16")


@pytest.mark.parametrize("name", slow_but(SCHEMES, QUICK))
def test_transformers_computes_what_we_compute(name, dense, tmp_path):
    weights, inputs, form, figure = SCHEMES[name]
    source = dense["bfloat16" if name in DECODED_TO_BFLOAT16 else "float32"]
    small = quantized(source, weights, inputs)
    out = tmp_path / "out"
    said = jc.save(small, out, verify_memory=0)
    assert ": compressed-tensors, 14 of 21 tensors" in said[0]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == form
    assert_same_leaves(jc.load(out).params, small.params)
    theirs, want = their_model(out)
    state, before = theirs.state_dict(), tensors_of(jc.load(source))
    for tensor, value in tensors_of(small).items():
        assert "_proj" not in tensor or (value != before[tensor]).any()  # it is quantized
        np.testing.assert_array_equal(state[tensor].numpy(), value, err_msg=tensor)
    off = np.abs(our_logits(out) - want).max()
    print(f"{name}: {off:.6f} of {figure}")
    assert off <= (figure if inputs else 1e-5)


def test_several_formats_in_one_directory(dense, tmp_path):
    model = jc.load(dense["bfloat16"])
    small = jc.compress(model, "rtn", bits=4, group_size=32, include=["**/q_proj/*"])
    small = jc.compress(small, "rtn", bits=8, group_size=-1, include=["**/v_proj/*"])
    small = activations(small, ["layers/1/attn/v_proj/kernel"])
    small = jc.compress(small, "rtn", dtype="nvfp4", include=["**/mlp/*_proj/*"])
    out = tmp_path / "out"
    assert ": compressed-tensors, 10 of 21 tensors" in jc.save(small, out, verify_memory=0)[0]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == [
        "int-quantized", "nvfp4-pack-quantized", "pack-quantized", "pack-quantized",
    ]  # fmt: skip
    assert_same_leaves(jc.load(out).params, small.params)
    _, want = their_model(out)
    assert np.abs(our_logits(out) - want).max() <= 0.0039


def write_theirs(source, out, preset):
    """A directory that compressed-tensors wrote, and its model before it was packed."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    config = QuantizationConfig(config_groups={preset: ["Linear"]}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        args, w = scheme.weights, module.weight
        group = w if args.group_size is None else w.unflatten(1, (-1, args.group_size))
        if args.strategy == "block":
            whole = torch.nn.functional.pad(w, (0, 0, 0, -len(w) % 128))
            group = whole.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).transpose(1, 2).flatten(2)
        axes = None if args.strategy == "tensor" else -1
        low, high = (w.min()[None], w.max()[None]) if axes is None else (
            group.amin(-1, keepdim=args.strategy == "channel"),
            group.amax(-1, keepdim=args.strategy == "channel"),
        )  # fmt: skip
        share = None
        if args.strategy == "tensor_group":
            share = (448 * 6 / w.abs().max()).float().reshape(1)
            module.weight_global_scale.data = share
        scale, zero = calculate_qparams(low, high, args, global_scale=share)
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
        if not args.symmetric:
            module.weight_zero_point.data = zero
        if scheme.input_activations is not None and not scheme.input_activations.dynamic:
            module.input_scale.data = torch.full_like(module.input_scale, 0.01)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)


PRESETS = (
    "W4A16", "W3A16", "W8A8", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16",
    "MXFP4A16", "MXFP6A16", "MXFP8A16",
)  # fmt: skip


@pytest.mark.parametrize("preset", slow_but(PRESETS, ("W8A8", "FP8_BLOCK", "NVFP4A16")))
def test_their_directories_open_and_are_written_again_bit_for_bit(preset, dense, tmp_path):
    write_theirs(dense["bfloat16"], tmp_path / "theirs", preset)
    model = jc.load(tmp_path / "theirs")
    theirs, _ = their_model(tmp_path / "theirs")
    state = theirs.state_dict()
    for tensor, value in tensors_of(model).items():
        np.testing.assert_array_equal(state[tensor].float().numpy(), value, err_msg=tensor)
    rounds = isinstance(dict(leaves_with_paths(model.params))["layers/0/mlp/up_proj/kernel"],
                        QuantizedInput)  # fmt: skip
    assert rounds == (not preset.endswith("A16"))
    jc.save(model, tmp_path / "ours", "compressed-tensors", verify_memory=0)
    ours, stored = (open_checkpoint(tmp_path / name) for name in ("ours", "theirs"))
    assert sorted(ours.keys()) == sorted(stored.keys())
    for name in ours.keys():
        a, b = ours.read(name), stored.read(name)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name
