"""Models of other people, quantized: Flax Linen, NNX, Equinox. Nothing of ours stands in them.

Which axes of their parameters are contracted is written down here by hand.
"""

import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_own_models import equinox_network, run_network

import jaxcompress as jc
from jaxcompress.core.arrays.inputs import QuantizedInput
from jaxcompress.core.method import Chain, Link, Method
from jaxcompress.core.model import of_arrays
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.methods import METHODS
from jaxcompress.quantization.qat import convert, prepare_qat

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD, HIDDEN, LAYERS = 40, 24, 4, 2, 6, 48, 2
IDS = np.random.default_rng(0).integers(0, VOCAB, (8, 16)).astype(np.int32)

# ------------------------------------------------------------------ Linen: as Llama


def rotary(x):
    angles = jnp.arange(x.shape[1])[:, None] / 100 ** (jnp.arange(HEAD // 2) / (HEAD // 2))
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q = rotary(nn.DenseGeneral((HEADS, HEAD), use_bias=False, name="query")(x))
        k = rotary(nn.DenseGeneral((KV_HEADS, HEAD), use_bias=False, name="key")(x))
        v = nn.DenseGeneral((KV_HEADS, HEAD), use_bias=False, name="value")(x)
        k, v = (jnp.repeat(y, HEADS // KV_HEADS, axis=2) for y in (k, v))
        y = nn.dot_product_attention(q, k, v, mask=nn.make_causal_mask(x[..., 0]))
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False, name="out")(y)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + LinenAttention(name="attention")(nn.RMSNorm()(x))
        y = nn.RMSNorm()(x)
        gate = nn.Dense(HIDDEN, use_bias=False, name="gate")(y)
        up = nn.Dense(HIDDEN, use_bias=False, name="up")(y)
        return x + nn.Dense(WIDTH, use_bias=False, name="down")(nn.silu(gate) * up), None


class LinenDecoder(nn.Module):
    scan: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(ids)
        if self.scan:
            split = {"params": True}
            stack = nn.scan(LinenBlock, {"params": 0}, split_rngs=split, length=LAYERS)
            x, _ = stack(name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = LinenBlock(name=f"layers_{i}")(x)
        return nn.Dense(VOCAB, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


def linen(scan=False):
    decoder = LinenDecoder(scan)
    return jc.Model(decoder.apply, decoder.init(jax.random.key(0), IDS))


# ------------------------------------------------------------------ NNX: as GPT-2


def nnx_decoder():
    try:
        from flax import nnx
    except Exception as error:  # Flax and JAX break each other in several ways
        pytest.skip(f"flax.nnx does not import under this JAX: {error}")

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
            self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
            self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
            self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x):
            y = self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
            x = x + self.dropout(y)
            return x + self.dropout(self.down(nnx.relu(self.up(self.norm2(x)))))

    class Decoder(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
            self.positions = nnx.Embed(32, WIDTH, rngs=rngs)
            self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids) + self.positions(jnp.arange(ids.shape[1]))
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x))

    decoder = Decoder(nnx.Rngs(0))
    decoder.eval()
    return jc.from_nnx(decoder)


def equinox():
    pytest.importorskip("equinox")
    return jc.Model(run_network, equinox_network())


# ------------------------------------------------------------------ what is known of them


@dataclass(frozen=True)
class User:
    """A model with what its owner knows: which leaves are matrices, and their contracted axes."""

    make: Any
    include: Any  # None: every `kernel`
    contracted: dict[str, tuple[int, ...]]  # by the end of a path, after a leading axis of layers
    matrices: int
    stacked: bool = False

    def rows(self, path, leaf):
        """`[N, K]`, or of stacked layers `[layers * N, K]`, float64."""
        axes = next(axes for end, axes in self.contracted.items() if path.endswith(end))
        values = np.asarray(jc.dense(leaf), np.float64)
        first = int(self.stacked and "layers/" in path)
        moved = np.moveaxis(values, [a + first for a in axes], range(-len(axes), 0))
        return moved.reshape(-1, np.prod(moved.shape[-len(axes) :]))


KERNELS = {"out/kernel": (0, 1), "kernel": (0,)}
USERS = {
    "linen": User(linen, None, KERNELS, 7 * LAYERS + 1),
    "linen_scan": User(functools.partial(linen, True), None, KERNELS, 7 + 1, stacked=True),
    "nnx": User(nnx_decoder, None, KERNELS, 6 * LAYERS + 1),
    "equinox": User(
        equinox, ["blocks/*/**/*proj/weight", "**/layers/*/weight", "out/weight"],
        {"weight": (1,)}, 6 * LAYERS + 1,
    ),
}  # fmt: skip


@functools.cache
def given(name):
    return USERS[name].make()


def compressed(name, method, **options):
    options = {"calibration": IDS, "include": USERS[name].include, **options}
    return jc.compress(given(name), method, **options)


def quantized_leaves(model):
    return {p: leaf for p, leaf in leaves_with_paths(model.params) if jc.is_compressed(leaf)}


def outputs(model):
    arrays, _ = of_arrays(model)  # Equinox keeps its activation functions among them
    return np.asarray(jax.jit(jc.lift(arrays.apply))(arrays.params, IDS))


@functools.cache
def dense_outputs(name):
    return outputs(given(name))


def lost(name, small):
    """Squared error of the logits on the calibration data."""
    return np.square((outputs(small) - dense_outputs(name)).astype(np.float64)).sum()


@functools.cache
def lost_by_rtn(name):
    return lost(name, rounded(name))


def assert_on_grid(name, small, bits):
    """Every row lies on a uniform grid of so many bits."""
    found = quantized_leaves(small)
    assert len(found) == USERS[name].matrices
    for path, leaf in found.items():
        for row in USERS[name].rows(path, leaf):
            values = np.unique(row)
            assert len(values) <= 2**bits
            steps = np.abs(row).max() / np.arange(1, 2 ** (bits - 1) + 1)  # of which one is it
            off = np.abs(values[:, None] / steps - np.rint(values[:, None] / steps))
            assert off.max(0).min() < 1e-4, path


W3 = {"bits": 3, "group_size": -1}


@functools.cache
def rounded(name):
    return compressed(name, "rtn", **W3)


FAST = {("linen", "gptq"), ("equinox", "awq"), ("nnx", "smoothquant"), ("equinox", "quarot"),
        ("linen_scan", "spinquant"), ("linen", "qat")}  # fmt: skip


def cases(methods):
    return [
        pytest.param(n, m, marks=() if (n, m) in FAST else pytest.mark.slow)
        for n in USERS
        for m in methods
    ]


@pytest.mark.parametrize("name", USERS)
def test_rtn(name):
    assert_on_grid(name, rounded(name), 3)
    before = dict(leaves_with_paths(given(name).params))
    for path, leaf in quantized_leaves(rounded(name)).items():
        weight = USERS[name].rows(path, before[path])
        step = np.abs(weight).max(1, keepdims=True) / 3.5
        expected = np.clip(np.rint(weight / step), -4, 3) * step
        found = USERS[name].rows(path, leaf)
        assert np.mean(np.abs(found - expected) < 1e-4) > 0.99  # but ties


@pytest.mark.parametrize(("name", "method"), cases(["gptq"]))
def test_gptq(name, method):
    small = compressed(name, method, **W3)
    assert_on_grid(name, small, 3)
    assert lost(name, small) < lost_by_rtn(name)


@pytest.fixture
def folds(monkeypatch):
    """Models as they are between a fold and its rounding."""
    seen = []

    def look(model):
        seen.append(model)
        return model

    for name in ("awq", "smoothquant", "quarot", "spinquant"):
        fold, *others = METHODS[name].links
        chain = Chain.of(fold, Link("look", Method(look, produces="model")), *others)
        monkeypatch.setitem(METHODS, name, chain)
    return seen


def assert_folded(name, folded, share=0.5):
    """It is dense, computes the same, and so many of its matrices have other weights."""
    expected = dense_outputs(name)
    assert not quantized_leaves(folded)
    np.testing.assert_allclose(outputs(folded), expected, atol=1e-4 * np.abs(expected).max())
    before = dict(leaves_with_paths(given(name).params))
    after = dict(leaves_with_paths(folded.params))
    moved = [p for p in quantized_leaves(rounded(name)) if not np.allclose(after[p], before[p])]
    assert len(moved) >= share * USERS[name].matrices


@pytest.mark.parametrize(("name", "method"), cases(["awq"]))
def test_awq(name, method, folds):
    small = compressed(name, method, **W3)
    assert_folded(name, folds[0])
    assert_on_grid(name, small, 3)
    assert lost(name, small) < lost_by_rtn(name)


@pytest.mark.parametrize(("name", "method"), cases(["quarot", "spinquant"]))
def test_rotations(name, method, folds):
    own = {"steps": 3} if method == "spinquant" else {}
    small = compressed(name, method, **W3, **own)
    assert_folded(name, folds[0], share=1)
    assert_on_grid(name, small, 3)


@pytest.mark.parametrize(("name", "method"), cases(["smoothquant"]))
def test_smoothquant(name, method, folds):
    small = compressed(name, method)
    assert_folded(name, folds[0])
    assert_on_grid(name, small, 8)
    for leaf in quantized_leaves(small).values():
        assert isinstance(leaf, QuantizedInput)
        assert leaf.input_dtype == "int8"
    dense = dense_outputs(name)
    assert 0 < lost(name, small) < 0.03**2 * np.square(dense - dense.mean()).sum()


# ------------------------------------------------------------------ training


def next_token_loss(logits, ids):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()


def trained(model, steps):
    """The user's own loop; and the loss at each step."""
    apply = jc.lift(model.apply)
    trainable, frozen = jc.split(model.params)
    optimizer = optax.adam(3e-3)
    state = optimizer.init(trainable)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            return next_token_loss(apply(jc.merge(trainable, frozen), IDS), IDS)

        value, slope = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(trainable, updates), state, value

    losses = []
    for _ in range(steps):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    return model.replace(params=jc.merge(trainable, frozen)), losses


@pytest.mark.parametrize(("name", "method"), cases(["qat"]))
def test_quantization_aware_training(name, method):
    ready = prepare_qat(rounded(name), given(name))
    np.testing.assert_array_equal(outputs(ready), outputs(rounded(name)))
    model, losses = trained(ready, 8)
    assert losses[-1] < losses[0] - 0.05
    small = convert(model)
    np.testing.assert_array_equal(outputs(small), outputs(model))
    assert_on_grid(name, small, 3)
    assert next_token_loss(outputs(small), IDS) < losses[0] - 0.05
    kinds = [jax.tree.structure(m.params) for m in (small, rounded(name))]
    assert kinds[0] == kinds[1]
