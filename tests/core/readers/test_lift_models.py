"""Models of others: plain functions, Linen, NNX, Equinox; none knows of this library."""

import math
import re
from collections import Counter

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from lift_cases import affine_of, close, float_gradients, is_float, normal

from jaxcompress.core.arrays.base import densify, dims_of, is_compressed
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.arrays.sparse import NMSparse, UnstructuredSparse
from jaxcompress.core.arrays.training import FakeQuantized, Masked
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import map_with_paths
from jaxcompress.core.readers.capture import capture
from jaxcompress.core.readers.contractions import contractions
from jaxcompress.core.readers.lift import Lifted, lift, materialized


def quantized(params, axes, select=lambda path: "kernel" in path):
    """Every selected leaf of known contraction as int4."""

    def one(path, leaf):
        if path not in axes or not select(path):
            return leaf
        lead = axes[path].lead
        tail = tuple(axis - lead for axis in axes[path])
        dims = dims_of(leaf.shape[lead:], tail)
        columns = math.prod(leaf.shape[axis] for axis in axes[path])
        return affine_of(leaf, dims, groups=2 - columns % 2)

    return map_with_paths(one, params)


class Block(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        q, k, v = (nn.DenseGeneral((4, 4), name=n)(h) for n in "qkv")
        a = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k))
        x = x + nn.DenseGeneral(16, axis=(-2, -1), name="o")(jnp.einsum("hts,shd->thd", a, v))
        h = nn.Dropout(0.1, deterministic=not self.train)(x)
        x = x + nn.Dense(16, name="down")(nn.gelu(nn.Dense(32, name="up")(h)))
        self.sow("intermediates", "norm", (x**2).mean())
        return x, None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, ids, train=False):
        embed = nn.Embed(40, 16)
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        x, _ = blocks(train, name="blocks")(embed(ids), None)
        return embed.attend(nn.LayerNorm()(x))


IDS = jnp.arange(6)


@pytest.fixture(scope="module")
def linen():
    model = Transformer()
    variables = jax.jit(model.init)(jax.random.key(0), IDS)
    return model, {"params": variables["params"]}


@pytest.fixture(scope="module")
def linen_quantized(linen):
    model, variables = linen
    axes = contractions(model.apply)(variables, IDS)
    return quantized(variables, axes)


def test_contractions_of_linen(linen):
    model, variables = linen
    axes = contractions(model.apply)(variables, IDS)
    short = {re.sub(r"params/|/kernel", "", path): (tuple(a), a.lead) for path, a in axes.items()}
    assert short == {
        "Embed_0/embedding": ((1,), 0),
        **{f"blocks/{n}": ((1,), 1) for n in ("q", "k", "v", "up", "down")},
        "blocks/o": ((1, 2), 1),
    }
    assert axes["params/blocks/o/kernel"] == (1, 2)  # a plain tuple


def test_linen_with_scan_remat_collections_and_rngs(linen, linen_quantized):
    model, _ = linen
    q, lifted = linen_quantized, lift(model.apply)
    assert sum(map(is_compressed, jax.tree.leaves(q, is_leaf=is_compressed))) == 6
    kwargs = {"mutable": ["intermediates"]}
    close(lifted(q, IDS, **kwargs), model.apply(densify(q), IDS, **kwargs), 1e-4)
    for seed in (1, 2):
        kwargs = {"train": True, "rngs": {"dropout": jax.random.key(seed)}}
        close(lifted(q, IDS, **kwargs), model.apply(densify(q), IDS, **kwargs), 1e-4)
    assert lifted.walk.traces["function"] == 2
    assert lifted.materialized() == []
    out = Model(model.apply, q)(IDS)
    close(out, model.apply(densify(q), IDS), 1e-4)


def test_linen_gradients(linen, linen_quantized):
    model, _ = linen

    def f(p, s):
        return model.apply(p, IDS) * s

    ours = float_gradients(lift(f), linen_quantized, jnp.float32(1.0))
    theirs = float_gradients(lambda p, s: f(densify(p), s), linen_quantized, jnp.float32(1.0))
    close(ours, theirs, 5e-3)


def test_linen_without_a_compressed_leaf_is_unchanged(linen):
    """Own bits, and the same operations; also where the walk is forced."""
    model, variables = linen

    def f(v, ids):
        return model.apply(v, ids)

    def operations(g):
        text = jax.jit(g).lower(variables, IDS).compile().as_text()
        return Counter(re.findall(r"= \S+ ([a-z\-]+)\(", text))

    assert operations(f) == operations(lift(f)) == operations(Lifted(f, always=True))
    for g in (lift(f), Lifted(f, always=True)):
        np.testing.assert_array_equal(jax.jit(g)(variables, IDS), jax.jit(f)(variables, IDS))


def test_capture_of_linen(linen):
    model, variables = linen
    run = jax.jit(capture(model.apply, "second_moment", include="**/kernel"))
    found = run(variables, IDS)
    shapes = {
        re.sub(r"params/blocks/|/kernel", "", path): s["second_moment"].shape
        for (path, _), s in found.items()
    }
    assert shapes == {
        **dict.fromkeys("qkvo", (3, 16, 16)),
        "up": (3, 16, 16),
        "down": (3, 32, 32),
    }
    eager = capture(model.apply, "second_moment", include="**/kernel")(variables, IDS)
    by_name = {path.split("/")[-2]: id(s) for (path, _), s in eager.items()}
    assert by_name["q"] == by_name["k"] == by_name["v"] != by_name["up"]
    # The truth for the first layer, from Linen's own intermediates.
    states = model.apply(variables, IDS, capture_intermediates=True, mutable=["intermediates"])[1]
    normed = states["intermediates"]["blocks"]["LayerNorm_0"]["__call__"][0]
    expected = np.einsum("ltk,ltm->lkm", normed, normed)
    close(eager["params/blocks/q/kernel", 0]["second_moment"], expected, 1e-3)


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(x)
        return nn.Dense(5)(nn.avg_pool(x, (2, 2)).reshape(x.shape[0], -1))


def test_a_convolutional_linen_model():
    model, x = Conv(), normal(1, 2, 6, 6, 4)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    axes = contractions(model.apply)(variables, x)
    assert axes["params/Conv_0/kernel"] == (0, 1, 2)
    assert axes["params/Dense_0/kernel"] == (0,)
    q = quantized(variables, axes, lambda path: "kernel" in path and "Transpose" not in path)
    lifted = lift(model.apply)
    close(lifted(q, x), jax.jit(model.apply)(densify(q), x), 1e-4)
    assert lifted.materialized() == []
    found = capture(model.apply, "second_moment", include="**/kernel")(variables, x)
    assert len(found) == 4


class EquinoxModel(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm
    embedding: eqx.nn.Embedding
    name: str = eqx.field(static=True, default="equinox")

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(2, 16, key=a)
        self.mlp = eqx.nn.MLP(16, 16, 32, 2, key=b)
        self.norm = eqx.nn.LayerNorm(16)
        self.embedding = eqx.nn.Embedding(20, 16, key=c)

    def __call__(self, ids):
        x = jax.vmap(self.embedding)(ids)
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h)
        return x + jax.vmap(self.mlp)(x)


def test_equinox():
    """A module is the pytree of its own parameters: it is what lift is called with."""
    module = EquinoxModel(jax.random.key(0))
    ids = jnp.array([3, 1, 4])

    def apply(module, ids):
        return module(ids)

    axes = contractions(apply)(module, ids)
    assert axes["mlp/layers/0/weight"] == (1,)
    assert axes["attention/query_proj/weight"] == (1,)
    q = quantized(module, axes, lambda path: "weight" in path and "norm" not in path)
    assert is_compressed(q.mlp.layers[0].weight)
    assert is_compressed(q.embedding.weight)
    model = Model(apply, q)
    close(model(ids), eqx.filter_jit(apply)(densify(q), ids), 1e-4)
    assert materialized(apply)(q, ids) == []


@pytest.mark.slow
def test_equinox_gradients():
    module, ids = EquinoxModel(jax.random.key(0)), jnp.array([3, 1, 4])

    def apply(module, ids):
        return module(ids)

    q = quantized(
        module,
        contractions(apply)(module, ids),
        lambda path: "weight" in path and "norm" not in path,
    )
    inexact, rest = eqx.partition(q, lambda x: eqx.is_array(x) and is_float(x))

    def loss(inexact, run):
        return (run(eqx.combine(inexact, rest), ids) ** 2).sum()

    ours = jax.jit(jax.grad(lambda p: loss(p, lift(apply))))(inexact)
    theirs = jax.jit(jax.grad(lambda p: loss(p, lambda m, ids: apply(densify(m), ids))))(inexact)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        close(a, b, 2e-3)


def nnx_model():
    from_nnx = pytest.importorskip("jaxcompress.core.nnx").from_nnx
    try:
        from flax import nnx
    except Exception as error:
        pytest.skip(f"flax.nnx does not import under this JAX: {error}")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(16, 32, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(32, 32, rngs=rngs) for _ in range(2)])
            self.b = nnx.Linear(32, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs, use_running_average=True)

        def __call__(self, x, scale=1.0):
            x = nnx.gelu(self.a(x))
            for layer in self.layers:
                x = x + layer(x)
            return self.norm(self.b(x)) * scale

    return from_nnx, Net(nnx.Rngs(0))


def test_nnx():
    from_nnx, module = nnx_model()
    model, x = from_nnx(module), normal(1, 5, 16)
    close(model(x), module(x))
    close(model(x, scale=2.0), module(x, scale=2.0))
    axes = contractions(model.apply)(model.params, x)
    assert axes["layers/1/kernel"] == (0,)
    small = model.replace(params=quantized(model.params, axes))
    close(small(x), model.apply(densify(small.params), x), 1e-4)
    assert materialized(small.apply)(small.params, x) == []
    assert ("a/kernel", 0) in capture(model.apply, "mean_abs")(model.params, x)
    ours = float_gradients(small.apply and lift(small.apply), small.params, x)
    theirs = float_gradients(lambda p, x: model.apply(densify(p), x), small.params, x)
    close(ours, theirs, 5e-3)


def test_what_is_no_nnx_module_is_refused():
    from_nnx, _ = nnx_model()
    with pytest.raises(InputError, match="dict is not"):
        from_nnx({})


# ------------------------------------------------------------- every class of compressed array


def classes():
    matrix = normal(1, 24, 32)  # [rows, columns]: a kernel of 32 in, 24 out
    runs = jnp.abs(matrix).reshape(24, 8, 4)
    two_of_four = (jnp.argsort(jnp.argsort(-runs, -1), -1) < 2).reshape(24, 32)
    some = jnp.abs(matrix) > 0.7
    scale = jnp.abs(matrix).reshape(24, 2, 16).max(-1) / 7.5
    return {
        "NMSparse": NMSparse.from_mask(matrix, two_of_four, 2, 4),
        "UnstructuredSparse": UnstructuredSparse.from_mask(matrix, some),
        "LowRank": LowRank(normal(2, 24, 4), normal(3, 4, 32)),
        "Masked": Masked(matrix, some),
        "FakeQuantized": FakeQuantized(matrix, scale),
        "Affine": affine_of(matrix.T, groups=2),
    }


CLASSES = classes()


def two_layers(p, x):
    def layer(c, q):
        h = jnp.einsum("tk,khd->thd", c, q.reshape(32, 3, 8))
        return jnp.tanh(c + jnp.einsum("thd,khd->tk", h, q.reshape(32, 3, 8)) / 30), None

    return lax.scan(jax.checkpoint(layer), x, p)[0]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_through_scan_views_and_gradients(name):
    leaf = CLASSES[name]
    stack = jax.tree.map(lambda b: jnp.stack([b, b]), leaf)
    x = normal(4, 5, 32)
    lifted = lift(two_layers)
    close(lifted(stack, x), jax.jit(two_layers)(stack.dense(), x), 1e-4)
    assert lifted.materialized() == []
    ours = float_gradients(lift(two_layers), stack, x)
    theirs = float_gradients(lambda p, x: two_layers(densify(p), x), stack, x)
    close(ours, theirs, 2e-3)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_as_an_embedding_and_batched(name):
    leaf = CLASSES[name].replace(dims=(("n", -1), ("k", -1)))
    ids = jnp.array([[0, 5], [23, 5]])

    def f(p, x):
        return p[ids] @ x[0], x @ p[4:20].T

    x = normal(4, 5, 32)
    lifted = lift(f)
    close(lifted(leaf, x), f(leaf.dense(), x), 1e-4)
    assert lifted.materialized() == []
    close(
        jax.vmap(lift(lambda p, x: x @ p.T), (0, None))(
            jax.tree.map(lambda b: jnp.stack([b, b]), leaf), x
        )[1],
        x @ leaf.dense().T,
        1e-4,
    )


@pytest.mark.parametrize("name", CLASSES)
def test_large_weights_of_every_class_are_decoded_by_rows(name):
    """A chunked product equals the whole one; the chunks are small enough to be seen."""
    from jaxcompress.core.arrays import chunked

    leaf, x, y = CLASSES[name], normal(4, 5, 32), normal(5, 5, 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "WHOLE_BELOW", 1)
        patch.setattr(chunked, "CHUNK", 32 * 5)  # five rows, which do not divide 24
        over_k = chunked.product(leaf, x, "k")
        over_n = chunked.product(leaf, y, "n")
        gradient = jax.grad(lambda x: (chunked.product(leaf, x, "k") ** 2).sum())(x)
    close(over_k, x @ leaf.matrix().T, 1e-4)
    close(over_n, y @ leaf.matrix(), 1e-4)
    close(gradient, 2 * x @ leaf.matrix().T @ leaf.matrix(), 1e-2)
