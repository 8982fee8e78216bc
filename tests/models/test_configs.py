"""Configs read what transformers writes, and transformers reads what they write."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from decoder_variants import VARIANTS, ours, token_ids, torch_logits, torch_model
from torch_twins import assert_close, run, scramble

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.models import (
    DecoderConfig,
    GPT2Config,
    LSTMConfig,
    ResNetConfig,
    TransformerDecoderConfig,
    abstract_params,
    build_model,
    model_from_tensors,
    stock_form,
    take_layers,
    to_checkpoint_tensors,
    untie,
)


def stock(model, directory):
    """The model as stock transformers loads it, with not one weight missing or left over."""
    tensors = {name: np.ascontiguousarray(x) for name, x in to_checkpoint_tensors(model)}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(model.config.to_hf()))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_unchanged_config_is_written_as_it_was_read(variant):
    original = torch_model(variant).config.to_dict()
    assert DecoderConfig.from_hf(original).to_hf() == original


@pytest.mark.parametrize("variant", ["llama3", "mistral", "qwen2", "qwen2_mixed", "qwen3"])
def test_a_cut_model_is_the_same_in_transformers(variant, tmp_path):
    model = take_layers(ours(torch_model(variant)), [0, 2])
    ids = token_ids()
    assert_close(run(model, ids), torch_logits(stock(model, tmp_path), ids))


def test_a_cut_gpt2_is_the_same_in_transformers(tmp_path):
    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4}
    twin = scramble(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))
    tensors = {name: value.numpy() for name, value in twin.state_dict().items()}
    config = GPT2Config.from_hf(twin.config.to_dict())
    model = take_layers(model_from_tensors(config, tensors.__getitem__, tensors), [2, 0])
    ids = token_ids() % 50
    assert_close(run(model, ids), torch_logits(stock(model, tmp_path), ids))


def test_an_untied_model_is_the_same_in_transformers(tmp_path):
    tied = ours(torch_model("llama3"))
    model, ids = untie(tied), token_ids()
    model.params["lm_head"]["kernel"] *= 1.5
    loaded = stock(model, tmp_path)
    assert loaded.config.tie_word_embeddings is False
    assert_close(run(model, ids), torch_logits(loaded, ids))
    assert_close(run(model, ids), 1.5 * run(tied, ids))


def test_fewer_heads_are_written_with_their_head_dim(tmp_path):
    """head_dim was derived (48 / 6 = 8); with 3 heads the same rule would say 16."""
    config = DecoderConfig.from_hf(torch_model("llama2").config.to_dict() | {"head_dim": None})
    config = dataclasses.replace(config, num_attention_heads=3, num_key_value_heads=3)
    written = config.to_hf()
    assert (written["num_attention_heads"], written["head_dim"]) == (3, 8)
    model, ids = build_model(config), token_ids()
    assert_close(run(model, ids), torch_logits(stock(model, tmp_path), ids))


@pytest.mark.parametrize(
    ("variant", "heads"),
    [
        ("llama3", (4, 2)),
        ("llama3", (5, 5)),
        ("mistral", (5, 1)),
        ("qwen2", (5, 5)),
        ("qwen3", (3, 1)),
    ],
)
def test_any_number_of_heads_of_any_size_is_the_same_in_transformers(variant, heads, tmp_path):
    """A head of 10 in a width of 48; LlamaConfig refuses 5 heads and is written as a Mistral."""
    config = DecoderConfig.from_hf(torch_model(variant).config.to_dict())
    config = dataclasses.replace(
        config,
        head_dim=10,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        intermediate_size=37,
    )
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(
        lambda leaf: (0.3 * draw(size=leaf.shape)).astype(np.float32), abstract_params(config)
    )
    model, ids = build_model(config, params), token_ids()
    said = jc.save(model, tmp_path / "out", verify_memory=0)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(run(model, ids), torch_logits(loaded.eval(), ids))
    renamed = variant == "llama3" and heads[0] == 5
    assert loaded.config.model_type == ("mistral" if renamed else config.model_type)
    assert any("written as a Mistral" in line for line in said) == renamed


def test_a_llama_that_is_no_mistral_either():
    config = DecoderConfig.from_hf(torch_model("llama_bias").config.to_dict())
    config = dataclasses.replace(config, num_attention_heads=5, num_key_value_heads=5)
    with pytest.raises(
        InputError, match=r"multiple of num_attention_heads \(5\); use format native"
    ):
        stock_form(build_model(config, {}))


def test_a_config_made_from_nothing_loads_in_transformers(tmp_path):
    config = DecoderConfig(
        model_type="qwen3",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        qk_norm=True,
        windows=(None, 4),
    )
    model, ids = build_model(config, seed=3), token_ids()
    assert_close(run(model, ids), torch_logits(stock(model, tmp_path), ids))


def test_config_json_of_before_transformers_5():
    """rope_theta and rope_scaling apart, torch_dtype, defaults left out."""
    old = {
        "model_type": "mistral",
        "hidden_size": 64,
        "num_attention_heads": 16,
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "torch_dtype": "bfloat16",
        "auto_map": {"kept": "as is"},
    }
    config = DecoderConfig.from_hf(old)
    assert (config.rope.rope_type, config.rope.factor, config.rope.rope_theta) == ("linear", 2, 5e5)
    assert (config.num_key_value_heads, config.windows) == (8, (4096,) * 32)
    assert config.param_dtype == "bfloat16"
    assert config.to_hf() == old
    wider = dataclasses.replace(config, intermediate_size=96, param_dtype="float32").to_hf()
    changed = {"intermediate_size": 96, "torch_dtype": "float32", "dtype": "float32"}
    assert wider == old | changed


@pytest.mark.parametrize(
    "config", [LSTMConfig(vocab_size=7), ResNetConfig(), TransformerDecoderConfig(norm_first=True)]
)
def test_our_own_configs_survive_json(config):
    again = type(config).from_hf(json.loads(json.dumps(config.to_hf())))
    assert again == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'llama3' needs 'factor'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"num_key_value_heads": 5}, "no multiple of num_key_value_heads 5"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
    ],
)
def test_bad_config(changes, said):
    with pytest.raises(InputError, match=said) as caught:
        DecoderConfig.from_hf(torch_model("llama2").config.to_dict() | changes)
    assert "\n" not in str(caught.value)


def test_windows_that_the_format_cannot_say():
    config = DecoderConfig.from_hf(torch_model("llama2").config.to_dict())
    with pytest.raises(InputError, match="cannot have windows"):
        dataclasses.replace(config, windows=(None, 4, 4)).to_hf()


def test_float32_is_what_torch_loads(tmp_path):
    model = ours(torch_model("llama2"))
    assert stock(model, tmp_path).dtype == torch.float32
