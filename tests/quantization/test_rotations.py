"""Rotations leave the function as it is, and what they are for: no outliers, lower loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fold_cases import CONFIGS, IDS, OWN, QUICK, assert_same_function, changed, leaf, model
from marks import slow_but

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.quantization.quarot import quarot
from jaxcompress.quantization.rotations import randomized_hadamard
from jaxcompress.quantization.spinquant import orthogonal, spinquant, turned

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("size", [1, 2, 16, 12, 24, 44, 448])
def test_hadamard_entries_have_one_size(size):
    h = randomized_hadamard(size, RNG)
    np.testing.assert_allclose(h @ h.T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(np.abs(h), size**-0.5, atol=1e-12)


@pytest.mark.parametrize("size", [3, 15, 31, 26])
def test_other_sizes_are_orthogonal(size):
    h = randomized_hadamard(size, RNG)
    np.testing.assert_allclose(h @ h.T, np.eye(size), atol=1e-12)


@pytest.mark.parametrize("name", slow_but([*CONFIGS, *OWN], QUICK))
def test_quarot_leaves_the_function(name):
    before = model(name)
    after = quarot(before, calibration=IDS)
    assert_same_function(before, after)
    if name != "equinox":
        assert len(changed(before, after)) >= (2 if name == "nnx" else 6)


def test_float64_is_exact():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model("plain").params)
        before = jc.Model(model("plain").apply, params)
        after = quarot(before, calibration=IDS)
        assert_same_function(before, after, 1e-12)


def test_gains_go_into_what_is_behind_them():
    """By hand: columns of up times the gain, turned by the T that turned the table."""
    before = model("plain")
    after = quarot(before, calibration=IDS)
    table, turned_table = leaf(before, "table"), leaf(after, "table")
    rotation = np.linalg.lstsq(table.astype(np.float64), turned_table, rcond=None)[0].T
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(16), atol=1e-5)
    np.testing.assert_allclose(np.abs(rotation), 0.25, atol=1e-5)
    up = leaf(before, "layers/1/up") * leaf(before, "layers/1/g2")
    np.testing.assert_allclose(leaf(after, "layers/1/up"), up @ rotation.T, atol=1e-5)
    np.testing.assert_allclose(leaf(after, "layers/1/g1"), 1, atol=1e-6)


def test_outliers_go():
    before = model("decoder")
    kernel = np.asarray(before.params["layers"]["0"]["attn"]["q_proj"]["kernel"]).copy()
    kernel[5] *= 50
    before.params["layers"]["0"]["attn"]["q_proj"]["kernel"] = jnp.asarray(kernel)
    after = quarot(before)
    path = "layers/0/attn/q_proj/kernel"
    peak = lambda w: (np.abs(w).max(0) / np.sqrt((w**2).mean(0))).mean()  # noqa: E731
    assert peak(leaf(after, path)) < 0.7 * peak(leaf(before, path))


def test_tied_output_layer_is_untied_and_told():
    after = quarot(model("decoder_tied"))
    assert after.config.tie_word_embeddings is False
    assert any("weights of its own" in note for note in after.notes)


def test_own_model_needs_inputs():
    with pytest.raises(InputError, match="calibration"):
        quarot(model("plain"))


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_a_rotated_llama(tmp_path, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = tiny.write_llama(tmp_path / "in", layers=2, tie_word_embeddings=tied)
    before = jc.load(source)
    jc.save(quarot(before), tmp_path / "out", "dense", verify_memory=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = np.asarray(before(IDS))
    with torch.no_grad():
        found = theirs(torch.tensor(IDS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


# ---------------------------------------------------------------------------- SpinQuant


def test_cayley_turns_downhill_by_the_angle():
    rotation = np.linalg.qr(RNG.standard_normal((6, 6)))[0]
    target = np.linalg.qr(RNG.standard_normal((6, 6)))[0]
    loss = lambda r: jnp.square(r - target).sum()  # noqa: E731
    new = turned(jnp.asarray(rotation), jax.grad(loss)(jnp.asarray(rotation)), 0.05)
    np.testing.assert_allclose(new @ new.T, np.eye(6), atol=1e-5)
    assert loss(new) < loss(rotation)
    angles = np.abs(np.angle(np.linalg.eigvals(np.asarray(new, np.float64) @ rotation.T)))
    assert 0.02 < angles.max() <= 0.05 + 1e-4


def test_nearest_orthogonal():
    q = np.linalg.qr(RNG.standard_normal((5, 5)))[0]
    np.testing.assert_allclose(orthogonal(3 * q), q, atol=1e-12)


@pytest.mark.parametrize("name", slow_but(["decoder", "decoder_scan", "gpt2", "plain"], QUICK))
def test_spinquant_leaves_the_function_and_lowers_the_rounded_loss(name):
    before = model(name)
    options = {"bits": 3, "group_size": -1, "random_seed": 3}
    still = spinquant(before, calibration=IDS, steps=0, **options)
    learned = spinquant(before, calibration=IDS, steps=12, **options)
    assert_same_function(before, still)
    assert_same_function(before, learned, 2e-4)
    assert name != "decoder" or changed(still, learned)
    include = "layers/**" if name == "plain" else None
    before, after = (next_token_loss(m, include) for m in (still, learned))
    assert after < before if name == "decoder" else after <= before + 1e-6


def next_token_loss(given, include):
    """With the targets rounded to nearest at 3 bits, as `rtn` does."""
    small = jc.compress(
        given,
        "rtn",
        bits=3,
        group_size=-1,
        include=include and [f"layers/*/{n}" for n in ("up", "down", "q", "k", "v", "o")],
        axes=jc.contractions(given.apply)(given.params, IDS),
    )
    logits = np.asarray(small(IDS), np.float64)[:, :-1]
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logp = logp - logits.max(-1, keepdims=True)
    return -np.take_along_axis(logp, IDS[:, 1:, None], -1).mean()


def test_spinquant_checks_its_options():
    with pytest.raises(InputError, match="steps"):
        spinquant(model("decoder"), calibration=IDS, steps=-1)
