"""From a directory, a hub name or a file of weights to a model."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from decoder_variants import ours, token_ids, torch_logits, torch_model
from torch_twins import DecoderModel, ResNetModel, assert_close, run, scramble

from jaxcompress.core.errors import InputError
from jaxcompress.models import Tokenizer, load


def word_tokenizer():
    words = {w: i for i, w in enumerate(["<s>", "</s>", "once", "upon", "a", "time"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    inner.add_special_tokens(["<s>", "</s>"])
    inner.enable_truncation(2)
    return inner


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_directory_of_transformers(tmp_path, scan_layers):
    twin, ids = torch_model("llama3"), token_ids()
    twin.save_pretrained(tmp_path)
    model = load(tmp_path, scan_layers=scan_layers)
    assert_close(run(model, ids), torch_logits(twin, ids))
    want = ours(twin, scan_layers=scan_layers).params
    jax.tree.map(np.testing.assert_array_equal, model.params, want)
    assert model.source == str(tmp_path)
    assert model.tokenizer is None


def test_dtype_is_kept_or_cast(tmp_path):
    twin = torch_model("mistral").to(torch.bfloat16)
    twin.save_pretrained(tmp_path)
    kept, cast = load(tmp_path), load(tmp_path, dtype="float32")
    assert {x.dtype for x in jax.tree.leaves(kept.params)} == {jnp.dtype(ml_dtypes.bfloat16)}
    assert (kept.config.dtype, cast.config.dtype) == ("bfloat16", "float32")
    assert {x.dtype for x in jax.tree.leaves(cast.params)} == {jnp.dtype("float32")}
    assert cast.config.to_hf()["dtype"] == "float32"
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(run(cast, token_ids()), torch_logits(twin, token_ids()))
    with pytest.raises(InputError, match="dtype 'int8'"):
        load(tmp_path, dtype="int8")


def test_the_stored_dtype_wins_over_a_wrong_config(tmp_path):
    torch_model("mistral").to(torch.bfloat16).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}))
    assert load(tmp_path).config.dtype == "bfloat16"


def test_the_tokenizer_adds_and_cuts_nothing(tmp_path):
    torch_model("llama2", bos_token_id=0, eos_token_id=[1, 7]).save_pretrained(tmp_path)
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path).tokenizer
    assert tokenizer.encode("once upon a time") == [2, 3, 4, 5]
    assert tokenizer.decode(np.array([0, 2, 3, 1])) == "once upon"
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (0, (1, 7), 6)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="not a tokenizer file"):
        Tokenizer.from_directory(tmp_path)


def test_a_file_whose_tensors_tell_the_architecture(tmp_path):
    twin = scramble(ResNetModel(sizes=(1, 1, 1), widths=(8, 16, 32)))
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        want = twin(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    state = {f"module.{name}": value for name, value in twin.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "resnet.safetensors")
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "resnet.pth")
    for name in ("resnet.safetensors", "resnet.pth"):
        model = load(tmp_path / name)
        assert_close(run(model, images), want)


def test_a_file_that_needs_a_word_more(tmp_path):
    twin = scramble(DecoderModel(norm_first=True))
    torch.save(twin.state_dict(), tmp_path / "decoder.pt")
    told = {"model_type": "transformer_decoder", "num_heads": 4, "norm_first": True}
    model = load(tmp_path / "decoder.pt", config=told)
    ids = token_ids() % 50
    with torch.no_grad():
        assert_close(run(model, ids), twin(torch.from_numpy(ids)).numpy())
    with pytest.raises(InputError, match="num_heads="):
        load(tmp_path / "decoder.pt", config={"model_type": "transformer_decoder"})


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("someone/a-model-that-is-not-here", "not loaded from the Hugging Face hub"),
        ("./not-here", "no such directory or file"),
        ("/not/here", "no such directory or file"),
    ],
)
def test_what_cannot_be_found(path, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=said) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert path in str(caught.value)


def test_an_architecture_without_a_model(tmp_path):
    torch_model("llama2").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))
    with pytest.raises(InputError, match="'mamba' is not one of llama"):
        load(tmp_path)
    path.write_text("{}")
    with pytest.raises(InputError, match="cannot be told from the tensors"):
        load(tmp_path)
