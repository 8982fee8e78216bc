"""No dense weight exists outside the products: neither forward, nor in gradients or residuals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lift_cases import (
    affine,
    affine_of,
    close,
    equations,
    float_gradients,
    normal,
    shapes_outside_products,
)
from marks import slow_but

from jaxcompress.core.arrays.base import KERNEL, STORED, densify
from jaxcompress.core.arrays.sharding import shardings_of
from jaxcompress.core.arrays.views import with_dims
from jaxcompress.core.readers.lift import lift, materialized
from jaxcompress.factorization.kmeans import kmeans
from jaxcompress.factorization.svd import svd
from jaxcompress.layerwise.grid import grid_of, nearest
from jaxcompress.layerwise.low_rank import split

N = 512  # a weight of 512 x 512 is the smallest that products may not decode whole
X = normal(1, 3, N)
CONV = (("k", -1), ("k", 3), ("k", 64), ("n", -1))


def mlp(p, x):
    return jnp.tanh(x @ p["up"] / 30) @ p["down"] / 30


def plain():
    return {"up": affine(1, N, 640, groups=4), "down": affine(2, 640, N, groups=5)}


def factored(rest):
    """Weights whose factors are thin, alone or beside another format."""

    def one(seed, n, k):
        matrix = normal(seed, n, k)
        return svd(matrix, rank=8) if rest is None else split(matrix, rest, 8)

    return {"up": with_dims(one(8, 640, N), KERNEL), "down": with_dims(one(9, N, 640), KERNEL)}


def scanned():
    return jax.tree.map(lambda *x: jnp.stack(x), plain(), plain())


def scan_mlp(p, x):
    return lax.scan(jax.checkpoint(lambda c, q: (c + mlp(q, c), None)), x, p)[0]


def dense_shapes(params):
    """Shapes that a dense weight could have, leading axes, transposed and folded ones included."""
    shapes = set()
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "lead")):
        n, k = leaf.rows, leaf.contracted
        for lead in {leaf.lead, (), (1,), (1, *leaf.lead)}:
            shapes |= {(*lead, n, k), (*lead, k, n), (*lead, *leaf.tail)}
    return shapes


MODELS = {
    "plain": (mlp, plain, X),
    "scanned": (scan_mlp, scanned, X),
    "embedding and head": (
        lambda p, x: (p[jnp.array([1, 5])] + x[:2]) @ p.T,
        lambda: affine(3, 1024, N, dims=STORED),
        X,
    ),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(
            x, p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        lambda: affine_of(normal(4, 3, 3, 64, 640), CONV, groups=3),
        normal(5, 1, 4, 4, 64),
    ),
    "experts": (
        lambda p, x: jnp.einsum("etk,ekn->etn", jnp.stack([x] * 3), p).sum(0),
        lambda: affine(6, 3, N, 640),
        X,
    ),
    "low rank": (mlp, lambda: factored(None), X),
    "low rank and integers": (
        mlp,
        lambda: factored(partial(nearest, grid_of(bits=4, group_size=32))),
        X,
    ),
    "low rank and shared values": (mlp, lambda: factored(partial(kmeans, bits=3, steps=5)), X),
    "shared values": (
        lambda p, x: jnp.tanh(x @ p / 30),
        lambda: with_dims(kmeans(normal(10, N, N), bits=4, steps=5), KERNEL),
        X,
    ),
    "an attention cache": (
        lambda p, x: jnp.einsum("ht,thd->hd", jnp.einsum("hd,thd->ht", x, p), p) / 100,
        lambda: affine(7, 256, 3, N, dims=(("n", -1), ("n", 3), ("k", -1))),
        X,
    ),
}


@pytest.mark.parametrize("name", slow_but(MODELS, list(MODELS)[::2]))
def test_no_value_has_the_shape_of_a_weight(name):
    fn, make, x = MODELS[name]
    params = make()
    assert materialized(fn)(params, x) == []
    forward = jax.make_jaxpr(lift(fn))(params, x)
    assert not shapes_outside_products(forward.jaxpr) & dense_shapes(params)
    gradient = jax.make_jaxpr(lambda p, x: float_gradients(lift(fn), p, x))(params, x)
    assert not shapes_outside_products(gradient.jaxpr) & dense_shapes(params)
    # The check can fail: the function on dense weights does hold them.
    dense = jax.make_jaxpr(lambda p, x: fn(densify(p), x))(params, x)
    assert shapes_outside_products(dense.jaxpr) & dense_shapes(params)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("plain", "convolution") else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
    ],
)
def test_values_and_gradients_of_large_weights(name):
    fn, make, x = MODELS[name]
    params = make()
    y, expected = lift(fn)(params, x), fn(densify(params), x)
    close(y / jnp.abs(expected).max(), expected / jnp.abs(expected).max(), 1e-5)
    ours = float_gradients(lift(fn), params, x)
    theirs = float_gradients(lambda p, x: fn(densify(p), x), params, x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = jnp.abs(b).max()
        close(a / scale, b / scale, 2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_residuals_are_codes_scales_and_activations(name):
    fn, make, x = MODELS[name]
    params = make()
    _, pullback = jax.vjp(lambda x: lift(fn)(params, x), x)
    shapes = {
        leaf.shape for leaf in jax.tree.leaves(pullback) if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    assert not shapes & dense_shapes(params)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pullback)) < densify_bytes(params) / 2


def test_a_sharded_model_holds_neither_a_weight_nor_a_shard_of_one():
    """Column and row parallel: shards of 1024 x 640 and 640 x 1024 on each of two devices."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    places = {"up": P(None, "model"), "down": P("model", None)}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in places.items()}
    params = {"up": affine(1, 1024, 1280, groups=4), "down": affine(2, 1280, 1024, groups=4)}
    x = normal(3, 4, 1024)
    lifted = lift(mlp, shardings=(shardings, NamedSharding(mesh, P("data"))))
    placed = jax.device_put(params, shardings_of(params, shardings))
    y, expected = jax.jit(lifted)(placed, x), mlp(densify(params), x)
    close(y / jnp.abs(expected).max(), expected / jnp.abs(expected).max(), 1e-5)
    assert lifted.materialized() == []
    forbidden = dense_shapes(params)
    forbidden |= {(1024, 640), (640, 1024), (1, 1024, 640), (1, 640, 1024)}
    forward = jax.make_jaxpr(lifted)(params, x)
    gradient = jax.make_jaxpr(lambda p, x: float_gradients(lifted, p, x))(params, x)
    for closed in (forward, gradient):
        names = [e.primitive.name for e in equations(closed.jaxpr)]
        assert names.count("shard_map") >= 2
        # Also what stands inside the jitted products, but for the kernel itself.
        shapes = shapes_outside_products(closed.jaxpr, named=())
        assert not shapes & forbidden


def densify_bytes(params):
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(densify(params)))


def test_compiled_memory_is_below_one_dense_weight():
    """What XLA sets aside for the forward pass and the gradient of one layer."""
    params = affine(1, 1024, 2048, groups=8)
    x = normal(2, 4, 1024)

    def temporary(fn):
        compiled = jax.jit(fn).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 1024 * 2048 * 4
    f = lift(lambda p, x: x @ p)
    assert temporary(f) < whole
    assert temporary(lambda p, x: jax.grad(lambda x: (f(p, x) ** 2).sum())(x)) < whole
    assert temporary(lambda p, x: jax.grad(lambda x: ((x @ p.dense()) ** 2).sum())(x)) >= whole
