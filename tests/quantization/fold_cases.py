"""Models whose folds the tests try: references, and other people's, with uneven channels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.models import build_model
from jaxcompress.models.decoder_config import DecoderConfig
from jaxcompress.models.gpt2 import GPT2Config

IDS = np.random.default_rng(0).integers(0, 40, (6, 12)).astype(np.int32)
DECODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "decoder": DecoderConfig(**DECODER),
    "decoder_scan": DecoderConfig(**DECODER, scan_layers=True),
    "decoder_tied": DecoderConfig(**DECODER, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4),
}


def uneven(params, seed=0):
    """Gains far from 1, biases far from 0, some output channels much larger than others."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        values = np.asarray(leaf, np.float32)
        if path.endswith(("scale", "gain")):
            values = values * np.exp(rng.standard_normal(values.shape))
        elif values.ndim == 1 or path.endswith("bias"):
            values = values + 0.3 * rng.standard_normal(values.shape)
        else:
            values = values * np.exp(0.5 * rng.standard_normal(values.shape[-1]))
        return jnp.asarray(values, jnp.float32)

    return map_with_paths(one, params)


def reference(name):
    model = build_model(CONFIGS[name])
    return model.replace(params=uneven(model.params))


def drawn(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)


def plain_params(layers=2, width=16, hidden=32, vocab=40):
    rng = np.random.default_rng(1)
    block = lambda: {  # noqa: E731
        "g1": jnp.asarray(np.exp(rng.standard_normal(width)), jnp.float32),
        "q": drawn(rng, width, 2, 8),
        "k": drawn(rng, width, 2, 8),
        "v": drawn(rng, width, 2, 8),
        "o": jnp.asarray(rng.standard_normal((2, 8, width)) / 4, jnp.float32),
        "g2": jnp.asarray(np.exp(rng.standard_normal(width)), jnp.float32),
        "up": drawn(rng, hidden, width),  # [out, in]
        "bias": drawn(rng, hidden),
        "down": drawn(rng, hidden, width),
    }
    return {
        "table": drawn(rng, vocab, width) * 4,
        "layers": [block() for _ in range(layers)],
        "gain": jnp.asarray(np.exp(rng.standard_normal(width)), jnp.float32),
        "unembed": drawn(rng, width, vocab),
    }


def normed(x, gain):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain


def plain_block(w, x):
    y = normed(x, w["g1"])
    q, k, v = (jnp.einsum("btd,dhk->bhtk", y, w[name]) for name in "qkv")
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k) / np.sqrt(8)
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    x = x + jnp.einsum("bhts,bhsk,hkd->btd", weights, v, w["o"])
    hidden = jax.nn.relu(normed(x, w["g2"]) @ w["up"].T + w["bias"])
    return x + hidden @ w["down"]


def plain(params, ids):
    """Somebody's transformer in plain JAX: layers in a list."""
    x = params["table"][ids]
    for w in params["layers"]:
        x = plain_block(w, x)
    return normed(x, params["gain"]) @ params["unembed"]


def plain_scan(params, ids):
    """The same with stacked layers."""
    x, _ = jax.lax.scan(
        lambda x, w: (plain_block(w, x), None), params["table"][ids], params["layers"]
    )
    return normed(x, params["gain"]) @ params["unembed"]


def equinox_model():
    eqx = __import__("pytest").importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 5)

    class Net(eqx.Module):
        table: eqx.nn.Embedding
        norm: eqx.nn.LayerNorm
        up: eqx.nn.Linear
        down: eqx.nn.Linear
        head: eqx.nn.Linear

        def __init__(self):
            self.table = eqx.nn.Embedding(40, 16, key=keys[0])
            self.norm = eqx.nn.LayerNorm(16)
            self.up = eqx.nn.Linear(16, 32, key=keys[1])
            self.down = eqx.nn.Linear(32, 16, key=keys[2])
            self.head = eqx.nn.Linear(16, 40, use_bias=False, key=keys[3])

        def __call__(self, ids):
            x = jax.vmap(self.table)(ids)
            x = x + jax.vmap(lambda t: self.down(jax.nn.relu(self.up(self.norm(t)))))(x)
            return jax.vmap(self.head)(x)

    return jc.Model(lambda net, ids: jax.vmap(net)(ids), Net())


def nnx_model():
    nnx = __import__("pytest").importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(40, 16, rngs=rngs)
            self.norm = nnx.RMSNorm(16, rngs=rngs)
            self.up = nnx.Linear(16, 32, rngs=rngs)
            self.down = nnx.Linear(32, 16, rngs=rngs)
            self.head = nnx.Linear(16, 40, use_bias=False, rngs=rngs)

        def __call__(self, ids):
            x = self.table(ids)
            x = x + self.down(nnx.relu(self.up(self.norm(x))))
            return self.head(x)

    return jc.from_nnx(Net(nnx.Rngs(0)))


def own(name):
    if name == "equinox":
        return equinox_model()
    if name == "nnx":
        return nnx_model()
    params = plain_params()
    if name == "plain":
        return jc.Model(plain, params)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])
    return jc.Model(plain_scan, {**params, "layers": stacked})


OWN = ("plain", "plain_scan", "equinox", "nnx")
QUICK = ("decoder_scan", "gpt2", "equinox")  # the others wait for the night


def model(name):
    return own(name) if name in OWN else reference(name)


def leaf(given, path):
    return np.asarray(dict(leaves_with_paths(given.params))[path])


def changed(before, after):
    """Paths of the parameters that differ, of two models of equal structure."""
    old = dict(leaves_with_paths(before.params))
    return {
        path
        for path, new in leaves_with_paths(after.params)
        if hasattr(new, "shape") and path in old and not np.allclose(new, old[path])
    }


def assert_same_function(before, after, tolerance=1e-4):
    expected, found = np.asarray(before(IDS)), np.asarray(after(IDS))
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
