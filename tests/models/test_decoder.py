"""The decoder computes what transformers computes, for each variant of the architecture."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from decoder_variants import VARIANTS, ours, token_ids, torch_logits, torch_model
from torch_twins import assert_close, run

from jaxcompress.core.errors import InputError
from jaxcompress.models import DecoderConfig, build_model, functions_of, load


@pytest.mark.parametrize(
    ("variant", "scan_layers"),
    [
        *((variant, False) for variant in VARIANTS),
        *((variant, True) for variant in ("llama2", "llama3", "mistral", "qwen2_mixed", "qwen3")),
    ],
)
def test_logits_equal_transformers(variant, scan_layers):
    twin, ids = torch_model(variant), token_ids()
    model = ours(twin, scan_layers=scan_layers)
    assert_close(run(model, ids), torch_logits(twin, ids))


def test_bfloat16_logits_are_as_close_to_float32_as_those_of_transformers():
    twin, ids = torch_model("llama3"), token_ids()
    exact = torch_logits(twin, ids)
    model = ours(twin, dtype="bfloat16")
    rotary = twin.model.rotary_emb
    twin = twin.to(torch.bfloat16)
    twin.model.rotary_emb = type(rotary)(twin.config)  # whose frequencies stay float32
    theirs = np.abs(torch_logits(twin, ids) - exact).mean()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    logits = jax.jit(model.apply)(half, ids)
    assert logits.dtype == jnp.bfloat16
    assert np.abs(np.asarray(logits, np.float32) - exact).mean() < 1.5 * theirs


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("variant", ["llama3", "mistral", "qwen3"])
def test_walking_the_blocks_equals_apply(variant, scan_layers):
    model, ids = ours(torch_model(variant), scan_layers=scan_layers), token_ids()
    walked = model.blocks.run(model.params, ids)
    np.testing.assert_allclose(walked, run(model, ids), rtol=0, atol=1e-5)


def test_blocks_with_different_windows_are_no_walk():
    assert ours(torch_model("qwen2_mixed")).blocks is None


@pytest.mark.parametrize(
    ("policy", "scan_layers"),
    [
        ("nothing_saveable", True),
        pytest.param("dots_saveable", False, marks=pytest.mark.slow),
    ],
)
def test_remat_changes_no_gradient(policy, scan_layers):
    plain = ours(torch_model("llama3"), scan_layers=scan_layers)
    config = dataclasses.replace(plain.config, remat=True, remat_policy=policy)
    remat, ids = build_model(config, plain.params), token_ids()

    def gradient(model):
        loss = lambda params: jnp.square(model.apply(params, ids)).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(model.params), str(jax.make_jaxpr(loss)(model.params))

    (want, without), (got, with_remat) = gradient(plain), gradient(remat)
    assert "remat" not in without
    assert "remat" in with_remat
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


def test_unknown_remat_policy():
    config = DecoderConfig.from_hf(torch_model("llama2").config.to_dict())
    config = dataclasses.replace(config, remat=True, remat_policy="everything")
    with pytest.raises(InputError, match="remat_policy 'everything'"):
        build_model(config)


def test_hidden_states_and_attention_weights_are_tagged():
    model = ours(torch_model("llama3"))
    text = str(jax.make_jaxpr(model.apply)(model.params, token_ids()))
    assert text.count("name=hidden") == 3
    assert text.count("name=attention_weights") == 3


def test_equal_configs_share_their_functions():
    config = DecoderConfig.from_hf(torch_model("llama3").config.to_dict())
    again = DecoderConfig.from_hf(torch_model("llama3").config.to_dict() | {"unknown": 1})
    assert functions_of(config) is functions_of(again)
    assert functions_of(config) is not functions_of(dataclasses.replace(config, scan_layers=True))


@pytest.mark.parametrize(
    ("variant", "scan_layers"),
    [
        ("qwen2_mixed", True),
        pytest.param("mistral", False, marks=pytest.mark.slow),
    ],
)
def test_cached_steps_equal_the_whole_sequence(variant, scan_layers):
    """Chunks of 6, 4 and 1 tokens: masks and positions go on where the cache ends."""
    model, ids = ours(torch_model(variant), scan_layers=scan_layers), token_ids(11)
    functions = functions_of(model.config)
    step = jax.jit(functions.apply_cached)
    cache, pieces, index = functions.init_cache(2, 16), [], 0
    for size in (6, 4, 1):
        logits, cache = step(model.params, ids[:, index : index + size], cache, index)
        pieces.append(logits)
        index += size
    assert_close(np.concatenate(pieces, 1), run(model, ids))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_tinystories(assets, scan_layers):
    path = assets / "tinystories-656k"
    twin = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = load(path, scan_layers=scan_layers)
    text = (assets / "text" / "tinystories-valid.txt").read_text()[:20_000]
    ids = np.asarray(model.tokenizer.encode(text)[: 4 * 512]).reshape(4, 512)
    assert_close(run(model, ids), torch_logits(twin, ids))
