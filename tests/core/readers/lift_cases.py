"""What the tests of the readers share: compressed weights, comparisons, walks over jaxprs."""

from collections import Counter

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.affine import encode_affine, minmax_range
from jaxcompress.core.arrays.base import (
    KERNEL,
    densify,
    infer_first,
    is_compressed,
    to_matrix,
)
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.readers.lift import lift


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(1000 + seed), shape)


def affine(seed, *shape, dims=KERNEL, bits=4, groups=2, symmetric=True, per_tensor=False):
    """A dense normal array, quantized."""
    return affine_of(normal(seed, *shape), dims, bits, groups, symmetric, per_tensor)


def affine_of(dense, dims=KERNEL, bits=4, groups=2, symmetric=True, per_tensor=False):
    dims = infer_first(dims)
    matrix = to_matrix(dense, dims)
    scale, zero = minmax_range(
        matrix,
        bits=bits,
        groups=1 if per_tensor else groups,
        symmetric=symmetric,
        per_tensor=per_tensor,
    )
    return encode_affine(matrix, scale, zero, bits=bits, dims=dims)


def low_rank(seed, n, k, rank=3, dims=KERNEL):
    return LowRank(normal(seed, n, rank), normal(seed + 1, rank, k), dims)


def close(a, b, tol=2e-5):
    """Equal trees, compressed leaves compared by their dense arrays."""
    a, b = densify(a), densify(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), atol=tol, rtol=tol
        )


def float_gradients(fn, params, x):
    """Gradients of sum(fn(params, x)^2) with respect to every float buffer, and to x."""
    leaves, tree = jax.tree.flatten(params)
    floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def loss(moved, x):
        full = list(leaves)
        for i, value in zip(floats, moved, strict=True):
            full[i] = value
        return (fn(jax.tree.unflatten(tree, full), x) ** 2).sum()

    return jax.jit(jax.grad(loss, (0, 1)))([leaves[i] for i in floats], x)


def check(fn, params, x, tol=2e-5, grad_tol=1e-3, empty=True, gradients=True):
    """Outputs and all gradients of lift(fn) are those of fn on dense arrays; nothing went dense."""
    lifted = lift(fn)
    close(jax.jit(lifted)(params, x), jax.jit(fn)(densify(params), x), tol)
    if empty:
        assert lifted.materialized() == []
    if gradients:
        close(
            float_gradients(lifted, params, x),
            float_gradients(lambda p, x: fn(densify(p), x), params, x),
            grad_tol,
        )
    return lifted


def equations(jaxpr, skip=lambda eqn: False):
    """All equations of a jaxpr and of the jaxprs in it; those inside `skip`ped ones left out."""
    for eqn in jaxpr.eqns:
        yield eqn
        if skip(eqn):
            continue
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from equations(getattr(inner, "jaxpr", inner), skip)


def primitives(jaxpr):
    return Counter(eqn.primitive.name for eqn in equations(jaxpr))


def is_float(aval):
    return jnp.issubdtype(aval.dtype, jnp.floating)


def shapes_outside_products(jaxpr, named=("product",)):
    """Shapes of float values that exist outside the kernels and the jitted functions `named`."""
    inner = ("wna16_product", "wna16_scale_gradient")

    def skip(eqn):
        return eqn.primitive.name in inner or eqn.params.get("name") in named

    return {
        tuple(var.aval.shape)
        for eqn in equations(jaxpr, skip)
        if not skip(eqn)
        for var in eqn.outvars
        if hasattr(var.aval, "shape") and is_float(var.aval)
    }


def compressed_leaves(tree):
    leaves = jax.tree.leaves(tree, is_leaf=is_compressed)
    return [leaf for leaf in leaves if is_compressed(leaf)]
