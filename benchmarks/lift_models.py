"""Small models in five styles for `lift_table.py`; none knows of this library.

Each maps x [batch, time, WIDTH] to the same shape and ends in a norm, so that outputs are of
order 1 and a model may follow itself.
"""

from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc

WIDTH, HIDDEN, HEADS, LAYERS = 64, 4096, 4, 2  # 64 x 4096 is too large to be decoded whole
IDS = np.arange(6) % 5


def attend(q, k, v):
    """Softmax attention over [batch, time, heads, head width]."""
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


# ---------------------------------------------------------------------------- plain functions


def norm(x):
    """RMS norm."""
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def block(p, x):
    """One block: attention and an MLP."""
    h = norm(x)
    q, k, v = ((h @ p[name]).reshape(*h.shape[:2], HEADS, -1) for name in "qkv")
    x = x + attend(q, k, v).reshape(x.shape) @ p["o"]
    h = norm(x)
    return x + jax.nn.silu(h @ p["up"]) @ p["down"]


def plain(p, x):
    """A table that is both looked up and multiplied by, around one block."""
    x = block(p, x + p["table"][IDS])
    return norm(x + jax.nn.softmax(x @ p["table"].T) @ p["table"])


def scanned(p, x):
    """Blocks stacked along a leading axis."""
    return norm(lax.scan(jax.checkpoint(lambda c, q: (block(q, c), None)), x, p)[0])


SHAPES = {
    **dict.fromkeys("qkvo", (WIDTH, WIDTH)),
    "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH),
}  # fmt: skip
COLUMN, ROW = P(None, "model"), P("model", None)
SPECS = {**dict.fromkeys(["q", "k", "v", "up"], COLUMN), "o": ROW, "down": ROW}


def drawn(shapes, *lead):
    """Normal weights scaled by their fan in."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, (*lead, *shape)) * shape[0] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


# ---------------------------------------------------------------------------- modules


class LinenBlock(nn.Module):
    """A block with LayerNorm and DenseGeneral."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        q, k, v = (nn.DenseGeneral((HEADS, WIDTH // HEADS), name=name)(h) for name in "qkv")
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="o")(attend(q, k, v))
        h = nn.gelu(nn.Dense(HIDDEN, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(h), None


class Linen(nn.Module):
    """Blocks written out, or scanned and rematerialised."""

    scan: bool = False

    @nn.compact
    def __call__(self, x):
        x = x + nn.Embed(5, WIDTH)(IDS)
        if self.scan:
            blocks = nn.scan(
                nn.remat(LinenBlock, prevent_cse=False),
                variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS,
            )  # fmt: skip
            x, _ = blocks(name="blocks")(x, None)
        else:
            x, _ = LinenBlock()(x)
        return nn.LayerNorm()(x)


class Nnx(nnx.Module):
    """NNX layers, attention among them."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        x = x + self.down(nnx.gelu(self.up(self.norms[1](x))))
        return self.norms[2](x)


class Equinox(eqx.Module):
    """Equinox layers, mapped over batch and time."""

    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        a, b = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=a)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, HIDDEN, 1, key=b)
        self.norm = eqx.nn.LayerNorm(WIDTH)

    def __call__(self, x):
        def one(x):
            h = jax.vmap(self.norm)(x)
            x = x + self.attention(h, h, h)
            return jax.vmap(self.norm)(x + jax.vmap(self.mlp)(x))

        return jax.vmap(one)(x)


# ---------------------------------------------------------------------------- all of them


class Case(NamedTuple):
    """A function, its dense parameters, and shardings of these or None."""

    apply: object
    params: object
    shardings: object = None


def cases(x, mesh):
    """{name: Case}."""
    linen, linen_scan = Linen(), Linen(scan=True)
    module = jc.from_nnx(Nnx(nnx.Rngs(0)))
    arrays, static = eqx.partition(Equinox(jax.random.key(0)), eqx.is_array)
    shapes = {**SHAPES, "table": (5, WIDTH)}
    shardings = {name: NamedSharding(mesh, SPECS.get(name, P())) for name in shapes}
    return {
        "plain": Case(plain, drawn(shapes)),
        "plain, scan": Case(scanned, drawn(SHAPES, LAYERS)),
        "Linen": Case(linen.apply, linen.init(jax.random.key(0), x)),
        "Linen scan+remat": Case(linen_scan.apply, linen_scan.init(jax.random.key(0), x)),
        "NNX": Case(module.apply, module.params),
        "Equinox": Case(lambda arrays, x: eqx.combine(arrays, static)(x), arrays),
        "sharded": Case(plain, drawn(shapes), shardings),
    }
