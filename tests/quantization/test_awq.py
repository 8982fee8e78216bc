"""AWQ's scales against a search in NumPy, and against what they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fold_cases import (
    CONFIGS,
    IDS,
    OWN,
    QUICK,
    assert_same_function,
    changed,
    leaf,
    model,
    plain_params,
)
from marks import slow_but

import jaxcompress as jc
from jaxcompress.layerwise.grid import grid_of
from jaxcompress.quantization.awq import awq, best_scale
from jaxcompress.quantization.folds import Consumer, Network

OPTIONS = {"calibration": IDS, "bits": 3, "group_size": 8}


@pytest.mark.parametrize("name", slow_but([*CONFIGS, *OWN], QUICK))
def test_function_stays(name):
    before = model(name)
    after = awq(before, **OPTIONS)
    assert_same_function(before, after)
    if name != "equinox":
        assert changed(before, after)


def test_float64_is_exact():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model("plain").params)
        before = jc.Model(model("plain").apply, params)
        assert_same_function(before, awq(before, **OPTIONS), 1e-12)


def rounded(w, bits=3, group=8):
    """Symmetric round to nearest in NumPy."""
    grouped = w.reshape(len(w), -1, group)
    scale = np.abs(grouped).max(-1, keepdims=True) / ((2**bits - 1) / 2)
    q = np.clip(np.round(grouped / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (q * scale).reshape(w.shape)


def searched(matrices, x, columns, size, bits=3, group=8):
    """The best of all candidates, and its loss, by brute force on the rows x."""

    def by_entry(values):
        return np.array([values[columns == i].mean() for i in range(size)])

    strength = by_entry(np.abs(x).mean(0))
    relative = []
    for w in matrices:
        grouped = np.abs(w).reshape(len(w), -1, group)
        relative.append((grouped / (grouped.max(-1, keepdims=True) + 1e-6)).reshape(w.shape))
    weight = by_entry(np.concatenate(relative).mean(0))
    best = (np.inf, None)
    for kind in (0, 1):
        for ratio in np.linspace(0, 1, 20):
            s = strength**ratio / (weight ** (1 - ratio) if kind else 1)
            s = s / np.sqrt(s.max() * s.min())
            own = s[columns]
            loss = sum(
                np.square(x @ (rounded(w * own, bits, group) / own - w).T).sum() for w in matrices
            )
            if loss < best[0]:
                best = loss, s
    return best


@pytest.mark.parametrize("shared", [False, True])
def test_choice_is_the_brute_force_one(shared):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((64, 16)) * np.exp(rng.standard_normal(16))
    matrices = [rng.standard_normal((n, 16)) for n in (6, 10)]
    columns = np.tile(np.arange(8), 2) if shared else np.arange(16)
    size = columns.max() + 1
    statistics = {
        "second_moment": jnp.asarray(x.T @ x, jnp.float32),
        "sum_abs": jnp.asarray(np.abs(x).sum(0), jnp.float32),
        "count": jnp.float32(len(x)),
    }
    consumers = [
        Consumer(jnp.asarray(w, jnp.float32), statistics, jnp.asarray(columns)) for w in matrices
    ]
    found = best_scale(consumers, size, grid=grid_of("int", bits=3, group_size=8))
    _, expected = searched(matrices, x, columns, size)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_scales_of_a_whole_model_lower_the_error_that_numpy_sees():
    """The matrices behind one norm, of the model before and after, on the rows they read."""
    before = model("plain")
    after = awq(before, **OPTIONS, weigh_outputs=False)
    rows = {}
    for given in (before, after):
        params = jax.tree.map(np.asarray, given.params)
        x = params["table"][IDS].reshape(-1, 16)
        rows[id(given)] = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def error(given):
        w = jax.tree.map(np.asarray, given.params)["layers"][0]
        y = rows[id(given)] * w["g1"]
        of = [w[name].reshape(16, -1).T for name in "qkv"]
        return sum(np.square(y @ (rounded(m) - m).T).sum() for m in of)

    assert error(after) < error(before)


def folds(name):
    network = Network.of(model(name), [IDS])
    found, left = network.folds(network.targets)
    return {frozenset(fold.columns): fold for fold in found}, left


def test_what_is_found_in_a_llama_with_grouped_queries():
    found, left = folds("decoder")
    at = "layers/1/{}_proj/kernel".format
    named = lambda *names: frozenset(map(at, names))  # noqa: E731
    assert left == []
    assert named("attn/q", "attn/k", "attn/v") in found
    assert named("mlp/gate", "mlp/up") in found
    assert found[named("mlp/down")].sizes == (64,)
    output = found[named("attn/o")]
    assert output.sizes == (2, 8)  # (key and value head, channel): two query heads share them
    columns = np.arange(32).reshape(2, 2, 8)
    expected = np.where(columns >= 0, np.arange(16).reshape(2, 1, 8), 0)
    np.testing.assert_array_equal(output.columns[at("attn/o")], expected.reshape(-1))


def test_stacked_layers_get_scales_of_their_own():
    found, left = folds("decoder_scan")
    assert left == []
    assert {fold.diagonal.steps for fold in found.values()} == {2}


@pytest.mark.parametrize("name", ["decoder", "plain"])
def test_stacked_and_unrolled_agree(name):
    """The same weights, layers in a list and stacked: the same scales."""
    if name == "plain":
        one, other = model("plain"), model("plain_scan")
        paths = [("layers/1/up", "layers/up"), ("layers/1/o", "layers/o")]
    else:
        other = model("decoder_scan")
        blocks = other.blocks.of(other.params)
        params = {**other.params, "layers": {str(i): b for i, b in enumerate(blocks)}}
        one = model("decoder").replace(params=params)
        paths = [
            (f"layers/1/{n}_proj/kernel", f"layers/{n}_proj/kernel") for n in ("mlp/up", "attn/o")
        ]
    a, b = awq(one, **OPTIONS), awq(other, **OPTIONS)
    for path, stacked in paths:
        np.testing.assert_allclose(leaf(a, path), leaf(b, stacked)[1], rtol=2e-3, atol=1e-5)


def test_gpt2_notes_what_has_no_fold():
    after = awq(model("gpt2"), **OPTIONS)
    (note,) = after.notes
    assert "layers/0/mlp/c_proj/kernel" in note  # behind a GELU
    assert "attn" not in note


def test_group_size_that_does_not_divide_is_noted():
    after = awq(jc.Model(model("plain").apply, plain_params()), calibration=IDS, group_size=32)
    assert any("does not divide" in note for note in after.notes)


def test_transformers_loads_it(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = tiny.write_llama(tmp_path / "in", layers=2, tie_word_embeddings=True)
    before = jc.load(source)
    after = awq(before, calibration=IDS, group_size=32)
    jc.save(after, tmp_path / "out", "dense", verify_memory=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = np.asarray(before(IDS))
    with torch.no_grad():
        found = theirs(torch.tensor(IDS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
