"""`builtin:py4m`: loads everywhere, and is good enough that methods separate on it."""

import jax
import numpy as np
import pytest
import torch
import transformers

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.data.language import text_dataset
from jaxcompress.models import find_checkpoint

CTX = 256
WINDOWS = 64


@pytest.fixture(scope="module")
def dense():
    return jc.load("builtin:py4m", dtype="float32")


@pytest.fixture(scope="module")
def heldout(dense):
    rows = text_dataset("python-stdlib:heldout", dense.tokenizer, CTX)
    return rows[:WINDOWS]["ids"].reshape(-1)


@pytest.fixture(scope="module")
def baseline(dense, heldout):
    return jc.evaluate(dense, text=heldout, ctx=CTX)["perplexity"]


def test_is_small_and_says_what_it_is():
    folder = find_checkpoint("builtin:py4m")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
    card = (folder / "README.md").read_text()
    assert "sha256" in card.lower()
    assert "configs/py4m.py" in card


def test_shapes(dense):
    config = dense.config
    assert config.hidden_size == 256
    assert all(leaf.shape[0] % 128 == 0 for leaf in jax.tree.leaves(dense.params))
    assert 3.5e6 < sum(leaf.size for leaf in jax.tree.leaves(dense.params)) < 4.5e6


def test_transformers_computes_the_same(dense, heldout):
    folder = find_checkpoint("builtin:py4m")
    theirs, said = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(said.values())
    ids = heldout[: 2 * CTX].reshape(2, CTX)
    with torch.no_grad():
        want = theirs.eval()(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    got = np.asarray(jax.jit(dense.apply)(dense.params, ids))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.ptp(want))


def test_tokenizer_is_the_same_in_transformers(dense):
    theirs = transformers.AutoTokenizer.from_pretrained(find_checkpoint("builtin:py4m"))
    text = 'def f(x):\n    return {"ü": x ** 12}\n\n\nclass A:\n\t"""Doc."""\n'
    ids = dense.tokenizer.encode(text)
    assert theirs(text, add_special_tokens=False).input_ids == ids
    assert dense.tokenizer.decode(ids) == text == theirs.decode(ids)


@pytest.mark.parametrize(
    ("method", "options", "least", "most"),
    [
        ("rtn", {"bits": 8, "group_size": 128}, 0.99, 1.01),
        pytest.param("rtn", {"bits": 4, "group_size": 128}, 1.0, 1.12, marks=pytest.mark.slow),
        ("rtn", {"bits": 2, "group_size": 128}, 2.0, 1e9),
        pytest.param("magnitude", {"sparsity": 0.5}, 1.25, 1e9, marks=pytest.mark.slow),
    ],
)
def test_methods_separate(dense, heldout, baseline, method, options, least, most):
    """Bounds on perplexity over that of the dense model, on modules that no training saw."""
    small = jc.compress(dense, method, **options)
    ratio = jc.evaluate(small, text=heldout, ctx=CTX)["perplexity"] / baseline
    assert least <= ratio <= most


def test_other_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match="py4m"):
        jc.load("builtin:py4n")
