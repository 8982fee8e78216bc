"""GPTQ directories against GPTQModel's own packer (digests), NumPy bit by bit, and themselves."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from packed_cases import Tensors, affine, digest, same, stream
from tiny import write_llama

import jaxcompress as jc
from jaxcompress.checkpoints.gptq import GPTQ, encode_module, quantization_config
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.quantization.rtn import rtn

IDS = np.arange(48, dtype=np.int32).reshape(2, 24) % 300
# qweight and qzeros of `affine(bits, symmetric)` as `pack_original` of GPTQModel 7.7.0 packs them,
# symmetric ones after its conversion to checkpoint_format "gptq"; and the qzeros in that format.
THEIRS = {
    (2, True): ("f0385323ad82197d", "3e618007bcd9decb", "3e618007bcd9decb"),
    (2, False): ("f0385323ad82197d", "3061f960daf86234", "f7a3d5c1f560a858"),
    (3, True): ("60bbe86a93c33e1d", "54df9c0c2ae736a2", "54df9c0c2ae736a2"),
    (3, False): ("60bbe86a93c33e1d", "9801515ac59ea8c0", "e32cd118c80fde1b"),
    (4, True): ("643ff45c467597ce", "6ad7679ec6e044b8", "6ad7679ec6e044b8"),
    (4, False): ("643ff45c467597ce", "182891e5b56433a6", "cea505b503032fee"),
    (8, True): ("74268c466672ca7e", "c24e73f000a4255a", "c24e73f000a4255a"),
    (8, False): ("74268c466672ca7e", "07f96f1c7eb12835", "74be3e76faac63d8"),
}


def opened(tensors, version="gptq", **config):
    said = {"quantization_config": {"bits": 4, "checkpoint_format": version}, **config}
    return GPTQ(Tensors(tensors), said)


def less_one(zeros, bits):
    """Packed zeros in checkpoint_format "gptq", as GPTQModel makes them: [groups, N] -> words."""
    words = stream(zeros.T, bits)
    if bits == 3:
        return stream((zeros.T - 1) & 7, 3)
    ones = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
    return (words.view(np.uint32) - np.uint32(ones)).view(np.int32)


@pytest.mark.parametrize(("bits", "symmetric"), THEIRS)
def test_tensors_are_those_of_their_packer(bits, symmetric):
    leaf, u, scale, zero = affine(bits, symmetric)
    ours = encode_module("X", leaf)
    qweight, qzeros, v1 = THEIRS[bits, symmetric]
    assert (digest(ours["X.qweight"]), digest(ours["X.qzeros"])) == (qweight, qzeros)
    assert digest(less_one(zero, bits)) == v1
    assert same(ours["X.qweight"], stream(u, bits).T)
    assert same(ours["X.scales"], scale.T)
    assert same(ours["X.g_idx"], np.arange(96, dtype=np.int32) // 32)
    if (bits, symmetric) == (4, True):
        assert (ours["X.qzeros"] == 0x77777777).all()


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "symmetric"), THEIRS)
def test_every_bit_comes_back(bits, symmetric, version):
    leaf, _, _, zero = affine(bits, symmetric)
    tensors = encode_module("X", leaf)
    tensors["X.qzeros"] = less_one(zero, bits) if version == "gptq" else stream(zero.T, bits)
    for kept in (tensors, {k: v for k, v in tensors.items() if k != "X.g_idx"}):
        reader = opened(kept, version)
        back = reader.read("X.weight")
        assert jax.tree.structure(back) == jax.tree.structure(leaf)
        assert all(same(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(leaf)))
        assert reader.info("X.weight") == ((64, 96), np.float16)
        assert reader.keys() == ["X.weight"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_order_becomes_dense(symmetric):
    leaf, u, scale, zero = affine(4, symmetric)
    order = np.random.default_rng(0).permutation(96).astype(np.int32) // 32
    tensors = encode_module("X", leaf) | {"X.g_idx": order}
    dense = opened(tensors, "gptq" if symmetric else "gptq_v2").read("X.weight")
    expected = (u.astype(np.float16) - zero.astype(np.float16)[:, order]) * scale[:, order]
    assert same(dense, expected)


def test_a_last_group_may_have_fewer_columns():
    leaf, u, scale, zero = affine(4, True, columns=96, groups=2)
    order = np.arange(96, dtype=np.int32) // 64
    back = opened(encode_module("X", leaf) | {"X.g_idx": order}).read("X.weight")
    assert isinstance(back, Affine)
    wanted = (u.astype(np.float16) - zero.astype(np.float16)[:, order]) * scale[:, order]
    assert same(back.dense(), wanted)


def test_the_dtype_is_that_of_the_config():
    leaf, u, scale, zero = affine(4, False)
    back = opened(encode_module("X", leaf), "gptq_v2", dtype="bfloat16").read("X.weight")
    wide = (u.astype(np.float32) - np.repeat(zero, 32, 1)) * np.repeat(scale, 32, 1)
    assert same(back.dense(), wide.astype(ml_dtypes.bfloat16))


def test_config_says_what_modules_have_of_their_own():
    leaves = {f"layers.{i}.up": affine(4, True)[0] for i in range(3)}
    leaves["layers.0.down"] = affine(8, False, groups=1)[0]
    config = quantization_config(leaves, ["lm_head", "layers.1.down"])
    assert {k: config[k] for k in ("bits", "group_size", "sym", "desc_act", "lm_head")} == {
        "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False,
    }  # fmt: skip
    assert config["checkpoint_format"] == "gptq_v2"  # a zero of 0 has no form in "gptq"
    assert config["dynamic"] == {
        r"-:^layers\.1\.down$": {},
        r"+:^layers\.0\.down$": {"bits": 8, "group_size": -1, "sym": False},
    }


@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        (affine(4, True, rows=40)[0], "multiples of 32, not a matrix of 40 x 96"),
        (rtn(jnp.ones((32, 64)), bits=5, group_size=32), "2, 3, 4 or 8 bits"),
        (rtn(jnp.ones((32, 64)), group_size=32, range="textbook"), "whole zero points"),
        (rtn(jnp.ones((32, 64)), dtype="fp8", group_size=-1), "no form for Float"),
        (rtn(jnp.linspace(0, 1, 2048).reshape(32, 64), group_size=32), "scale_bits=16"),
        (affine(4, True)[0].map(lambda x: x[None]), "stacked"),
    ],
)
def test_what_it_cannot_hold_is_refused_in_one_line(leaf, said):
    with pytest.raises(InputError, match=f"X: .*{said}") as caught:
        encode_module("X", leaf)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config", [{"checkpoint_format": "marlin"}, {"is_marlin_format": True}, {"format": "gptq_p"}]
)
def test_layouts_of_other_kernels_are_refused(config):
    with pytest.raises(InputError, match="gptq and gptq_v2 are read"):
        GPTQ(Tensors(encode_module("X", affine(4, True)[0])), {"quantization_config": config})


@pytest.mark.parametrize(
    "changes",
    [
        {"X.qweight": np.zeros((11, 64), np.int32)},
        {"X.qzeros": np.zeros((2, 8), np.int32)},
        {"X.scales": np.zeros((3, 32), np.float16)},
        {"X.g_idx": np.full(96, 3, np.int32)},
        {"X.qweight": np.zeros((12, 64), np.uint8)},
    ],
)
def test_contradictions_are_one_line_that_names_the_module(changes):
    with pytest.raises(InputError, match="X"):
        opened(encode_module("X", affine(4, True)[0]) | changes).read("X.weight")


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_directory_goes_out_and_comes_in(symmetric, tmp_path):
    model = jc.load(write_llama(tmp_path / "llama", layers=1))
    small = jc.compress(model, "rtn", bits=4, group_size=32, symmetric=symmetric, scale_bits=16)
    said = jc.save(small, tmp_path / "out", format="gptq")
    assert "gptq, 7 of" in said[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == json.loads(
        (tmp_path / "out" / "quantize_config.json").read_text()
    )
    again = jc.load(tmp_path / "out")
    assert jax.tree.structure(again.params) == jax.tree.structure(small.params)
    for (path, a), (_, b) in zip(leaves_with_paths(again.params), leaves_with_paths(small.params)):
        assert all(same(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))), path
    # Older directories describe the format in quantize_config.json only.
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    older = jc.load(tmp_path / "out")
    np.testing.assert_array_equal(older(IDS), again(IDS))


def test_embeddings_are_refused(tmp_path):
    model = jc.load(write_llama(tmp_path / "llama", layers=1))
    small = jc.compress(model, "rtn", bits=4, group_size=-1, scale_bits=16, include=["embed/*"])
    with pytest.raises(InputError, match="is no linear module"):
        jc.save(small, tmp_path / "out", format="gptq")
    assert not (tmp_path / "out").exists()
