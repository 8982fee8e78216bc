"""Archives of pruned weights, bit for bit those of compressed-tensors, and torch's own pruning.

`golden/bitmask.safetensors` was written by compressed-tensors 0.11.0: for a bfloat16 and a float32
matrix `FORMAT/NAME/dense` beside what its `BitmaskCompressor` and `Sparse24BitMaskCompressor` make
of it, `FORMAT/NAME.compressed`, `.bitmask`, `.shape` and `.row_offsets`.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from marks import slow_but
from tiny import write_llama
from torch.nn.utils import prune

import jaxcompress as jc
from jaxcompress.checkpoints.compressed_tensors_reader import decode_module
from jaxcompress.checkpoints.compressed_tensors_sparse import (
    FORMATS,
    encode_sparse_module,
    names_of_sparse_module,
)
from jaxcompress.checkpoints.safetensors import SafetensorsFile
from jaxcompress.core.errors import InputError
from jaxcompress.models import ResNetConfig, build_model, name_map_of

GOLDEN = pathlib.Path(__file__).parent / "golden" / "bitmask.safetensors"
IDS = np.random.default_rng(0).integers(0, 300, (2, 16), np.int32)


class Tensors(dict):
    def read(self, name):
        return self[name]


def same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("container", FORMATS)
def test_every_byte_is_that_of_their_owner(container, name):
    with SafetensorsFile(GOLDEN) as golden:
        dense = golden.read(f"{container}/{name}/dense")
        mine = encode_sparse_module(name, dense, container)
        assert set(mine) == set(names_of_sparse_module(name, container))
        prefix = f"{container}/{name}."
        theirs = {k[len(container) + 1 :] for k in golden.keys() if k.startswith(prefix)}
        assert set(mine) == theirs
        for key, tensor in mine.items():
            assert same(tensor, golden.read(f"{container}/{key}")), key
    assert same(decode_module(Tensors(mine), name, {}), dense)


def test_a_run_that_keeps_fewer_than_two_is_filled_up():
    dense = np.zeros((2, 8), np.float32)
    dense[0, 3], dense[1, 5:7] = 1.5, [2, -3]
    tensors = encode_sparse_module("X", dense, "sparse-24-bitmask")
    assert tensors["X.compressed"].shape == (2, 4)
    assert same(decode_module(Tensors(tensors), "X", {}), dense)
    with pytest.raises(InputError, match="X: not 2:4; use --format sparse-bitmask"):
        encode_sparse_module("X", np.ones((2, 8)), "sparse-24-bitmask")
    with pytest.raises(InputError, match="6 columns are not a multiple of 4"):
        encode_sparse_module("X", np.ones((2, 6)), "sparse-24-bitmask")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return jc.load(write_llama(tmp_path_factory.mktemp("llama"), layers=2))


@pytest.mark.parametrize("kept", slow_but(["zeros", "sparse"], ["sparse"]))
@pytest.mark.parametrize(
    ("container", "pattern"),
    [("sparse-24-bitmask", "2:4"), ("sparse-bitmask", "unstructured")],
)
def test_a_model_goes_in_and_comes_back(llama, tmp_path, container, pattern, kept):
    small = jc.compress(llama, "magnitude", sparsity=0.5, pattern=pattern, store=kept)
    lines = jc.save(small, tmp_path / "out", format=container)
    assert any(line.startswith("warning:") and "no server loads it" in line for line in lines)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    found = config["sparsity_config"]
    assert (found["format"], len(found["targets"])) == (container, 14)
    assert "lm_head" not in found["targets"]
    dense = small.replace(params=jc.densify(small.params))
    np.testing.assert_array_equal(jc.load(tmp_path / "out")(IDS), dense(IDS))
    jc.save(small, tmp_path / "dense", format="dense")
    size = {
        name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("out", "dense")
    }
    assert size["out"] < 0.75 * size["dense"]


OLD = "JAXCOMPRESS_OLD_COMPRESSED_TENSORS"
READER = """
import json, sys
import compressed_tensors
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.config import SparsityCompressionConfig
from safetensors.torch import save_file

out, target = sys.argv[1:]
entry = json.load(open(out + "/config.json"))["quantization_config"]["sparsity_config"]
config = SparsityCompressionConfig.load_from_registry(entry["format"], **entry)
owner = BaseCompressor.load_from_registry(entry["format"], config=config)
save_file({n: t.contiguous() for n, t in owner.decompress(out)}, target)
"""


@pytest.mark.skipif(OLD not in os.environ, reason=f"{OLD} names no folder with 0.14 in it")
@pytest.mark.parametrize(
    ("container", "pattern"),
    [("sparse-24-bitmask", "2:4"), ("sparse-bitmask", "unstructured")],
)
def test_their_owner_reads_a_model(llama, tmp_path, container, pattern):
    """`pip install --no-deps --target DIR compressed-tensors==0.14.0.1`; DIR in the variable."""
    small = jc.compress(llama, "magnitude", sparsity=0.5, pattern=pattern)
    jc.save(small, tmp_path / "out", format=container)
    jc.save(small, tmp_path / "dense", format="dense")
    read = tmp_path / "read.safetensors"
    subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "out"), str(read)],
        env={**os.environ, "PYTHONPATH": os.environ[OLD]},
        check=True,
    )
    with (
        SafetensorsFile(read) as theirs,
        SafetensorsFile(tmp_path / "dense" / "model.safetensors") as dense,
    ):
        assert set(theirs.keys()) == set(dense.keys())
        for name in dense.keys():
            assert same(theirs.read(name), dense.read(name)), name


def test_nothing_sparse_is_refused(llama, tmp_path):
    with pytest.raises(InputError, match="no linear weight is sparse enough"):
        jc.save(llama, tmp_path / "out", format="sparse-bitmask")


# --------------------------------------------------------------- torch.nn.utils.prune


@pytest.mark.parametrize("kept", ["zeros", "masked", "sparse"])
def test_a_pruned_model_goes_on_in_torch(llama, tmp_path, kept):
    import transformers

    small = jc.compress(llama, "magnitude", sparsity=0.5, store=kept)
    lines = jc.save(small, tmp_path / "out", format="torch-prune")
    assert "14 weights with their masks" in lines[0]
    state = torch.load(tmp_path / "out" / "pruned.pth", weights_only=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for module in theirs.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            prune.identity(module, "weight")
    theirs.load_state_dict(state)
    with torch.no_grad():
        logits = theirs(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(small(IDS), logits, atol=1e-4 * np.ptp(logits))
    up = theirs.model.layers[0].mlp.up_proj
    assert float(up.weight_mask.mean()) == 0.5
    # What was removed is still there to be trained again, where it was kept.
    lost = up.weight_orig.detach()[up.weight_mask == 0]
    assert bool((lost != 0).all()) == (kept == "masked")
    prune.remove(up, "weight")
    assert float((up.weight == 0).float().mean()) == 0.5
    read = jc.load_params(tmp_path / "out" / "pruned.pth")
    weight = read["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"]
    np.testing.assert_array_equal(weight, up.weight.detach().numpy())


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["masked", "bitmask"])
def test_kernels_of_convolutions_are_pruned_too(tmp_path, kept):
    model = build_model(ResNetConfig(stage_sizes=(1, 1, 1)))
    small = jc.compress(model, "magnitude", sparsity=0.5, store=kept)
    jc.save(small, tmp_path / "out", format="torch-prune")
    state = torch.load(tmp_path / "out" / "pruned.pth", weights_only=True)
    dense = small.replace(params=jc.densify(small.params))
    wanted = dict(name_map_of(model.config).tensors(dense.params))
    masked = [name for name in wanted if f"{name}_mask" in state]
    assert len(masked) == 6 + 1
    for name, want in wanted.items():
        got = state[f"{name}_orig"] * state[f"{name}_mask"] if name in masked else state[name]
        np.testing.assert_array_equal(got.numpy(), want)
