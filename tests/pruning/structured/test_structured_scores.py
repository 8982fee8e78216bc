"""Scores of groups against NumPy, finite differences and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import structured_cases as cases

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.readers.capture import capture
from jaxcompress.core.readers.coupling import coupling
from jaxcompress.pruning.structured.data import Seen, data_of
from jaxcompress.pruning.structured.importance import NAMES, importance
from jaxcompress.pruning.structured.roles import of_kind, roles


def scored(model, calibration, kind, score, reduce="sum", residual=None):
    """Scores of the first group of a kind."""
    data = data_of(model, calibration)
    groups = coupling(model.apply)(model.params, *data.first)
    chosen = [r.group for r in of_kind(roles(groups), kind, residual=residual)]
    return importance(Seen.of(model, data), groups, chosen, score, reduce)


def two_layers():
    """relu(x a + c) b, its neurons and what they read."""
    params = cases.drawn({"a": (5, 8), "c": (8,), "b": (8, 3)}, seed=2)
    model = Model(lambda p, x: jax.nn.relu(x @ p["a"] + p["c"]) @ p["b"], params)
    x = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    arrays = {name: np.asarray(value, np.float64) for name, value in params.items()}
    return model, x, arrays, np.maximum(x @ arrays["a"] + arrays["c"], 0)


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("sum", lambda w: np.abs(w).sum(0)),
        ("mean", lambda w: np.abs(w).mean(0)),
        ("max", lambda w: np.abs(w).max(0)),
        ("l2", lambda w: np.sqrt((w * w).sum(0))),
    ],
)
def test_magnitude_over_all_weights_of_an_index(reduce, expected):
    model, x, arrays, _ = two_layers()
    (found,) = scored(model, x, "neurons", "magnitude", reduce)
    weights = np.concatenate([arrays["a"], arrays["b"].T])  # [weights of an index, index]
    np.testing.assert_allclose(found, expected(weights), rtol=1e-5)


def test_wanda_and_channel_scores():
    model, x, arrays, hidden = two_layers()
    (found,) = scored(model, x, "neurons", "wanda")
    norm_x, norm_h = (np.sqrt((v * v).sum(0)) for v in (x.astype(np.float64), hidden))
    expected = (np.abs(arrays["a"]) * norm_x[:, None]).sum(0)
    expected = expected + (np.abs(arrays["b"]) * norm_h[:, None]).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    (found,) = scored(model, x, "neurons", "activation")
    np.testing.assert_allclose(found, hidden.mean(0), rtol=1e-5)
    (found,) = scored(model, x, "neurons", "activation_l2")
    np.testing.assert_allclose(found, norm_h, rtol=1e-5)
    (found,) = scored(model, x, "neurons", "apoz")
    np.testing.assert_allclose(found, (hidden > 0).mean(0), rtol=1e-6)


def test_channels_of_a_convolution():
    """Mean |activation| of a filter, over the places that the next convolution reads."""
    model = cases.reference("resnet_b")
    images = cases.inputs_of(model)
    (first, *_) = scored(model, images, "filters", "activation_l2", residual=False)
    captured = {}

    def forward(v, x):
        block = {k: v["params"]["layer1"]["0"][k] for k in ("conv1", "bn1")}
        stats = v["batch_stats"]["layer1"]["0"]["bn1"]

        def conv(x, kernel):
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        def norm(x, p, s):
            return (x - s["mean"]) / jnp.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

        stem = conv(x, v["params"]["conv1"]["kernel"])
        y = jax.nn.relu(norm(stem, v["params"]["bn1"], v["batch_stats"]["bn1"]))
        captured["y"] = jax.nn.relu(norm(conv(y, block["conv1"]["kernel"]), block["bn1"], stats))

    forward(model.params, images)
    y = np.pad(np.asarray(captured["y"], np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    # Each of the nine places of the window reads its own part of the picture.
    expected = sum(
        np.sqrt((y[:, i : i + 8, j : j + 8] ** 2).sum((0, 1, 2)))
        for i in range(3)
        for j in range(3)
    )
    np.testing.assert_allclose(first, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama_scan"])
def test_gate_is_the_derivative_of_the_loss_by_a_gate(name):
    """Against central differences, sequence by sequence, of heads that share a key head."""
    model = cases.reference(name)
    ids = cases.inputs_of(model, samples=3)
    found = scored(model, ids, "heads", "gate")
    found = found[0][0] if name == "llama_scan" else found[0]
    first, *rest = model.blocks.of(model.params)
    kernel = first["attn"]["o_proj"]["kernel"]

    @jax.jit
    def losses(gate):
        """Mean loss of each sequence, the rows of one kv group of layer 0 scaled."""
        scaled = {"kernel": kernel * jnp.repeat(gate, 12)[:, None]}
        block = {**first, "attn": {**first["attn"], "o_proj": scaled}}
        params = model.blocks.put(model.params, [block, *rest])
        logits = jax.nn.log_softmax(model.apply(params, ids[:, :-1]))
        return -jnp.take_along_axis(logits, jnp.asarray(ids)[:, 1:, None], axis=-1).mean((1, 2))

    step = 0.02
    for head in range(2):
        move = jnp.zeros(2).at[head].set(step)
        slopes = np.asarray(losses(1 + move) - losses(1 - move)) / (2 * step)
        np.testing.assert_allclose(found[head], np.abs(slopes).mean(), rtol=2e-2)


def test_entropy_against_numpy():
    """Two heads of known queries and keys; the more spread one goes first."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5, 4)).astype(np.float32)
    params = cases.drawn({"q": (4, 6), "k": (4, 6), "v": (4, 6), "o": (6, 4)}, seed=1)
    params["q"] = params["q"].at[:, 3:].multiply(8.0)  # the second head is sharp

    def attend(p, x):
        q, k, v = ((x @ p[name]).reshape(*x.shape[:2], 2, 3) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), -1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1) @ p["o"]

    model = Model(attend, params)
    (found,) = scored(model, x, "heads", "entropy_reversed")
    q, k = (
        (x.astype(np.float64) @ np.asarray(params[n], np.float64)).reshape(3, 5, 2, 3) for n in "qk"
    )
    scores = np.einsum("bqhd,bkhd->bhqk", q, k)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(found, -(p * np.log(p)).sum(-1).mean((0, 2)), rtol=1e-5)
    (spread_first,) = scored(model, x, "heads", "entropy")
    np.testing.assert_allclose(spread_first, -found)
    assert spread_first[0] < spread_first[1]


@pytest.mark.parametrize("name", ["llama", "llama_scan", "gpt2", "decoder"])
def test_entropy_is_found_in_every_attention(name):
    """Against the attention weights that the models tag by name."""
    model = cases.reference(name)
    ids = cases.inputs_of(model)
    found = scored(model, ids, "heads", "entropy_reversed")

    def entropy(x, weight):  # rows are (batch, heads, seq)
        return -jax.scipy.special.xlogy(x, x).sum(-1)

    tagged = capture(model.apply, entropy, names=["attention_weights"])(model.params, ids)
    rows = [v["entropy"] for (path, _), v in tagged.items() if path == "attention_weights"]
    heads = 6 if name.startswith("llama") else 4
    expected = [np.asarray(r).reshape(*r.shape[:-1], 4, heads, 7).mean((-3, -1)) for r in rows]
    if name.startswith("llama"):  # three query heads share a key head
        expected = [e.reshape(*e.shape[:-1], 2, 3).mean(-1) for e in expected]
    assert len(found) == len(expected)
    for got in found:  # in the decoder cross attention has the first name, and comes second
        assert min(np.abs(got - want).max() for want in expected) < 1e-5


def test_random_is_a_function_of_the_seed():
    model, x, _, _ = two_layers()
    data = data_of(model, x)
    groups = coupling(model.apply)(model.params, *data.first)
    chosen = [r.group for r in of_kind(roles(groups), "neurons")]
    seen = Seen.of(model, data)
    a, b, c = (importance(seen, groups, chosen, "random", seed=s)[0] for s in (0, 0, 1))
    assert (a == b).all()
    assert (a != c).any()


def test_refusals():
    model, x, _, _ = two_layers()
    with pytest.raises(InputError, match="score 'magnitud': unknown"):
        scored(model, x, "neurons", "magnitud")
    with pytest.raises(InputError, match="no attention probabilities"):
        scored(model, x, "neurons", "entropy")
    with pytest.raises(InputError, match="pass calibration="):
        scored(model, None, "neurons", "magnitude")
    llama = cases.reference("llama")
    for score in ("wanda", "taylor", "activation", "gate", "entropy"):
        with pytest.raises(InputError, match="needs calibration data"):
            scored(llama, None, "heads", score)
    assert {"magnitude", "taylor", "fisher", "wanda", "apoz", "entropy", "gate"} <= set(NAMES)
