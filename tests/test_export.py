"""What `save` writes, `load` gives back: every container, stacked layers, other families."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from marks import slow_but
from tiny import write_llama

import jaxcompress as jc
from jaxcompress.convert import convert
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.sparse import NMSparse, UnstructuredSparse
from jaxcompress.core.paths import leaves_with_paths

IDS = np.arange(48, dtype=np.int32).reshape(2, 24) % 300


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("export") / "llama")


def assert_equal_leaves(a, b):
    ours, theirs = leaves_with_paths(a), leaves_with_paths(b)
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, x), (_, y) in zip(ours, theirs):
        assert type(x) is type(y) or isinstance(x, (np.ndarray, jax.Array)), path
        assert jax.tree.structure(x) == jax.tree.structure(y), path
        for one, other in zip(jax.tree.leaves(x), jax.tree.leaves(y)):
            np.testing.assert_array_equal(one, other, err_msg=path)


COMPRESSED = {
    "int4": ("rtn", {"bits": 4, "group_size": 32}, Affine, "compressed-tensors"),
    "int3 asymmetric": ("rtn", {"bits": 3, "group_size": 32, "symmetric": False}, Affine, "native"),
    "2:4 stored sparse": ("magnitude", {"pattern": "2:4", "store": "sparse"}, NMSparse, "native"),
    "unstructured": (
        "magnitude",
        {"sparsity": 0.7, "store": "sparse", "scope": "row"},
        UnstructuredSparse,
        "native",
    ),
}


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("scan_layers", slow_but([False, True], [True]))
def test_compressed_leaves_come_back_bit_for_bit(name, scan_layers, llama, tmp_path):
    method, options, kind, container = COMPRESSED[name]
    model = jc.load(llama, scan_layers=scan_layers)
    small = jc.compress(model, method, **options)
    said = jc.save(small, tmp_path / "out")
    assert container in said[0]
    again = jc.load(tmp_path / "out", scan_layers=scan_layers)
    kinds = {type(leaf) for path, leaf in leaves_with_paths(again.params) if "mlp" in path}
    assert kinds == {kind}
    if not (kind is UnstructuredSparse and scan_layers):  # rows of other layers may be longer
        assert_equal_leaves(again.params, small.params)
    np.testing.assert_allclose(again(IDS), small(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "dtype", "container"),
    [
        ({"dtype": "fp8", "group_size": -1}, "float32", "compressed-tensors"),
        ({"dtype": "fp8_e5m2", "group_size": -1}, "float32", "native"),
        ({"dtype": "nvfp4"}, "bfloat16", "compressed-tensors"),
        ({"dtype": "nvfp4"}, "float32", "native"),  # compressed-tensors decodes it to bfloat16
        ({"dtype": "nf4"}, "float32", "bitsandbytes"),
        ({"dtype": "nf4", "scale_bits": 16}, "float32", "native"),
    ],
)
def test_auto_takes_what_transformers_runs(options, dtype, container, llama, tmp_path):
    small = jc.compress(jc.load(llama, dtype=dtype), "rtn", **options, include=["**/up_proj/*"])
    said = jc.save(small, tmp_path / "out", verify_memory=0)
    assert f": {container}, 3 of" in said[0]
    assert_equal_leaves(jc.load(tmp_path / "out").params, small.params)


def test_global_scales_that_servers_want_to_be_one_are_told(llama, tmp_path):
    model = jc.load(llama, dtype="bfloat16")
    small = jc.compress(model, "rtn", dtype="nvfp4", include=["**/up_proj/*", "**/gate_proj/*"])
    said = jc.save(small, tmp_path / "out", verify_memory=0)
    assert [line for line in said if "global scales" in line and "gate_proj, up_proj" in line]


@pytest.mark.parametrize("container", ["gptq", "awq"])
def test_a_directory_streams_into_another_format(container, llama, tmp_path):
    options = {"bits": 4, "group_size": 32, "scale_bits": 16}
    first = list(convert(llama, tmp_path / "a", "rtn", options=options, container=container))
    assert container in first[0]
    again = jc.load(tmp_path / "a")
    assert_equal_leaves(again.params, jc.compress(jc.load(llama), "rtn", **options).params)
    with pytest.raises(jc.InputError, match=f"{container} has no form for Float"):
        list(convert(llama, tmp_path / "b", "rtn", options={"dtype": "fp8", "group_size": -1},
                     container=container))  # fmt: skip
    assert not (tmp_path / "b").exists()


def test_gpt2_kernels_lie_the_other_way_round(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=4, initializer_range=0.1
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = jc.load(tmp_path / "gpt2")
    small = jc.compress(model, "rtn", bits=4, group_size=32)
    said = jc.save(small, tmp_path / "int4")
    assert "native" in said[0]  # transformers' Conv1D is no Linear module
    assert_equal_leaves(jc.load(tmp_path / "int4").params, small.params)
    jc.save(jc.compress(model, "magnitude", pattern="2:4"), tmp_path / "pruned")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    with torch.no_grad():
        want = theirs(torch.tensor(IDS.astype(np.int64))).logits.numpy()
    got = np.asarray(jc.load(tmp_path / "pruned")(IDS))
    assert np.abs(want - got).max() < 1e-4 * np.ptp(want)


def test_a_model_of_a_stranger_goes_native(tmp_path):
    params = {"up": {"kernel": jnp.ones((32, 64))}, "list": [jnp.zeros(3), None]}
    model = jc.Model(lambda p, x: x @ p["up"]["kernel"], params)
    small = jc.compress(model, "rtn", bits=4, group_size=16)
    assert "native" in jc.save(small, tmp_path / "out")[0]
    assert_equal_leaves(jc.load_params(tmp_path / "out"), small.params)
    with pytest.raises(jc.InputError, match="only native"):
        jc.save(small, tmp_path / "other", format="dense")


def test_dense_out_of_compressed(llama, tmp_path):
    small = jc.compress(jc.load(llama), "rtn", bits=4, group_size=32)
    jc.save(small, tmp_path / "dense", format="dense")
    again = jc.load(tmp_path / "dense")
    assert_equal_leaves(again.params, jc.densify(small.params))


def test_compressed_tensors_refuses_what_it_has_no_form_for(llama, tmp_path):
    small = jc.compress(jc.load(llama), "magnitude", pattern="2:4", store="sparse")
    with pytest.raises(jc.InputError, match="NMSparse"):
        jc.save(small, tmp_path / "out", format="compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_transformers_refuses_a_native_directory(llama, tmp_path):
    small = jc.compress(jc.load(llama), "rtn", bits=4, group_size=32, symmetric=False)
    jc.save(small, tmp_path / "out")
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_wrong_export_is_caught_and_removed(llama, tmp_path, monkeypatch):
    from jaxcompress import export

    small = jc.compress(jc.load(llama), "rtn", bits=4, group_size=32)
    monkeypatch.setattr(export, "load", lambda directory: jc.load(llama))
    with pytest.raises(jc.InputError, match="logits"):
        jc.save(small, tmp_path / "out")
    assert not list(tmp_path.iterdir())
