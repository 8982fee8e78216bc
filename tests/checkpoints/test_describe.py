"""The table of `inspect` against what went into the file."""

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
from jaxcompress.checkpoints.describe import describe, format_of
from jaxcompress.checkpoints.huggingface_writer import write_checkpoint
from jaxcompress.checkpoints.leaves import open_leaves
from jaxcompress.checkpoints.native import write_native
from jaxcompress.checkpoints.safetensors import save_file
from jaxcompress.checkpoints.torch_writer import save_state_dict
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import STORED, is_compressed
from jaxcompress.core.arrays.sparse import NMSparse
from jaxcompress.core.errors import InputError
from jaxcompress.quantization.rtn import rtn


def half_empty(dtype):
    array = np.ones((8, 64), np.float32)
    array[::2] = 0
    array[0, 0] = -0.0
    return array.astype(dtype)


def affine(groups=4, zero=False):
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(-(2**31), 2**31, (8, 8), np.int64).astype(np.int32))
    scale = jnp.ones((8, groups), jnp.bfloat16)
    zeros = jnp.full((8, groups), 3, jnp.uint8) if zero else None
    return Affine(codes, scale, zeros, 4, 0, STORED, ("bfloat16",))


DENSE = {
    "a": half_empty(np.float32),
    "b": half_empty(ml_dtypes.bfloat16),
    "c": half_empty(ml_dtypes.float8_e4m3fn),
    "d": np.zeros((), np.int64),
    "e": np.ones((0, 3), np.float32),
}


@pytest.mark.parametrize("how", ["safetensors", "pth", "directory", "tree"])
def test_dense_checkpoints_of_every_kind(tmp_path, how):
    if how == "safetensors":
        save_file(DENSE, what := tmp_path / "x.safetensors")
    elif how == "pth":
        save_state_dict(what := tmp_path / "x.pth", {"state_dict": DENSE})
    elif how == "directory":
        what = write_checkpoint(tmp_path / "out", {}, DENSE.items(), max_shard_bytes=1)
    else:
        what = DENSE
    found = describe(what)
    json.dumps(found)
    rows = {row["name"]: row for row in found["tensors"]}
    assert set(rows) == set(DENSE)
    for name, array in DENSE.items():
        assert rows[name]["shape"] == list(array.shape)
        assert rows[name]["dtype"] == str(array.dtype)
        assert rows[name]["format"] == "dense"
        assert rows[name]["bytes"] == array.nbytes
    assert [rows[n]["sparsity"] for n in "abcde"] == [0.5, 0.5, 0.5, 1.0, None]
    assert [rows[n]["bits"] for n in "abcd"] == [32, 16, 8, 64]
    assert found["total"]["parameters"] == 3 * 512 + 1
    assert found["total"]["bytes"] == sum(array.nbytes for array in DENSE.values())
    assert all(row["sparsity"] is None for row in describe(what, sparsity=False)["tensors"])


def test_compressed_tensors_are_described_as_what_they_are(tmp_path):
    leaf = affine()
    tensors = {**encode_module("m", leaf), "norm": np.ones(3, np.float32)}
    config = {"quantization_config": quantization_config({"m": scheme_of(leaf)})}
    out = write_checkpoint(tmp_path / "out", config, tensors.items())
    rows = {row["name"]: row for row in describe(out)["tensors"]}
    assert set(rows) == {"m.weight", "norm"}
    row = rows["m.weight"]
    assert (row["shape"], row["dtype"], row["format"]) == ([8, 64], "bfloat16", "int4 g16")
    assert row["bits"] == 4 + 16 / 16
    u = np.asarray(leaf.integers())
    assert row["sparsity"] == pytest.approx((u == 8).mean())


def test_native_directories_and_trees_agree(tmp_path):
    tree = {
        "w": affine(1, zero=True),
        "s": affine(4).map(lambda buffer: jnp.stack([buffer, buffer])),
        "nm": NMSparse(affine(), jnp.zeros((8, 8), jnp.int32), 2, 4),
        "x": jnp.ones((2, 2)),
    }
    found = describe(write_native(tmp_path / "out", tree))["tensors"]
    assert sorted(found, key=str) == sorted(describe(tree)["tensors"], key=str)
    rows = {row["name"]: row for row in found}
    assert rows["w"]["format"] == "int4 channel asymmetric"
    assert rows["s"]["shape"] == [2, 8, 64]
    assert rows["nm"]["format"] == "NMSparse 2:4(int4 g16)"
    assert rows["nm"]["sparsity"] >= 0.5
    opened = open_leaves(tmp_path / "out")
    assert opened.stored == "native"
    assert is_compressed(opened.abstract("w"))


def test_formats_without_a_reader_show_what_is_stored(tmp_path):
    config = {"quantization_config": {"quant_method": "aqlm", "bits": 4}}
    out = write_checkpoint(tmp_path / "out", config, {"m.codes": np.ones((4, 4), np.int32)}.items())
    assert describe(out)["tensors"][0]["format"] == "as stored"


def test_per_tensor_scales_are_named():
    leaf = Affine(jnp.zeros((8, 8), jnp.int32), jnp.ones((1, 1)), None, 4, 0, STORED, ("float32",))
    assert format_of(leaf) == "int4 tensor"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "fp8", "granularity": "channel"}, "fp8 channel"),
        ({"dtype": "fp8_e5m2", "granularity": "tensor"}, "fp8_e5m2 tensor"),
        ({"dtype": "fp8", "granularity": "block", "group_size": 8}, "fp8 block8"),
        ({"dtype": "mxfp6"}, "mxfp6"),
        ({"dtype": "nvfp4"}, "nvfp4"),
        ({"dtype": "nf4", "group_size": 32}, "nf4 g32"),
        ({"dtype": "fp4", "granularity": "channel"}, "fp4 channel"),
        ({"group_size": 32, "scale_bits": 8}, "int4 g32, scales of 8 bits"),
        ({"granularity": "block", "group_size": 16}, "int4 block16"),
        ({"bits": 16, "group_size": -1, "symmetric": False}, "int16 channel asymmetric"),
    ],
)
def test_formats_in_words(options, words):
    assert format_of(rtn(jnp.ones((16, 64)), **options)) == words


@pytest.mark.parametrize("content", [None, b"", b"\0" * 20, b"PK\x03\x04"])
def test_what_cannot_be_read_is_one_line(tmp_path, content):
    for name in ["x.safetensors", "x.pth", "x.bin"]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            describe(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_real_weights(assets):
    found = describe(assets / "cifar-resnet20" / "resnet20-12fca82f.th")
    assert found["total"]["parameters"] == pytest.approx(272_474, rel=0.02)
    found = describe(assets / "tinystories-656k")
    assert found["total"]["bytes"] == pytest.approx(656_000 * 4, rel=0.02)
