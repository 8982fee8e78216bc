"""Stacked and unrolled blocks, and depth cuts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_variants import ours, token_ids, torch_model
from torch_twins import DecoderModel, LSTMModel, ResNetModel, assert_close, run

from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Blocks, Model
from jaxcompress.models import (
    build_model,
    from_state_dict,
    stack_layers,
    take_layers,
    unstack_layers,
    with_scan_layers,
)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_stack_and_unstack_are_inverses():
    twin = torch_model("qwen3")
    unrolled, scanned = ours(twin), ours(twin, scan_layers=True)
    assert_same(stack_layers(unrolled.params), scanned.params)
    assert_same(unstack_layers(scanned.params), unrolled.params)
    assert_same(stack_layers(scanned.params), scanned.params)
    assert_same(unstack_layers(unrolled.params), unrolled.params)


@pytest.mark.parametrize("variant", ["llama3", "qwen2_mixed"])
def test_the_layout_of_a_model_can_be_changed(variant):
    model, ids = ours(torch_model(variant)), token_ids()
    scanned = with_scan_layers(model, True)
    assert scanned.config.scan_layers
    assert_close(run(scanned, ids), run(model, ids))
    back = with_scan_layers(scanned, False)
    assert back.apply is model.apply
    assert_same(back.params, model.params)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("variant", ["llama3", "qwen2_mixed"])
def test_take_layers_leaves_out_the_others(variant, scan_layers):
    whole = ours(torch_model(variant), scan_layers=scan_layers)
    ids = token_ids()
    cut = take_layers(whole, [2, -3])
    assert cut.config.num_hidden_layers == 2
    # Blocks whose output projections are zero pass the residual stream on unchanged.
    layers = unstack_layers(whole.params)["layers"]
    silent = jax.tree.map(lambda x: x, layers["1"])
    silent["attn"]["o_proj"]["kernel"] *= 0
    silent["mlp"]["down_proj"]["kernel"] *= 0
    reordered = {"0": layers["2"], "1": silent, "2": layers["0"]}
    windows = tuple(whole.config.windows[i] for i in (2, 1, 0))
    config = dataclasses.replace(whole.config, scan_layers=False, windows=windows)
    want = build_model(config, {**whole.params, "layers": reordered})
    assert_close(run(cut, ids), run(want, ids))


def test_take_layers_of_other_models():
    lstm = from_state_dict(LSTMModel(layers=3).state_dict(), "lstm")
    cut = take_layers(lstm, [0, 2])
    assert run(cut, token_ids() % 50).shape == (2, 24, 50)
    with pytest.raises(InputError, match="layer 0 must stay first"):
        take_layers(lstm, [1, 2])
    tutorial = from_state_dict(DecoderModel().state_dict(), "transformer_decoder", num_heads=4)
    assert take_layers(tutorial, [1]).config.num_hidden_layers == 1
    resnet = from_state_dict(ResNetModel().state_dict(), "cifar_resnet")
    with pytest.raises(InputError, match="cifar_resnet"):
        take_layers(resnet, [0])


def test_take_layers_of_a_function_with_blocks():
    blocks = Blocks(
        embed=lambda params, x: x,
        block=lambda params, hidden: hidden @ params["w"],
        head=lambda params, hidden: hidden,
    )
    params = {"layers": {"w": jnp.stack([jnp.eye(2) * s for s in (2.0, 3.0, 5.0)])}}
    model = take_layers(Model(blocks.run, params, blocks=blocks), [0, 2])
    np.testing.assert_allclose(model.apply(model.params, jnp.ones((1, 2))), 10.0)


@pytest.mark.parametrize(
    ("indices", "said"), [([], "at least one"), ([3], "layer 3 of a model with 3"), ([-4], "-4")]
)
def test_take_layers_refuses(indices, said):
    with pytest.raises(InputError, match=said):
        take_layers(ours(torch_model("llama2")), indices)


def compressed(params, bits):
    """Attention outputs as codes; the values do not matter here."""

    def leaf(path, x):
        if "o_proj" not in jax.tree_util.keystr(path):
            return x
        words = jnp.arange(x.size * bits // 32, dtype=jnp.int32)
        codes = words.reshape(*x.shape[:-2], x.shape[-1], -1)
        return Affine(codes, jnp.ones((*codes.shape[:-1], 1)), None, bits=bits, pad=0)

    return jax.tree_util.tree_map_with_path(leaf, params)


def test_compressed_leaves_stack_and_cut():
    model = ours(
        torch_model("llama2", hidden_size=64, num_attention_heads=8, intermediate_size=64),
        scan_layers=True,
    )
    stacked = model.replace(params=compressed(model.params, 4))
    apart = unstack_layers(stacked.params)
    assert is_compressed(apart["layers"]["1"]["attn"]["o_proj"]["kernel"])
    assert_same(stack_layers(apart), stacked.params)
    kept = take_layers(stacked, [2, 0]).params["layers"]["attn"]["o_proj"]["kernel"]
    whole = stacked.params["layers"]["attn"]["o_proj"]["kernel"]
    np.testing.assert_array_equal(kept.codes, whole.codes[np.array([2, 0])])


def test_layers_of_different_formats_do_not_stack():
    model = ours(torch_model("llama2", hidden_size=64, num_attention_heads=8))
    layers = dict(model.params["layers"])
    layers["1"] = compressed(layers["1"], 4)
    with pytest.raises(InputError, match="cannot be stacked; use scan_layers=False"):
        stack_layers({**model.params, "layers": layers})
