"""LSTM, TransformerDecoder, ResNet and GPT-2 compute what PyTorch computes."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from torch_twins import DecoderModel, LSTMModel, ResNetModel, assert_close, run, scramble

from jaxcompress.core.errors import InputError
from jaxcompress.models import (
    GPT2Config,
    abstract_params,
    from_state_dict,
    functions_of,
    load,
    model_from_tensors,
    to_checkpoint_tensors,
)


def arrays(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


def token_ids(seq=19, vocab=50):
    return np.random.default_rng(0).integers(0, vocab, (2, seq))


def assert_same_state(model, module, ignored=()):
    """What leaves for the checkpoint is what came in, bit for bit, and complete."""
    out = dict(to_checkpoint_tensors(model))
    want = {n: v for n, v in arrays(module).items() if not n.endswith(tuple(ignored) or ("\0",))}
    assert out.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(out[name], value)


GPT2 = {"vocab_size": 50, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale_attn_by_inverse_layer_idx": True, "n_inner": 40, "activation_function": "relu"},
        {"tie_word_embeddings": False, "scale_attn_weights": False},
    ],
)
def test_gpt2_logits_equal_transformers(changes, scan_layers):
    twin = scramble(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | changes)))
    ids = token_ids()
    with torch.no_grad():
        want = twin(torch.from_numpy(ids)).logits.numpy()
    config = GPT2Config.from_hf(twin.config.to_dict())
    config = dataclasses.replace(config, scan_layers=scan_layers)
    tensors = arrays(twin)
    model = model_from_tensors(config, tensors.__getitem__, tensors)
    assert_close(run(model, ids), want)
    for name, value in to_checkpoint_tensors(model):
        np.testing.assert_array_equal(value, tensors[name])


def test_gpt2_refuses_more_tokens_than_positions():
    config = GPT2Config(**GPT2)
    with pytest.raises(InputError, match="33 tokens exceed the 32 positions"):
        jax.eval_shape(functions_of(config).apply, abstract_params(config), np.zeros((1, 33), int))


@pytest.mark.parametrize("shape", [{}, {"layers": 1, "bias": False}, {"hidden": 9, "layers": 3}])
def test_lstm_logits_equal_torch(shape):
    twin = scramble(LSTMModel(**shape))
    ids = token_ids()
    with torch.no_grad():
        want = twin(torch.from_numpy(ids)).numpy()
    model = from_state_dict(twin.state_dict(), "lstm")
    assert_close(run(model, ids), want)
    assert_close(model.blocks.run(model.params, ids), want)
    assert_same_state(model, twin)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_first": True, "final_norm": True, "activation": "gelu"},
        {"memory": "zeros", "positions": "sinusoidal"},
        {"causal_memory": True, "bias": False, "final_norm": True},
    ],
)
def test_transformer_decoder_logits_equal_torch(options, scan_layers):
    twin = scramble(DecoderModel(**options))
    ids = token_ids()
    with torch.no_grad():
        want = twin(torch.from_numpy(ids)).numpy()
    told = {k: v for k, v in options.items() if k not in ("bias", "final_norm", "positions")}
    model = from_state_dict(
        twin.state_dict(),
        "transformer_decoder",
        num_heads=4,
        scale_embedding=options.get("positions") == "sinusoidal",
        **told,
    )
    config = dataclasses.replace(model.config, scan_layers=scan_layers)
    tensors = arrays(twin)
    model = model_from_tensors(config, tensors.__getitem__, tensors)
    assert_close(run(model, ids), want)
    assert_close(model.blocks.run(model.params, ids), want)
    assert_same_state(model, twin)


def test_transformer_decoder_asks_for_what_shapes_do_not_tell():
    with pytest.raises(InputError, match="num_heads="):
        from_state_dict(DecoderModel().state_dict(), "transformer_decoder")


@pytest.mark.parametrize(
    "shape",
    [{}, {"sizes": (1, 2, 1), "widths": (8, 12, 20), "option": "B", "classes": 7}],
)
def test_resnet_logits_equal_torch(shape):
    twin = scramble(ResNetModel(**shape))
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        want = twin(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    model = from_state_dict(twin.state_dict(), "cifar_resnet")
    assert_close(run(model, images), want)
    assert_same_state(model, twin, ignored=["num_batches_tracked"])


def test_resnet_training_updates_running_statistics_as_torch():
    twin = scramble(ResNetModel(sizes=(1, 1, 1), widths=(8, 16, 32)))
    model = from_state_dict(twin.state_dict(), "cifar_resnet")
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    twin.train()
    with torch.no_grad():
        want = twin(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    logits, updates = model.apply(model.params, images, train=True, mutable=["batch_stats"])
    assert_close(logits, want)
    after = model.replace(params={**model.params, **updates})
    tensors = dict(to_checkpoint_tensors(after))
    before = dict(to_checkpoint_tensors(model))
    for name, value in arrays(twin).items():
        if "running" in name:
            assert_close(tensors[name], value)
            assert np.abs(before[name] - value).max() > 1e-3


def test_resnet20_of_2018(assets):
    path = assets / "cifar-resnet20" / "resnet20-12fca82f.th"
    stored = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    twin = ResNetModel().eval()
    twin.load_state_dict({n.removeprefix("module."): v for n, v in stored.items()}, strict=False)
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        want = twin(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    model = load(path)
    assert model.config.stage_sizes == (3, 3, 3)
    assert sum(x.size for x in jax.tree.leaves(model.params["params"])) == 269_722
    assert_close(run(model, images), want)
