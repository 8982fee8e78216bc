"""The groups of the reference models, by hand, and a cut of all of them at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from jaxcompress.core.readers.coupling import coupling, verify
from jaxcompress.core.readers.cut import combine, cut, masked
from jaxcompress.models import decoder, gpt2, lstm, resnet, transformer_decoder
from jaxcompress.models.decoder_config import DecoderConfig

DECODER = {
    "vocab_size": 17,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MODELS = {
    "decoder": (decoder, DecoderConfig(**DECODER)),
    "decoder_scan": (decoder, DecoderConfig(**DECODER, scan_layers=True)),
    "gpt2": (gpt2, gpt2.GPT2Config(vocab_size=17, n_positions=9, n_embd=12, n_layer=2, n_head=3)),
    "resnet": (
        resnet,
        resnet.ResNetConfig(stage_sizes=(1, 1), widths=(4, 8), num_classes=3),
    ),
    "lstm": (
        lstm,
        lstm.LSTMConfig(vocab_size=17, embedding_dim=5, hidden_size=6, num_hidden_layers=2),
    ),
    "transformer_decoder": (
        transformer_decoder,
        transformer_decoder.TransformerDecoderConfig(
            vocab_size=17, d_model=12, num_heads=3, dim_feedforward=20, num_hidden_layers=2
        ),
    ),
}


def build(name):
    """(function, random parameters, input)"""
    module, config = MODELS[name]
    functions = module.build(config)
    shapes = jax.eval_shape(functions.init, jax.random.key(0))
    params = zoo.draw(jax.tree.map(lambda leaf: tuple(leaf.shape), shapes))
    if name == "resnet":
        stats = jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.5, params["batch_stats"])
        return functions.apply, params | {"batch_stats": stats}, zoo.normal(2, 8, 8, 3)
    return functions.apply, params, zoo.IDS


def sizes(groups):
    return sorted((g.size, g.steps, g.exact) for g in groups if g.cuttable)


def places(group):
    return {(m.path, m.axis, m.offset, m.stride) for m in group.members}


def test_decoder():
    fn, params, x = build("decoder")
    groups = coupling(fn)(params, x)
    per_layer = [(2, 0, True)] * 2 + [(8, 0, True), (40, 0, True)]
    # one rotary table serves every layer, so rotary pairs are one group
    assert sizes(groups) == sorted([(24, 0, True), (4, 0, True), *per_layer * 2])
    (hidden,) = groups.at("layers/1/mlp/up_proj/kernel", 1)
    mlp = "layers/1/mlp"
    expected = {(f"{mlp}/{name}_proj/kernel", 1, 0, 1) for name in ("gate", "up")}
    assert places(hidden) == expected | {(f"{mlp}/down_proj/kernel", 0, 0, 1)}
    heads = groups.at("layers/0/attn/v_proj/kernel", 1)[0]
    at = "layers/0/attn/{}_proj/kernel".format
    strides = {("q", 1, 16), ("k", 1, 8), ("v", 1, 8), ("o", 0, 16)}
    assert places(heads) == {(at(name), axis, 0, stride) for name, axis, stride in strides}


def test_decoder_scan():
    fn, params, x = build("decoder_scan")
    groups = coupling(fn)(params, x)
    inner = [(2, 2, True)] * 2 + [(8, 2, True), (40, 2, True)]
    assert sizes(groups) == sorted([(24, 0, True), (4, 0, True), *inner])
    path = next(p for p in {m.path for g in groups for m in g.members} if "up_proj" in p)
    (hidden,) = groups.at(path, 2)
    kept = hidden.keep([[0, 1, 2], [30, 35, 39]])
    small, smaller = cut(fn, params, kept, x)
    expected = jax.jit(fn)(masked(params, kept), x)
    np.testing.assert_allclose(smaller(small, x), expected, rtol=1e-4, atol=1e-4)


def test_gpt2():
    fn, params, x = build("gpt2")
    groups = coupling(fn)(params, x)
    per_layer = [(3, 0, True), (4, 0, True), (4, 0, True), (48, 0, True)]
    assert sizes(groups) == sorted([(12, 0, False), *per_layer * 2])
    heads, pair, value = groups.at("layers/0/attn/c_attn/kernel", 1)
    assert [heads.size, pair.size, value.size] == [3, 4, 4]
    fused = ("layers/0/attn/c_attn/kernel", 1), ("layers/0/attn/c_attn/bias", 0)
    out = ("layers/0/attn/c_proj/kernel", 0, 0)
    assert places(heads) == {(*p, 12 * i, 4) for p in fused for i in range(3)} | {(*out, 4)}
    assert places(value) == {(*p, 24, 1) for p in fused} | {(*out, 1)}
    assert places(pair) == {(*p, 12 * i, 1) for p in fused for i in range(2)}
    assert [m.level for m in value.matrices()] == ["general linear"]


def test_resnet():
    fn, params, x = build("resnet")
    groups = coupling(fn)(params, x)
    # option A shortcuts pad 4 channels to 8: 2 + 4 + 2, the middle being the first stage's
    assert sizes(groups) == sorted([(4, 0, True)] * 2 + [(8, 0, True)] + [(2, 0, True)] * 2)
    before, stream, after = groups.at("params/linear/kernel", 0)
    assert [before.size, stream.size, after.size] == [2, 4, 2]
    assert ("params/conv1/kernel", 3, 0, 1) in places(stream)
    assert ("params/linear/kernel", 0, 2, 1) in places(stream)


def test_lstm():
    fn, params, x = build("lstm")
    groups = coupling(fn)(params, x)
    assert sizes(groups) == [(5, 0, True), (6, 0, True), (6, 0, True)]
    (units,) = groups.at("head/kernel", 0)
    gates = [("ih/kernel", 1), ("hh/kernel", 1), ("ih/bias", 0), ("hh/bias", 0)]
    expected = {(f"layers/1/{p}", axis, 6 * i, 1) for p, axis in gates for i in range(4)}
    expected |= {("layers/1/hh/kernel", 0, 0, 1), ("head/kernel", 0, 0, 1)}
    assert places(units) == expected


def test_transformer_decoder():
    fn, params, x = build("transformer_decoder")
    groups = coupling(fn)(params, x)
    feed_forward = [g for g in groups if g.cuttable and g.size == 20]
    assert len(feed_forward) == 2
    assert all("positive diagonal" in g.symmetries for g in feed_forward)  # relu
    heads = [g for g in groups if g.cuttable and g.size == 3]
    assert len(heads) == 4  # self and cross attention of two layers
    assert [(g.size, g.exact) for g in groups if g.cuttable and not g.exact] == [(12, False)]


@pytest.mark.parametrize("name", MODELS)
def test_symmetries_and_a_cut_of_everything(name):
    fn, params, x = build(name)
    checks = verify(coupling(fn)(params, x), params, x, tolerance=1e-3)
    assert checks[-1].what.startswith("masking is removing")


@pytest.mark.parametrize("name", ["decoder_scan", "lstm"])
def test_a_cut_at_another_length(name):
    fn, params, x = build(name)
    rng = np.random.default_rng(0)
    groups = [g for g in coupling(fn)(params, x) if g.cuttable and g.exact]
    kept = combine(*(g.keep(np.sort(rng.permutation(g.size)[: g.size // 2])) for g in groups))
    small, smaller = cut(fn, params, kept, x)
    expected = np.asarray(jax.jit(fn)(masked(params, kept), x[:, :4]))
    found = np.asarray(smaller(small, x[:, :4]))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
