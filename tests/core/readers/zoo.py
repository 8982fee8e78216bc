"""Small networks for the tests of `coupling` and `cut`: plain jnp, Linen, and odd functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def draw(shapes: Any, seed: int = 0) -> Any:
    """Random parameters for a tree of shapes, scaled by their fan-in."""
    rng = np.random.default_rng(seed)

    def one(shape: tuple[int, ...]) -> Any:
        fan = shape[-2] if len(shape) > 1 else 1
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan), jnp.float32)

    return jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, tuple))


def normal(*shape: int, seed: int = 1) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def layer_norm(x, p):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5) * p["g"] + p["b"]


def rms_norm(x, gain):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain


# ---------------------------------------------------------------------------- dense


def mlp(p, x):
    h = x @ p["inp"]["w"] + p["inp"]["b"]
    for block in p["blocks"]:
        up = layer_norm(h, block["ln"]) @ block["up"]["w"] + block["up"]["b"]
        h = h + jax.nn.gelu(up) @ block["down"]["w"] + block["down"]["b"]
    return h @ p["out"]["w"] + p["out"]["b"]


def mlp_shapes(inputs=5, width=12, hidden=20, outputs=3, layers=2):
    def dense(i, o):
        return {"w": (i, o), "b": (o,)}

    block = {
        "ln": {"g": (width,), "b": (width,)},
        "up": dense(width, hidden),
        "down": dense(hidden, width),
    }
    return {
        "inp": dense(inputs, width),
        "out": dense(width, outputs),
        "blocks": [block] * layers,
    }


def fused_glu(p, x):
    gate, up = jnp.split(x @ p["gate_up"] + p["b"], 2, -1)
    return (jax.nn.silu(gate) * up) @ p["down"]


FUSED_GLU = {"gate_up": (5, 16), "b": (16,), "down": (8, 3)}


def soft_hidden(p, x):
    return jax.nn.softmax(x @ p["a"], -1) @ p["b"]


def flattened(p, x):
    """An axis met whole before it is split into (heads, features)."""
    h = jax.nn.relu(x @ p["a"] + p["ab"])
    z = jnp.einsum("bhi,hio->bho", h.reshape(x.shape[0], 3, 4), p["e"])
    return z.reshape(x.shape[0], -1) @ p["b"] + h @ p["c"]


FLATTENED = {"a": (5, 12), "ab": (12,), "e": (3, 4, 6), "b": (18, 3), "c": (12, 3)}


# ---------------------------------------------------------------------------- attention


def rope_split(x, head_dim):
    """Rotary embedding over halves, by `split`."""
    half = head_dim // 2
    angle = jnp.arange(x.shape[1])[:, None] * (1 / 10000 ** (jnp.arange(half) / half))
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def rope_rotate_half(x, head_dim):
    """Rotary embedding as in transformers: slices, and tables over the whole head."""
    frequency = 1 / 10000 ** (jnp.arange(0, head_dim, 2) / head_dim)
    angle = jnp.outer(jnp.arange(x.shape[1]), frequency)
    angle = jnp.concatenate([angle, angle], -1)
    rotated = jnp.concatenate([-x[..., head_dim // 2 :], x[..., : head_dim // 2]], -1)
    return x * jnp.cos(angle)[None, :, None] + rotated * jnp.sin(angle)[None, :, None]


def rope_interleaved(x, head_dim):
    """Rotary embedding over neighbouring pairs, as in GPT-J."""
    frequency = 1 / 10000 ** (jnp.arange(0, head_dim, 2) / head_dim)
    angle = jnp.outer(jnp.arange(x.shape[1]), frequency)
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def llama_block(w, x, head_dim, rope):
    batch, length, _ = x.shape
    h = rms_norm(x, w["n1"])
    q, k, v = ((h @ w[name]).reshape(batch, length, -1, head_dim) for name in "qkv")
    if "qn" in w:
        q, k = rms_norm(q, w["qn"]), rms_norm(k, w["kn"])
    q, k = rope(q, head_dim), rope(k, head_dim)
    repeats = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(head_dim)
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1), v)
    x = x + mixed.reshape(batch, length, -1) @ w["o"]
    h = rms_norm(x, w["n2"])
    return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]


def llama(p, ids, head_dim=8, rope=rope_split):
    """Layers in a list are unrolled, stacked ones scanned with remat."""
    x = p["emb"][ids]
    if isinstance(p["layers"], dict):
        block = jax.checkpoint(lambda x, w: llama_block(w, x, head_dim, rope))
        x, _ = lax.scan(lambda x, w: (block(x, w), None), x, p["layers"])
    else:
        for w in p["layers"]:
            x = llama_block(w, x, head_dim, rope)
    x = rms_norm(x, p["nf"])
    return x @ (p["head"] if "head" in p else p["emb"].T)


def llama_shapes(
    vocab=17, width=24, heads=4, kv=2, head_dim=8, hidden=40, layers=2, scan=False, tied=False,
    qk_norm=False,
):  # fmt: skip
    layer = {
        "n1": (width,),
        "n2": (width,),
        "q": (width, heads * head_dim),
        "k": (width, kv * head_dim),
        "v": (width, kv * head_dim),
        "o": (heads * head_dim, width),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    if qk_norm:
        layer |= {"qn": (head_dim,), "kn": (head_dim,)}
    stacked: Any = [layer] * layers
    if scan:
        stacked = {name: (layers, *shape) for name, shape in layer.items()}
    shapes = {"emb": (vocab, width), "nf": (width,), "layers": stacked}
    return shapes if tied else shapes | {"head": (width, vocab)}


def gpt(p, x, heads=2):
    """Fused qkv, learned positions, layer norm."""
    batch, length, _ = x.shape
    h = x @ p["inp"] + p["pos"][:length]
    q, k, v = jnp.split(layer_norm(h, p["ln"]) @ p["qkv"] + p["bqkv"], 3, -1)
    q, k, v = (t.reshape(batch, length, heads, -1) for t in (q, k, v))
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) * 0.3, -1)
    mixed = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, -1)
    h = h + mixed @ p["o"]
    return layer_norm(h, p["lnf"]) @ p["out"]


def gpt_shapes(inputs=5, width=12, inner=16):
    norm = {"g": (width,), "b": (width,)}
    return {
        "inp": (inputs, width), "pos": (9, width), "ln": norm, "lnf": norm,
        "qkv": (width, 3 * inner), "bqkv": (3 * inner,), "o": (inner, width), "out": (width, 4),
    }  # fmt: skip


def fused_qkv_first(p, x, heads=2):
    """qkv as one axis (3, heads, head_dim), taken apart by indexing."""
    batch, length, _ = x.shape
    qkv = (x @ p["qkv"]).reshape(batch, length, 3, heads, -1)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), -1)
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, -1) @ p["o"]


def alibi(p, x, heads=3):
    """Attention with a bias that depends on the head's number."""
    batch, length, _ = x.shape
    q, k, v = ((x @ p[name]).reshape(batch, length, heads, -1) for name in "qkv")
    slopes = 2.0 ** -(jnp.arange(heads) + 1.0)
    distance = jnp.arange(length)[None, :] - jnp.arange(length)[:, None]
    scores = jnp.einsum("bthd,bshd->bhts", q, k) + slopes[:, None, None] * distance
    weights = jax.nn.softmax(scores, -1)
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, -1) @ p["o"]


ALIBI = {"q": (5, 12), "k": (5, 12), "v": (5, 12), "o": (12, 4)}


# ---------------------------------------------------------------------------- convolutions


def conv(x, w, stride=1, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def batch_norm(x, p):
    return (x - p["mean"]) * lax.rsqrt(p["var"] ** 2 + 1e-3) * p["g"] + p["b"]


def norm_shapes(channels):
    return dict.fromkeys(("mean", "var", "g", "b"), (channels,))


def max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def resnet(p, x):
    h = jax.nn.relu(batch_norm(conv(x, p["stem"]), p["bn0"]))
    for b in p["blocks"]:
        y = jax.nn.relu(batch_norm(conv(h, b["c1"]), b["bn1"]))
        h = jax.nn.relu(h + batch_norm(conv(y, b["c2"]), b["bn2"]))
    h = max_pool(h).reshape(x.shape[0], -1)
    return jax.nn.relu(h @ p["fc1"] + p["b1"]) @ p["fc2"]


def resnet_shapes(channels=6, middle=10):
    block = {
        "c1": (3, 3, channels, middle), "bn1": norm_shapes(middle),
        "c2": (3, 3, middle, channels), "bn2": norm_shapes(channels),
    }  # fmt: skip
    return {
        "stem": (3, 3, 3, channels), "bn0": norm_shapes(channels), "blocks": [block] * 2,
        "fc1": (4 * 4 * channels, 14), "b1": (14,), "fc2": (14, 5),
    }  # fmt: skip


def mobile(p, x):
    """Inverted residual: expand, depthwise, project; global mean."""
    h = conv(x, p["stem"])
    y = jax.nn.relu(batch_norm(conv(h, p["exp"]), p["bn1"]))
    y = jax.nn.relu6(batch_norm(conv(y, p["dw"], 1, y.shape[-1]), p["bn2"]))
    return (h + conv(y, p["proj"])).mean((1, 2)) @ p["fc"]


def mobile_shapes(c=4, m=12):
    return {
        "stem": (3, 3, 3, c), "exp": (1, 1, c, m), "bn1": norm_shapes(m), "dw": (3, 3, 1, m),
        "bn2": norm_shapes(m), "proj": (1, 1, m, c), "fc": (c, 5),
    }  # fmt: skip


def grouped(p, x):
    h = jax.nn.relu(conv(x, p["a"]))
    return jax.nn.relu(conv(h, p["g"], 1, 3)).mean((1, 2)) @ p["fc"]


def grouped_residual(p, x):
    """A grouped convolution whose inputs and outputs are one axis."""
    h = jax.nn.relu(conv(x, p["a"]))
    return (h + conv(h, p["g"], 1, 3)).mean((1, 2)) @ p["fc"]


def dense_net(p, x):
    h = conv(x, p["stem"])
    for b in p["blocks"]:
        h = jnp.concatenate([h, conv(jax.nn.relu(batch_norm(h, b["bn"])), b["c"])], -1)
    return jax.nn.relu(h).mean((1, 2)) @ p["fc"]


def dense_net_shapes(c=4, k=6, layers=3):
    blocks = [{"bn": norm_shapes(c + i * k), "c": (3, 3, c + i * k, k)} for i in range(layers)]
    return {"stem": (3, 3, 3, c), "blocks": blocks, "fc": (c + layers * k, 5)}


def pixel_shuffle(p, x):
    y = (x @ p["a"]).reshape(2, 4, 4, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(2, 8, 8, 3) @ p["b"]


def group_norm(p, x, groups=2):
    y = x @ p["a"]
    z = y.reshape(*y.shape[:-1], groups, -1)
    z = (z - z.mean(-1, keepdims=True)) * lax.rsqrt(z.var(-1, keepdims=True) + 1e-3)
    return (z.reshape(y.shape) * p["g"]) @ p["b"]


def padded_shortcut(p, x):
    return (jnp.pad(x @ p["a"], ((0, 0), (2, 2))) + x @ p["c"]) @ p["b"]


# ---------------------------------------------------------------------------- recurrence, control


def lstm(p, x):
    """x: [time, batch, features]"""

    def step(carry, xt):
        h, c = carry
        i, f, g, o = jnp.split(xt @ p["w"] + h @ p["u"] + p["b"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((x.shape[1], p["u"].shape[0]))
    _, hidden = lax.scan(step, (zero, zero), x)
    return hidden @ p["out"]


LSTM = {"w": (5, 24), "u": (6, 24), "b": (24,), "out": (6, 3)}


def moe(p, x):
    """Soft routing over experts."""
    weights = jax.nn.softmax(x @ p["r"])
    h = jax.nn.relu(jnp.einsum("bf,efh->beh", x, p["u"]))
    return jnp.einsum("be,beo->bo", weights, jnp.einsum("beh,eho->beo", h, p["d"]))


def moe_top2(p, x):
    gate = x @ p["r"]
    weights = jnp.where(jnp.argsort(-gate, -1) < 2, jax.nn.softmax(gate), 0)
    return jnp.einsum("be,beo->bo", weights, jnp.einsum("bf,efh,eho->beo", x, p["u"], p["d"]))


def moe_ragged(p, x):
    """Tokens sorted by expert, one ragged product per matrix."""
    order = jnp.argsort(jnp.argmax(x @ p["r"], -1))
    sizes = jnp.bincount(jnp.argmax(x @ p["r"], -1), length=4)
    h = jax.nn.relu(lax.ragged_dot(x[order], p["u"], sizes))
    return lax.ragged_dot(h, p["d"], sizes)[jnp.argsort(order)]


MOE = {"r": (3, 4), "u": (4, 3, 8), "d": (4, 8, 2)}


def while_net(p, x):
    def body(carry):
        return carry[0] + 1, jnp.tanh(carry[1] @ p["u"])

    return lax.while_loop(lambda c: c[0] < 3, body, (0, x @ p["a"]))[1] @ p["b"]


def cond_net(p, x):
    first = x[0, 0] > 0
    return lax.cond(first, lambda: jnp.tanh(x @ p["a"]), lambda: x @ p["c"]) @ p["b"]


def dropout(p, x):
    h = jax.nn.relu(x @ p["a"])
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0) @ p["b"]


def cls_token(p, x):
    tokens = jnp.concatenate([jnp.broadcast_to(p["cls"], (2, 1, 8)), x @ p["a"]], 1)
    return tokens[:, 0] @ p["b"] + (x @ p["a"]).sum(1) @ p["b"]


def kv_cache(p, x):
    cache = lax.dynamic_update_slice(jnp.zeros((6, 8)), x @ p["k"], (1, 0))
    return jnp.einsum("td,bd->bt", cache, x @ p["q"])


def input_gradient(p, x):
    return jax.grad(lambda z: (jnp.tanh(z @ p["a"]) @ p["b"]).sum())(x)


def index_split(p, x):
    return (x @ p["a"])[:, 2] + (x @ p["a"]) @ p["b"]


def scale_by_width(p, x):
    scores = (x @ p["q"]) @ (x @ p["k"]).T / np.sqrt(p["q"].shape[1])
    return jax.nn.softmax(scores) @ x @ p["o"]


# ---------------------------------------------------------------------------- Linen


class Attention(nn.Module):
    width: int = 12
    hidden: int = 16
    heads: int = 3

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="inp")(x)
        attention = nn.MultiHeadDotProductAttention(
            num_heads=self.heads, qkv_features=6 * self.heads, name="mha"
        )
        x = x + attention(nn.LayerNorm(name="ln")(x))
        x = nn.gelu(nn.Dense(self.hidden, name="up")(nn.RMSNorm(name="rms")(x)))
        return nn.Dense(2, name="out")(x)


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.GroupNorm(num_groups=2)(nn.ConvTranspose(8, (2, 2), (2, 2))(x))
        return nn.Dense(2)(x.reshape(x.shape[0], -1))


def linen(module, *shape, head=None):
    x = normal(*shape)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), shapes)
    if head is None:
        return Case(lambda p, x: module.apply(p, x), _positive_variance(draw(shapes)), x)
    params = draw({"cell": shapes, "head": head})
    return Case(lambda p, x: module.apply(p["cell"], x) @ p["head"], params, x)


def _positive_variance(params):
    if "batch_stats" in params:
        stats = jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.5, params["batch_stats"])
        return params | {"batch_stats": stats}
    return params


# ---------------------------------------------------------------------------- the zoo


class Case(NamedTuple):
    fn: Callable[..., Any]
    params: Any
    x: Any


IDS = jnp.asarray(np.random.default_rng(3).integers(0, 17, (2, 5)))
IMAGE = normal(2, 6, 6, 3)


def zoo() -> dict[str, Case]:
    """Every network, by name."""
    hf, pairs = (
        functools.partial(llama, rope=rope) for rope in (rope_rotate_half, rope_interleaved)
    )
    return {
        "mlp": Case(mlp, draw(mlp_shapes()), normal(4, 5)),
        "llama": Case(llama, draw(llama_shapes()), IDS),
        "llama_tied": Case(llama, draw(llama_shapes(tied=True)), IDS),
        "llama_rotate_half": Case(hf, draw(llama_shapes()), IDS),
        "llama_interleaved": Case(pairs, draw(llama_shapes()), IDS),
        "llama_qk_norm": Case(llama, draw(llama_shapes(qk_norm=True)), IDS),
        "llama_scan": Case(llama, draw(llama_shapes(scan=True)), IDS),
        "llama_scan_tied": Case(llama, draw(llama_shapes(scan=True, tied=True, layers=3)), IDS),
        "gpt": Case(gpt, draw(gpt_shapes()), normal(2, 6, 5)),
        "fused_qkv_first": Case(
            fused_qkv_first, draw({"qkv": (5, 3 * 2 * 6), "o": (12, 3)}), normal(2, 4, 5)
        ),
        "alibi": Case(alibi, draw(ALIBI), normal(2, 4, 5)),
        "fused_glu": Case(fused_glu, draw(FUSED_GLU), normal(2, 5)),
        "soft_hidden": Case(soft_hidden, draw({"a": (5, 8), "b": (8, 3)}), normal(2, 5)),
        "flattened": Case(flattened, draw(FLATTENED), normal(2, 5)),
        "resnet": Case(resnet, draw(resnet_shapes()), normal(2, 8, 8, 3)),
        "mobile": Case(mobile, draw(mobile_shapes()), IMAGE),
        "grouped": Case(
            grouped, draw({"a": (3, 3, 3, 12), "g": (3, 3, 4, 18), "fc": (18, 5)}), IMAGE
        ),
        "grouped_residual": Case(
            grouped_residual, draw({"a": (3, 3, 3, 12), "g": (3, 3, 4, 12), "fc": (12, 5)}), IMAGE
        ),
        "dense_net": Case(dense_net, draw(dense_net_shapes()), IMAGE),
        "pixel_shuffle": Case(pixel_shuffle, draw({"a": (3, 12), "b": (3, 2)}), normal(2, 4, 4, 3)),
        "group_norm": Case(group_norm, draw({"a": (3, 8), "g": (8,), "b": (8, 2)}), normal(2, 3)),
        "padded_shortcut": Case(
            padded_shortcut, draw({"a": (3, 8), "c": (3, 12), "b": (12, 2)}), normal(2, 3)
        ),
        "lstm": Case(lstm, draw(LSTM), normal(7, 2, 5)),
        "moe": Case(moe, draw(MOE), normal(2, 3)),
        "moe_top2": Case(moe_top2, draw(MOE), normal(2, 3)),
        "moe_ragged": Case(moe_ragged, draw(MOE), normal(7, 3)),
        "while": Case(while_net, draw({"a": (3, 8), "u": (8, 8), "b": (8, 2)}), normal(2, 3)),
        "cond": Case(cond_net, draw({"a": (3, 8), "c": (3, 8), "b": (8, 2)}), normal(2, 3)),
        "dropout": Case(dropout, draw({"a": (3, 8), "b": (8, 2)}), normal(9, 3)),
        "cls_token": Case(
            cls_token, draw({"cls": (1, 1, 8), "a": (3, 8), "b": (8, 2)}), normal(2, 4, 3)
        ),
        "kv_cache": Case(kv_cache, draw({"k": (3, 8), "q": (3, 8)}), normal(2, 3)),
        "input_gradient": Case(input_gradient, draw({"a": (3, 8), "b": (8, 2)}), normal(2, 3)),
        "index_split": Case(index_split, draw({"a": (3, 8), "b": (8,)}), normal(2, 3)),
        "scale_by_width": Case(
            scale_by_width, draw({"q": (3, 8), "k": (3, 8), "o": (3, 2)}), normal(5, 3)
        ),
        "linen_attention": linen(Attention(), 2, 4, 5),
        "linen_convolutions": linen(Convolutions(), 2, 4, 4, 3),
        "linen_lstm": linen(nn.RNN(nn.OptimizedLSTMCell(6)), 2, 5, 3, head=(6, 2)),
        "linen_gru": linen(nn.RNN(nn.GRUCell(6)), 2, 5, 3, head=(6, 2)),
    }
