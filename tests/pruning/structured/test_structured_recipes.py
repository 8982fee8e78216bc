"""Structured cuts of language models, trained back: a Llama by a recipe, an LSTM by the loop."""

import jax
import numpy as np
import pytest
import tiny

import jaxcompress as jc
from jaxcompress.data.batches import Batches
from jaxcompress.data.language import text_dataset
from jaxcompress.models import LSTMConfig, build_model
from jaxcompress.training import fit, make_optimizer, next_token


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    """Prepared data sets end with the tests."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def perplexities(report):
    return [stage["quality"]["heldout"]["perplexity"] for stage in report["stages"]]


def recipe(source, text, *stages):
    return {
        "model": {"path": str(source)},
        "data": {"train": text, "heldout": text, "ctx": 32, "tokens": 1024},
        "stages": stages,
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama that has learned a text, and the text."""
    folder = tmp_path_factory.mktemp("llama")
    text = str(tiny.write_text(folder / "text.txt"))
    training = {"method": "finetune", "steps": 40, "learning_rate": 3e-3, "warmup": 5}
    source = tiny.write_llama(folder / "source", layers=4)
    jc.run(recipe(source, text, training, {"method": "export"}), folder / "work")
    return folder / "work" / "export", text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["depth", "width"])
def test_a_cut_llama_is_distilled_and_computes_the_same_in_pytorch(kind, llama, tmp_path):
    cuts = {
        "depth": ({"method": "depth", "sparsity": 0.25, "score": "perplexity"},),
        "width": (
            {"method": "width", "sparsity": 0.25, "multiple": 16},
            {"method": "neurons", "sparsity": 0.25, "multiple": 16, "compensate": "refit"},
        ),
    }
    recovery = {"method": "distill", "steps": 30, "learning_rate": 3e-3, "warmup": 5}
    stages = (
        *cuts[kind],
        {"method": "export", "path": "cut", "compare": True},
        recovery,
        {"method": "export", "path": "distilled", "compare": True},
    )
    report = jc.run(recipe(*llama, *stages), tmp_path / "work")
    start, *_, cut, distilled, exported = perplexities(report)
    assert start < cut
    assert np.log(distilled / start) < np.log(cut / start) / 2
    assert exported == pytest.approx(distilled, rel=1e-4)
    assert [check["passed"] for check in report["checks"]] == [True, True]
    small = jc.load(tmp_path / "work" / "distilled").config
    sizes = (small.num_hidden_layers, small.hidden_size, small.intermediate_size)
    assert sizes == {"depth": (3, 64, 128), "width": (4, 48, 96)}[kind]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """An LSTM that has learned a text, and the text's windows."""
    folder = tmp_path_factory.mktemp("lstm")
    tokenizer = jc.load(tiny.write_llama(folder / "llama", layers=1)).tokenizer
    windows = text_dataset(str(tiny.write_text(folder / "text.txt")), tokenizer, 32)
    config = LSTMConfig(vocab_size=300, embedding_dim=16, hidden_size=24, num_hidden_layers=2)
    return tuned(build_model(config), windows, folder / "work", 150, 1e-2), windows


def tuned(model, windows, folder, steps, rate):
    optimizer = make_optimizer(steps=steps, learning_rate=rate, warmup=5)
    return fit(model, next_token(model), Batches(windows, 16), optimizer, steps=steps,
               workdir=folder)  # fmt: skip


def perplexity(model, windows):
    return jc.evaluate(model, text=windows[:64]["ids"], ctx=32)["perplexity"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"score": "magnitude"}, {"score": "gate"}])
def test_units_of_an_lstm_are_cut_and_tuned(learned, options, tmp_path):
    dense, windows = learned
    start = perplexity(dense, windows)
    assert start < 60  # of 300 tokens
    calibration = windows[:32]["ids"]
    small = jc.compress(dense, "units", sparsity=0.5, calibration=calibration, **options)
    assert small.config.hidden_size == 12
    cut = perplexity(small, windows)
    after = perplexity(tuned(small, windows, tmp_path, 30, 3e-3), windows)
    assert start < cut
    assert np.log(after / start) < np.log(cut / start) / 2


def test_a_threshold_on_the_dense_layer_holds_while_the_rest_is_tuned(learned, tmp_path):
    dense, windows = learned
    small = jc.compress(dense, "threshold", deviations=1.0, include="head/kernel", store="masked")
    mask = np.asarray(jc.densify(small.params)["head"]["kernel"]) != 0
    kernel = np.asarray(dense.params["head"]["kernel"])
    np.testing.assert_array_equal(mask, np.abs(kernel) >= kernel.std())
    after = tuned(small, windows, tmp_path, 30, 3e-3)
    assert perplexity(after, windows) < perplexity(small, windows)
    found = np.asarray(jc.densify(after.params)["head"]["kernel"])
    np.testing.assert_array_equal(found != 0, mask)
    assert jax.tree.structure(after.params) == jax.tree.structure(small.params)
