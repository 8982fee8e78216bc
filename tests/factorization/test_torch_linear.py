"""Low rank in PyTorch: two linear layers, opened by the file that is written beside them."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from tiny import write_llama

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model

IDS = np.random.default_rng(0).integers(0, 300, (2, 16), np.int32)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def small(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    write_llama(directory, layers=2, attention_bias=True, tie_word_embeddings=request.param)
    return jc.compress(jc.load(directory), "svd", ratio=0.5)


def opened(directory):
    spec = importlib.util.spec_from_file_location("two_linear", directory / "two_linear.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "jaxcompress" not in (directory / "two_linear.py").read_text()
    return module


def test_transformers_runs_it_with_two_layers_for_one(small, tmp_path):
    lines = jc.save(small, tmp_path / "out", format="two-linear")
    assert "14 linear layers as two" in lines[0]
    theirs = opened(tmp_path / "out").load()
    up = theirs.model.layers[0].mlp.up_proj
    assert isinstance(up, torch.nn.Sequential)
    rank = small.params["layers"]["0"]["mlp"]["up_proj"]["kernel"].rank
    assert [tuple(part.weight.shape) for part in up] == [(rank, 64), (128, rank)]
    with torch.no_grad():
        logits = theirs(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(small(IDS), logits, atol=1e-4 * np.ptp(logits))
    state = torch.load(tmp_path / "out" / "two_linear.pth", weights_only=True)
    name = "model.layers.0.self_attn.q_proj"
    assert {f"{name}.0.weight", f"{name}.1.weight", f"{name}.1.bias"} <= set(state)
    assert f"{name}.weight" not in state
    assert "two_linear" not in sys.modules


def test_dense_export_holds_the_product(small, tmp_path):
    import transformers

    jc.save(small, tmp_path / "dense", format="dense")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    leaf = small.params["layers"]["1"]["mlp"]["down_proj"]["kernel"]
    product = np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64)
    np.testing.assert_allclose(
        theirs.model.layers[1].mlp.down_proj.weight.detach().numpy(), product, atol=1e-5
    )
    with torch.no_grad():
        logits = theirs(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(small(IDS), logits, atol=1e-4 * np.ptp(logits))


def test_native_keeps_the_factors(small, tmp_path):
    jc.save(small, tmp_path / "native")
    back = jc.load(tmp_path / "native")
    mine, theirs = (m.params["layers"]["0"]["mlp"]["up_proj"]["kernel"] for m in (small, back))
    np.testing.assert_array_equal(mine.a, theirs.a)
    np.testing.assert_array_equal(mine.b, theirs.b)


def test_a_module_of_ones_own_takes_the_weights(small, tmp_path):
    jc.save(small, tmp_path / "out", format="two-linear")
    import transformers

    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    own = transformers.AutoModelForCausalLM.from_config(config)
    module = opened(tmp_path / "out")
    assert module.load(own) is own
    other = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises((ValueError, AttributeError)):
        module.load(other)


def test_refusals(small, tmp_path):
    jc.save(small, tmp_path / "out", format="two-linear")
    with pytest.raises(InputError, match="exists"):
        jc.save(small, tmp_path / "out", format="two-linear")
    jc.save(small, tmp_path / "out", format="two-linear", overwrite=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(InputError, match="no config"):
        jc.save(Model(lambda p, x: x, {"w": np.ones(2)}), tmp_path / "own", format="two-linear")
