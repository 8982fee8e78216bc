"""split and merge: what trains, by kind and by path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.core.arrays.affine import encode_affine, minmax_range
from jaxcompress.core.arrays.base import STORED
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.arrays.sparse import NMSparse, UnstructuredSparse
from jaxcompress.core.arrays.training import FakeQuantized, Masked
from jaxcompress.core.errors import InputError
from jaxcompress.core.partition import merge, split


def affine(matrix):
    scale, zero = minmax_range(matrix, bits=4, groups=1, symmetric=False)
    return encode_affine(matrix, scale, zero, bits=4, dims=STORED)


@pytest.fixture(scope="module")
def params():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), jnp.float32)
    mask = jnp.tile(jnp.arange(64) % 4 < 2, (4, 1))
    low_rank = LowRank(w[:, :2], w[:2], STORED)
    return {
        "affine": affine(w),
        "nested": NMSparse.from_mask(w, mask, 2, 4, encode=affine),
        "sparse": UnstructuredSparse.from_mask(w, mask),
        "sum": Sum.of(low_rank, affine(w)),
        "masked": Masked(w, mask),
        "fake": [FakeQuantized(w, jnp.ones((4, 1)))],
        "dense": {
            "kernel": w,
            "steps": jnp.zeros((), jnp.int32),
            "name": "x",
            "half": w[0].astype(jnp.bfloat16),
        },
        "none": None,
    }


EXPECTED = {
    "scales": {"affine/scale", "nested/values/scale", "sum/second/scale", "fake/0/scale"},
    "factors": {"sum/first/a", "sum/first/b"},
    "values": {"sparse/values"},
    "weights": {"masked/weight", "fake/0/weight"},
    "dense": {"dense/kernel", "dense/half"},
}


def held(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat}


@pytest.mark.parametrize("what", [*EXPECTED, ("scales", "dense"), "all"])
def test_each_kind_holds_its_buffers(params, what):
    kinds = EXPECTED if what == "all" else [what] if isinstance(what, str) else what
    trainable, frozen = split(params, what)
    wanted = set().union(*(EXPECTED[kind] for kind in kinds))
    assert held(trainable) == wanted
    assert held(frozen) == held(params) - wanted
    merged = merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for mine, theirs in zip(jax.tree.leaves(merged), jax.tree.leaves(params)):
        assert mine is theirs


def test_paths_narrow_the_kinds(params):
    trainable, _ = split(params, include=["fake/*", "dense/**", "affine"], exclude="**/half")
    assert held(trainable) == {"fake/0/weight", "fake/0/scale", "dense/kernel", "affine/scale"}
    trainable, _ = split(params, "scales", include="{fake,sum}/**")
    assert held(trainable) == {"fake/0/scale", "sum/second/scale"}


def test_what_is_wrong_is_said(params):
    with pytest.raises(InputError, match="'scale' is none of scales, factors"):
        split(params, "scale")
    with pytest.raises(InputError, match="'fakes' matches none"):
        split(params, include="fakes")
    with pytest.raises(InputError, match=r"one of factors; the parameters have scales$"):
        split({"w": params["affine"]}, "factors")
    with pytest.raises(InputError, match="have nothing that trains"):
        split({"n": jnp.zeros(3, jnp.int32)})


def test_gradients_reach_what_is_split_and_merge_is_traceable(params):
    arrays = {name: params[name] for name in ("affine", "nested", "sum")}
    trainable, frozen = split(arrays, "scales")

    @jax.jit
    def loss(trainable, frozen):
        merged = merge(trainable, frozen)
        return sum((leaf.matrix() ** 2).sum() for leaf in merged.values())

    gradients = jax.grad(loss)(trainable, frozen)
    assert jax.tree.structure(gradients) == jax.tree.structure(trainable)
    # d/ds sum (q s)^2 = 2 sum q^2 s = 2 / s sum w^2, row by row
    leaf = arrays["affine"]
    by_hand = 2 * (leaf.decode() ** 2).sum(-1, keepdims=True) / leaf.scale
    np.testing.assert_allclose(gradients["affine"].scale, by_hand, rtol=1e-5)
