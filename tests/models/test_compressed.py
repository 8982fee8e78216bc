"""The models' code never makes a compressed weight dense."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_variants import ours, token_ids, torch_model
from torch_twins import DecoderModel, LSTMModel, ResNetModel, assert_close, scramble

from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import KERNEL, STORED, densify, dims_of, is_compressed
from jaxcompress.core.paths import map_with_paths
from jaxcompress.core.readers.lift import lift, materialized
from jaxcompress.models import (
    GPT2Config,
    build_model,
    from_state_dict,
    functions_of,
    generate,
    linear_paths,
    take_layers,
    untie,
    with_scan_layers,
)


def compress(model, also=()):
    """Random 8-bit codes in place of the linear layers, and of the paths `also`."""
    chosen = {*linear_paths(model), *also}
    draw = np.random.default_rng(0)

    def leaf(path, x):
        if path not in chosen:
            return x
        dims = STORED if path.endswith("embedding") else KERNEL
        if x.ndim == 4:  # a convolution: height, width, in, out
            dims = dims_of(x.shape, (0, 1, 2))
        lead = x.shape[: x.ndim - len(dims)]
        rows = x.shape[-2] if dims is STORED else x.shape[-1]
        columns = math.prod(x.shape[len(lead) :]) // rows
        if columns % 32:  # only the first convolution of the ResNet
            return x
        codes = draw.integers(-(2**31), 2**31, (*lead, rows, columns // 4), np.int32)
        scale = draw.uniform(0.5, 1.5, (*lead, rows, 1)) * columns**-0.5 / 80
        return Affine(jnp.asarray(codes), jnp.float32(scale), None, bits=8, pad=0, dims=dims)

    return model.replace(params=map_with_paths(leaf, model.params))


def run_dense(model, inputs):
    """Outputs with the same weights, made dense beforehand."""
    return jax.jit(model.apply)(densify(model.params), inputs)


def decoder(variant, **changes):
    """Sizes that are multiples of 32, so that codes need no padding."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
    twin = torch_model(variant, num_hidden_layers=2, **sizes)
    return ours(twin, **changes)


def gpt2():
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    return build_model(config)


def tutorial():
    state = scramble(DecoderModel(width=32)).state_dict()
    return from_state_dict(state, "transformer_decoder", num_heads=4)


def lstm():
    return from_state_dict(scramble(LSTMModel(embedding=32, hidden=32)).state_dict(), "lstm")


MODELS = {
    "llama": lambda: decoder("llama3"),
    "qwen3": lambda: decoder("qwen3"),
    "qwen2_mixed": lambda: decoder("qwen2_mixed"),
    "gpt2": gpt2,
    "tutorial": tutorial,
    "lstm": lstm,
}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_linear_weights_are_never_made_dense(name, scan_layers):
    model = MODELS[name]()
    if scan_layers and name == "lstm":
        pytest.skip("layers of an LSTM are not scanned")
    small = compress(with_scan_layers(model, scan_layers) if scan_layers else model)
    assert materialized(small.apply)(small.params, token_ids(8) % 50) == []


@pytest.mark.parametrize(("name", "scan_layers"), [("qwen3", False), ("qwen2_mixed", True)])
def test_compressed_equals_dense(name, scan_layers):
    small, ids = compress(with_scan_layers(MODELS[name](), scan_layers)), token_ids(8)
    assert_close(lift(small.apply)(small.params, ids), run_dense(small, ids), 1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "tutorial", "lstm"])
def test_neither_are_they_on_the_walk_from_block_to_block(name):
    small, ids = compress(MODELS[name]()), token_ids(8) % 50
    walk = small.blocks
    block = lift(walk.block)
    hidden = lift(walk.embed)(small.params, ids)
    for params in walk.of(small.params):
        hidden = block(params, hidden)
    assert block.materialized() == []
    got = lift(walk.head)(small.params, hidden)
    assert_close(got, run_dense(small, ids), 1e-5)


def test_embedding_and_output_are_never_made_dense():
    small = compress(untie(decoder("llama3")), ["embed/embedding", "lm_head/kernel"])
    ids = token_ids(8)
    assert is_compressed(small.params["embed"]["embedding"])
    assert materialized(small.apply)(small.params, ids) == []
    want = run_dense(small, ids)
    assert_close(lift(small.apply)(small.params, ids), want, 1e-5)


def test_compressed_convolutions():
    model = from_state_dict(
        scramble(ResNetModel((1, 1, 1), (32, 32, 64))).state_dict(), "cifar_resnet"
    )
    small = compress(model)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    want = run_dense(small, images)
    assert_close(lift(small.apply)(small.params, images), want, 1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_compressed_models_generate(scan_layers):
    small = compress(decoder("llama3", scan_layers=scan_layers))
    dense = small.replace(params=densify(small.params))
    prompt = token_ids(6)
    np.testing.assert_array_equal(generate(small, prompt, 8), generate(dense, prompt, 8))


def test_compressed_models_are_cut():
    small = compress(decoder("llama3"))
    dense = small.replace(params=densify(small.params))
    ids = token_ids(6)
    cut, want = take_layers(small, [1]), take_layers(dense, [1])
    assert_close(cut(ids), want(ids), 1e-5)


def test_bfloat16_computation_keeps_float32_codes_packed():
    model = compress(decoder("llama3"))
    half = dataclasses.replace(model.config, dtype="bfloat16")
    apply, ids = functions_of(half).apply, token_ids(6)
    assert materialized(apply)(model.params, ids) == []
    assert lift(apply)(model.params, ids).dtype == jnp.bfloat16
