"""Keys and values in a few bits: against NumPy, and decoding against the full forward pass."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from decoder_variants import ours, token_ids, torch_model
from marks import slow_but

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.evaluation.language import perplexity
from jaxcompress.models import (
    DecoderConfig,
    GPT2Config,
    LSTMConfig,
    build_model,
    functions_of,
    generate,
    load,
    quantize_kv_cache,
)
from jaxcompress.models.kv_cache import KV_CACHE_DTYPES, decode, encode, rounded

each_dtype = pytest.mark.parametrize("dtype", KV_CACHE_DTYPES)


def keys(head_dim=12, seed=0):
    x = np.random.default_rng(seed).normal(size=(2, 5, 3, head_dim)).astype(np.float32)
    x[0, 1, 2] = 0
    return x


def by_numpy(x, dtype):
    """Rounded per token and head, in float32."""
    absmax = np.abs(x).max(-1, keepdims=True)
    eps = np.finfo(np.float32).eps
    if dtype == "int4":
        low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
        scale = (high - low) / np.float32(15)
        scale = np.where(scale == 0, eps, scale)
        zero = np.rint(np.clip(-8 - low / scale, -8, 7)) + 8
        zero = np.where(high == low, 8, zero)
        u = np.clip(np.rint(x / scale + (zero - 8)), -8, 7) + 8
        return u, scale, zero, ((u - zero) * scale).astype(np.float32)
    scale = absmax / np.float32(127 if dtype == "int8" else 448)
    scale = np.where(scale == 0, eps, scale)
    if dtype == "int8":
        q = np.clip(np.rint(x / scale), -128, 127)
    else:
        q = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return q, scale, None, (q * scale).astype(np.float32)


@each_dtype
@pytest.mark.parametrize("head_dim", [12, 16])
def test_codes_and_scales_are_those_of_numpy(dtype, head_dim):
    x = keys(head_dim)
    q, scale, zero, want = by_numpy(x, dtype)
    part = jax.jit(encode, static_argnums=1)(x, dtype)
    np.testing.assert_array_equal(part["scale"], scale)
    if dtype == "int4":
        assert part["codes"].shape == (2, 5, 3, -(-head_dim // 8))
        nibbles = np.asarray(part["codes"]).view(np.uint8)
        nibbles = np.stack([nibbles & 15, nibbles >> 4], -1).reshape(2, 5, 3, -1)
        np.testing.assert_array_equal(nibbles[..., :head_dim], q)
        np.testing.assert_array_equal(part["zero_point"], zero)
    else:
        assert part["codes"].dtype == (jnp.int8 if dtype == "int8" else jnp.float8_e4m3fn)
        np.testing.assert_array_equal(part["codes"].astype(jnp.float32), q)
    np.testing.assert_array_equal(decode(part, dtype, head_dim), want)
    np.testing.assert_array_equal(jax.jit(rounded, static_argnums=1)(x, dtype), want)


@each_dtype
def test_gradients_pass_straight_through(dtype):
    x = keys()
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(rounded(x, dtype))))(x)
    np.testing.assert_allclose(gradient, np.cos(by_numpy(x, dtype)[-1]), rtol=1e-5, atol=1e-6)


def gpt2():
    return build_model(
        GPT2Config(vocab_size=97, n_positions=32, n_embd=24, n_layer=2, n_head=4), seed=3
    )


MODELS = {
    "grouped-query": lambda: ours(torch_model("llama3")),
    "windows-scanned": lambda: ours(torch_model("mistral"), scan_layers=True),
    "qk-norm-scanned": lambda: ours(torch_model("qwen3"), scan_layers=True),
    "gpt2": gpt2,
}
CASES = [
    ("grouped-query", "int8"),
    ("grouped-query", "int4"),
    ("grouped-query", "fp8"),
    ("windows-scanned", "int4"),
    ("qk-norm-scanned", "fp8"),
    ("gpt2", "int8"),
]


@pytest.mark.parametrize(("name", "dtype"), slow_but(CASES, CASES[-2:]))
def test_decoding_gives_the_logits_of_the_full_forward_pass(name, dtype):
    dense, ids = MODELS[name](), token_ids(14)
    model = quantize_kv_cache(dense, dtype)
    functions = functions_of(model.config)
    full = np.asarray(jax.jit(model.apply)(model.params, ids))
    unrounded = np.asarray(jax.jit(dense.apply)(dense.params, ids))
    cache = functions.init_cache(len(ids), 16)
    cached = jax.jit(functions.apply_cached)
    logits, cache = cached(model.params, ids[:, :6], cache, jnp.int32(0))
    steps = [logits]
    for at in range(6, 14):
        logits, cache = cached(model.params, ids[:, at : at + 1], cache, jnp.int32(at))
        steps.append(logits)
    gap = np.abs(np.concatenate(steps, axis=1) - full)
    rounding = np.abs(full - unrounded)
    assert rounding.max() > 1e-3
    # A value between two codes may go either way; that moves little of what rounding moves.
    assert gap.mean() < 0.01 * rounding.mean()
    assert gap.max() < 0.1 * rounding.max()


def without_cache(model, prompt, count):
    """Greedy decoding by the whole sequence at every step."""
    ids, apply = np.asarray(prompt), jax.jit(model.apply)
    for _ in range(count):
        padded = np.pad(ids, ((0, 0), (0, prompt.shape[1] + count - ids.shape[1])))
        logits = apply(model.params, padded)[:, ids.shape[1] - 1]
        ids = np.concatenate([ids, np.asarray(logits.argmax(-1))[:, None]], axis=1)
    return ids


@pytest.mark.parametrize(("name", "dtype"), [CASES[1], CASES[4], CASES[5]])
def test_generated_tokens_are_those_without_a_cache(name, dtype):
    model = quantize_kv_cache(MODELS[name](), dtype)
    got = generate(model, token_ids(9), 8)
    np.testing.assert_array_equal(got, without_cache(model, token_ids(9), 8))


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("dtype", [None, *KV_CACHE_DTYPES])
def test_the_bytes_that_a_cache_takes(dtype, scan_layers):
    config = DecoderConfig(
        num_hidden_layers=2, num_key_value_heads=4, num_attention_heads=8, head_dim=64,
        dtype="bfloat16", scan_layers=scan_layers, kv_cache_dtype=dtype,
    )  # fmt: skip
    functions = functions_of(config)
    cache = jax.eval_shape(lambda: functions.init_cache(3, 100))
    taken = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    of_a_head = {None: 64 * 2, "int8": 64 + 2, "fp8": 64 + 2, "int4": 32 + 2 + 1}[dtype]
    assert taken == 2 * 2 * 3 * 100 * 4 * of_a_head
    given = jax.ShapeDtypeStruct((3, 1), jnp.int32)
    params = jax.eval_shape(functions.init, jax.random.key(0))
    _, after = jax.eval_shape(
        functions.apply_cached, params, given, cache, jax.ShapeDtypeStruct((), jnp.int32)
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), cache
    )


@pytest.mark.parametrize("name", ["grouped-query", "qk-norm-scanned", "gpt2"])
def test_the_walk_from_block_to_block_rounds_too(name):
    model, ids = quantize_kv_cache(MODELS[name](), "int4"), token_ids(9)
    logits = model.blocks.run(model.params, ids)
    np.testing.assert_allclose(logits, model.apply(model.params, ids), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param("grouped-query", "native", marks=pytest.mark.slow),
        ("grouped-query", "compressed-tensors"),
        pytest.param("gpt2", "native", marks=pytest.mark.slow),
        ("gpt2", "dense"),
    ],
)
def test_the_config_that_is_saved_says_so(name, form, tmp_path):
    model = quantize_kv_cache(MODELS[name](), "int8")
    compressed = jc.compress(model, "rtn", bits=8, group_size=-1)
    assert compressed.config.kv_cache_dtype == "int8"
    jc.save(compressed, tmp_path / "out", format=form)
    entries = json.loads((tmp_path / "out" / "config.json").read_text())
    assert entries["kv_cache_dtype"] == "int8"
    assert (entries.get("quantization_config") or {}).get("kv_cache_scheme") is None
    back = load(tmp_path / "out")
    assert back.config.kv_cache_dtype == "int8"
    unrounded = quantize_kv_cache(back, None)(token_ids(9))
    want = quantize_kv_cache(compressed, None)(token_ids(9))
    np.testing.assert_allclose(unrounded, want, atol=1e-5)
    gap = np.abs(np.asarray(back(token_ids(9)) - compressed(token_ids(9))))
    assert gap.max() < 0.2 * np.abs(np.asarray(back(token_ids(9)) - unrounded)).max()
    jc.save(quantize_kv_cache(back, None), tmp_path / "again", format=form)
    assert load(tmp_path / "again").config.kv_cache_dtype is None


def test_none_takes_it_back():
    dense = MODELS["grouped-query"]()
    again = quantize_kv_cache(quantize_kv_cache(dense, "int4"), None)
    assert again.config == dense.config
    np.testing.assert_array_equal(again(token_ids(9)), dense(token_ids(9)))


def test_refusals():
    dense = MODELS["gpt2"]()
    with pytest.raises(InputError, match="kv_cache_dtype 'int3': use one of int8, int4, fp8"):
        quantize_kv_cache(dense, "int3")
    with pytest.raises(InputError, match="kv_cache_dtype 'nf4'"):
        dataclasses.replace(DecoderConfig(), kv_cache_dtype="nf4")
    with pytest.raises(InputError, match="quantize_kv_cache: lstm cannot decode with a cache"):
        quantize_kv_cache(build_model(LSTMConfig(vocab_size=11)), "int8")
    with pytest.raises(InputError, match="a model without config"):
        quantize_kv_cache(jc.Model(dense.apply, dense.params), "int8")


@pytest.mark.slow
def test_tinystories_stays_near_dense(assets):
    model = load(assets / "tinystories-656k")
    text = (assets / "text" / "tinystories-valid.txt").read_text()[:60_000]
    tokens = np.asarray(model.tokenizer.encode(text), np.int32)[: 40 * 256]

    def ppl(model):
        return perplexity(model, tokens, ctx=256)["perplexity"]

    dense = ppl(model)
    found = {dtype: ppl(quantize_kv_cache(model, dtype)) / dense for dtype in KV_CACHE_DTYPES}
    assert 0.999 < found["int8"] < 1.003
    assert found["int8"] < found["fp8"] < found["int4"] < 1.05
