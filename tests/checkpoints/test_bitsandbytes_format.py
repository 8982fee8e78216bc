"""bitsandbytes directories against bitsandbytes and transformers: bytes, weights, logits."""

import json

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from marks import slow_but
from packed_cases import Tensors, affine, same
from tiny import write_llama

import jaxcompress as jc
from jaxcompress.checkpoints.bitsandbytes import (
    BitsAndBytes,
    encode_module,
    quantization_config,
    refusal,
)
from jaxcompress.checkpoints.leaves import open_leaves
from jaxcompress.cli import main
from jaxcompress.core.arrays.codebook import Codebook
from jaxcompress.core.arrays.nested import about
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.quantization.rtn import rtn

IDS = np.arange(48, dtype=np.int32).reshape(2, 24) % 300


def weights(rows=24, columns=256, dtype="float32", seed=0):
    """Normal rows, and the hard ones: zeros, ties, both signs of almost nothing."""
    w = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    w[0] = 0
    w[1] = np.linspace(-1, 1, columns)
    w[2, ::2] = np.where(np.arange(w[2, ::2].size) % 2, 1e-9, -1e-9)
    return w.astype(jnp.dtype(dtype))


def to_torch(x):
    return torch.tensor(np.asarray(x, np.float32)).to(getattr(torch, str(x.dtype)))


def to_numpy(x):
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def theirs(w, kind="nf4", decoded=True, **options):
    """The tensors of a module as `Linear4bit` saves it, what they stand for, and their state."""
    packed, state = bnb.quantize_4bit(to_torch(w), quant_type=kind, **options)
    parts = {"weight": packed}
    parts |= {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    tensors = {f"X.{name}": to_numpy(part) for name, part in parts.items()}
    return tensors, decoded and to_numpy(bnb.dequantize_4bit(packed, state)), state


def opened(tensors, **config):
    said = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    return BitsAndBytes(Tensors(tensors), {**said, **config})


def assert_same_tensors(ours, other):
    assert set(ours) == set(other)
    for name in ours:
        assert same(ours[name], other[name]), name


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 64), ("bfloat16", 64), ("float16", 32), ("float32", 256)]
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_byte_is_theirs_both_ways(kind, dtype, size):
    w = weights(dtype=dtype)
    tensors, dense, _ = theirs(w, kind, blocksize=size)
    leaf = rtn(jnp.asarray(w), dtype=kind, group_size=size)
    assert_same_tensors(encode_module("X", leaf), tensors)
    reader = opened(tensors)
    back = reader.read("X.weight")
    assert_same_leaf(back, leaf)
    assert same(back.dense(), dense)
    assert reader.info("X.weight") == (w.shape, dtype)
    assert reader.keys() == ["X.weight"]


def assert_same_leaf(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(same(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


# Scales of a row: several rows to a block, a last block of fewer, one row, several blocks a row.
@pytest.mark.parametrize("shape", [(130, 256), (3, 64), (3, 16384), (3, 32768)])
def test_quantized_scales_are_theirs_both_ways(shape):
    w = weights(*shape)
    tensors, dense, state = theirs(w, compress_statistics=True)
    leaf = rtn(jnp.asarray(w), dtype="nf4")
    # The mean of the scales, which `rtn` sums in another order.
    offset = jnp.asarray(state.offset.numpy()).reshape(1, 1)
    leaf = leaf.replace(scale=about(leaf.scale, offset, bits=8, group_size=256))
    ours, name = encode_module("X", leaf), "X.weight.absmax"
    # Next to a tie their CPU takes now and then the farther code; ours is the nearest.
    off = ours[name].astype(int) - tensors[name]
    assert np.abs(off).max() <= 1
    assert (off != 0).mean() <= 0.01
    assert_same_tensors(ours | {name: tensors[name]}, tensors)
    back = opened(tensors).read("X.weight")
    assert_same_leaf(back, leaf.replace(scale=leaf.scale.replace(codes=back.scale.codes)))
    assert same(back.dense(), dense)
    assert_same_tensors(encode_module("X", back), tensors)


@pytest.mark.parametrize("columns", [192, 11008])  # 3 and 172 scales of a row
def test_quantized_scales_whose_blocks_run_on_keep_every_byte(columns):
    tensors, dense, _ = theirs(
        weights(300 if columns < 256 else 8, columns), compress_statistics=True
    )
    back = opened(tensors).read("X.weight")
    assert same(back.dense(), dense)
    assert_same_tensors(encode_module("X", back), tensors)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("shape", "size"), [((30, 96), 32), ((7, 80), 16), ((600, 9), 1)])
def test_blocks_that_run_on_become_shorter_groups(shape, size, nested):
    w = weights(*shape)
    tensors, _, state = theirs(w, compress_statistics=nested, decoded=False)
    # Their CPU kernel takes blocks to end with a row and decodes to other weights than were stored.
    absmax = state.absmax
    if nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    packed = tensors["X.weight"].reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: w.size]
    dense = state.code.numpy()[codes] * np.repeat(absmax.numpy(), 64)[: w.size]
    back = opened(tensors).read("X.weight")
    assert back.contracted // back.groups == size
    assert same(back.dense(), dense.reshape(shape))
    if size >= 32:  # blocks of 32 end with the row, and then their kernel decodes them
        parts = {name.removeprefix("X.weight."): x for name, x in encode_module("X", back).items()}
        bytes_ = torch.tensor(parts.pop("X.weight"))
        state = bnb.QuantState.from_dict({k: torch.tensor(v) for k, v in parts.items()}, "cpu")
        assert same(bnb.dequantize_4bit(bytes_, state).numpy(), dense.reshape(shape))
        return
    with pytest.raises(InputError, match="bitsandbytes") as caught:
        encode_module("X", back)
    assert "\n" not in str(caught.value)


def test_bytes_under_another_dtype_are_the_same_bytes():
    w = weights()
    plain, stored = theirs(w)[0], theirs(w, quant_storage=torch.bfloat16)[0]
    assert stored["X.weight"].dtype == ml_dtypes.bfloat16
    assert_same_leaf(opened(stored).read("X.weight"), opened(plain).read("X.weight"))


NF4 = rtn(jnp.asarray(weights()), dtype="nf4")


def of_another_table(leaf):
    return leaf.replace(table=leaf.table * 0.5)


@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        (affine(4, True)[0], "no form for Affine"),
        (rtn(jnp.ones((32, 64)), dtype="fp8", group_size=64), "no form for Float"),
        (jax.tree.map(lambda x: x[None], NF4), "stacked"),
        (of_another_table(NF4), "tables nf4 and fp4"),
        (NF4.replace(fixed=""), "tables nf4 and fp4"),
        (NF4.replace(casts=("bfloat16", "float32")), "decodes to one of"),
        (rtn(jnp.ones((32, 64)), dtype="nf4", granularity="tensor"), "not of a matrix"),
        (rtn(jnp.ones((32, 64)), dtype="nf4", group_size=16), "4096 columns, not 16"),
        (rtn(jnp.ones((32, 64)), dtype="nf4", scale_bits=16), "stores float32 scales"),
        (rtn(jnp.ones((32, 64)), dtype="nf4", scale_bits=4), "or of 8 bits"),
        (rtn(jnp.ones((300, 192)), dtype="nf4", scale_bits=8), "groups of 3 quantized scales"),
        (rtn(jnp.asarray(weights(3, 16448)), dtype="nf4", scale_bits=8), "256 by 256"),
    ],
)
def test_what_it_cannot_hold_is_refused_in_one_line(leaf, said):
    with pytest.raises(InputError, match=f"X: .*{said}") as caught:
        encode_module("X", leaf)
    assert "\n" not in str(caught.value)


def described(**changes):
    return np.frombuffer(
        json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [24, 256]}
                   | changes).encode(), np.uint8
    )  # fmt: skip


STATE = "X.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    "changes",
    [
        {"X.weight": np.zeros((3071, 1), np.uint8)},
        {"X.weight.absmax": np.zeros(95, np.float32)},
        {"X.weight.absmax": np.zeros(96, np.uint8)},
        {"X.weight.quant_map": np.zeros(16, np.float32)},
        {"X.weight.quant_map": np.zeros(3, np.float32)},
        {"X.weight.nested_absmax": np.zeros(1, np.float32)},
        {STATE: np.frombuffer(b"not JSON", np.uint8)},
        {STATE: np.frombuffer(b"[1, 2]", np.uint8)},
        {STATE: described(quant_type="int4")},
        {STATE: described(dtype="int8")},
        {STATE: described(dtype=["float32"])},
        {STATE: described(shape=[24, 256, 1])},
        {STATE: described(shape=[24, 10**12])},
        {STATE: described(shape=[0, 256])},
        {STATE: described(blocksize=0)},
        {STATE: described(blocksize=32)},
    ],
)
def test_contradictions_are_one_line_that_names_the_module(changes):
    tensors = theirs(weights())[0] | changes
    with pytest.raises(InputError, match="X") as caught:
        opened(tensors).read("X.weight")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_a_missing_part_is_one_line_that_names_the_module(missing):
    tensors = theirs(weights(), compress_statistics=True)[0]
    del tensors[f"X.weight.{missing}"]
    with pytest.raises(InputError, match="X: its tensors contradict each other"):
        opened(tensors).read("X.weight")


def test_weights_of_eight_bits_are_refused():
    tensors = {"X.weight": np.zeros((32, 64), np.int8), "X.SCB": np.zeros(32, np.float32)}
    with pytest.raises(InputError, match="weights of 8 bits"):
        opened(tensors)


def test_the_config_is_one_of_transformers():
    fp4 = rtn(jnp.asarray(weights()), dtype="fp4")
    said = quantization_config({"a": NF4, "b": NF4, "c": fp4}, ["lm_head"])
    read = transformers.BitsAndBytesConfig(**said)
    assert read.quantization_method() == "nf4"
    assert read.llm_int8_skip_modules == ["lm_head"]
    assert not read.bnb_4bit_use_double_quant
    with pytest.raises(InputError, match="no module is quantized"):
        quantization_config({}, [])


# ------------------------------------------------------------------------------ directories


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("bitsandbytes") / "llama", layers=1)


def in_transformers(directory, **options):
    """Their model, and its logits by their plain way on a CPU."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # rounds scales and inputs to bfloat16
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return model, model(torch.tensor(IDS.astype(np.int64))).logits.numpy()


MODELS = {
    "nf4": [{}],
    "fp4": [{"dtype": "fp4"}],
    "quantized scales": [{"scale_bits": 8}],
    "the head too": [{"include": ["**/up_proj/*", "lm_head/*"]}],
    "several tables and sizes": [
        {"include": ["**/mlp/**"], "dtype": "fp4"},
        {"include": ["**/attn/**"], "group_size": 32},
    ],
}


@pytest.mark.parametrize("name", slow_but(MODELS, ["quantized scales", "several tables and sizes"]))
def test_transformers_runs_what_was_written(name, llama, tmp_path):
    small = jc.load(llama)
    for options in MODELS[name]:
        small = jc.compress(small, "rtn", **{"dtype": "nf4", **options})
    said = jc.save(small, tmp_path / "out")  # auto
    assert ": bitsandbytes, " in said[0]
    model, want = in_transformers(tmp_path / "out")
    quantized = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    leaves = [x for _, x in leaves_with_paths(small.params) if isinstance(x, Codebook)]
    assert len(quantized) == len(leaves) > 0
    assert np.abs(np.asarray(small(IDS)) - want).max() <= 1e-5 * np.ptp(want)
    again = jc.load(tmp_path / "out")
    for (_, a), (_, b) in zip(leaves_with_paths(again.params), leaves_with_paths(small.params)):
        assert_same_leaf(a, b)


def theirs_written(source, out, **options):
    said = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    model, logits = in_transformers(source, quantization_config=said)
    model.save_pretrained(out)
    return model, logits


def assert_same_weights(model, directory):
    leaves = open_leaves(directory)
    found = 0
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            dense = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            leaf = leaves.read(f"{name}.weight")
            assert same(leaf.matrix(), to_numpy(dense)), name
            found += 1
    assert found > 0


@pytest.mark.parametrize(
    "options",
    [
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
        {"bnb_4bit_quant_type": "fp4"},
    ],
)
def test_what_transformers_writes_is_read_bit_for_bit(options, llama, tmp_path):
    model, want = theirs_written(llama, tmp_path / "theirs", **options)
    assert_same_weights(model, tmp_path / "theirs")
    ours = jc.load(tmp_path / "theirs")
    assert np.abs(np.asarray(ours(IDS)) - want).max() <= 1e-5 * np.ptp(want)
    jc.save(ours, tmp_path / "again")  # and goes out as it came
    stored = [open_leaves(tmp_path / d) for d in ("theirs", "again")]
    names = [sorted(leaves._source._checkpoint.keys()) for leaves in stored]
    assert names[0] == names[1]
    if "bnb_4bit_quant_storage" not in options:
        for name in names[0]:
            assert same(*(leaves._source._checkpoint.read(name) for leaves in stored)), name


def test_modules_of_gpt2_are_stored_the_other_way_round(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=64, n_embd=64, n_layer=1, n_head=4, initializer_range=0.1,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model, want = theirs_written(tmp_path / "gpt2", tmp_path / "nf4", bnb_4bit_quant_type="nf4")
    assert_same_weights(model, tmp_path / "nf4")
    ours = jc.load(tmp_path / "nf4")
    assert np.abs(np.asarray(ours(IDS)) - want).max() <= 1e-5 * np.ptp(want)
    assert ": native, " in jc.save(ours, tmp_path / "native")[0]


# Tensor by tensor, and block by block.
@pytest.mark.parametrize("method", slow_but(["rtn", "gptq"], ["rtn"]))
def test_a_command_writes_a_directory_that_transformers_runs(method, llama, tmp_path):
    arguments = ["compress", str(llama), str(tmp_path / "out"), "--method", method]
    arguments += ["--dtype", "nf4", "--format", "bitsandbytes", "--ctx", "32"]
    if method == "gptq":
        text = tmp_path / "text.txt"
        text.write_text("Once upon a time there was a small model. " * 99)
        arguments += ["--calibration", str(text), "--calibration-samples", "2"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    _, want = in_transformers(tmp_path / "out")
    got = np.asarray(jc.load(tmp_path / "out")(IDS))
    assert np.abs(got - want).max() <= 1e-5 * np.ptp(want)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", "4", "--group-size", "32"], "no form for Affine"),
        (["--dtype", "nf4", "--group-size", "16"], "4096 columns, not 16"),
        (["--dtype", "nf4", "--include", "embed/*"], "is no linear module"),
    ],
)
def test_a_command_refuses_in_one_line(options, said, llama, tmp_path, capsys):
    arguments = ["compress", str(llama), str(tmp_path / "out"), "--method", "rtn"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--format", "bitsandbytes", *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("jaxcompress: error: model.")
    assert said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [of_another_table, lambda leaf: leaf.replace(scale=leaf.scale.astype(jnp.float16))]
)
def test_auto_takes_native_for_what_would_not_be_held(change, llama, tmp_path):
    small = jc.compress(jc.load(llama), "rtn", dtype="nf4", include=["**/up_proj/*"])
    params = jax.tree.map(
        lambda x: change(x) if isinstance(x, Codebook) else x, small.params,
        is_leaf=lambda x: isinstance(x, Codebook),
    )  # fmt: skip
    assert ": native, " in jc.save(small.replace(params=params), tmp_path / "out")[0]


def test_shapes_are_refused_as_arrays_are():
    for leaf in (NF4, NF4.replace(fixed=""), rtn(jnp.ones((300, 192)), dtype="nf4", scale_bits=8)):
        assert refusal(jax.eval_shape(lambda leaf=leaf: leaf)) == refusal(leaf)
