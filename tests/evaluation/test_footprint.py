"""Non-zero entries and bytes against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.core.arrays.affine import encode_affine, minmax_range
from jaxcompress.core.arrays.base import densify
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.arrays.sparse import NMSparse, UnstructuredSparse
from jaxcompress.core.arrays.training import Masked
from jaxcompress.evaluation import footprint as module
from jaxcompress.evaluation.footprint import footprint, nonzero


def drawn(*sizes, seed=0):
    return np.random.default_rng(seed).normal(size=sizes).astype(np.float32)


def int4(matrix):
    scale, zero = minmax_range(matrix, bits=4, groups=matrix.shape[-1] // 32, symmetric=True)
    return encode_affine(jnp.asarray(matrix), scale, zero, bits=4)


def two_of_four(matrix):
    runs = np.abs(matrix).reshape(*matrix.shape[:-1], -1, 4)
    return (np.argsort(np.argsort(-runs, axis=-1), axis=-1) < 2).reshape(matrix.shape)


def tree(*lead):
    matrix = drawn(*lead, 12, 64)
    mask = drawn(*lead, 12, 64, seed=1) > 0.7
    return {
        "dense": jnp.asarray(matrix * mask),
        "int4": int4(matrix),
        "2:4": NMSparse.from_mask(jnp.asarray(matrix), two_of_four(matrix), 2, 4),
        "2:4 int4": NMSparse.from_mask(jnp.asarray(matrix), two_of_four(matrix), 2, 4, encode=int4),
        "sparse": UnstructuredSparse.from_mask(jnp.asarray(matrix), mask),
        "masked": Masked(jnp.asarray(matrix), jnp.asarray(mask)),
        "sum": Sum(int4(matrix), LowRank(drawn(*lead, 12, 2), drawn(*lead, 2, 64, seed=2))),
        "bfloat16": jnp.asarray(matrix * mask, jnp.bfloat16),
        "scalar": jnp.float32(2),
        "zeros": np.zeros((3, 5), np.float32),
        "empty": np.zeros((0, 5), np.float32),
    }


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_nonzero_is_exact_for_every_kind_of_leaf(lead):
    params = {"layers": tree(*lead)}
    found = nonzero(params)
    want = {
        f"layers/{name}": np.count_nonzero(np.asarray(x, np.float32))
        for name, x in densify(params)["layers"].items()
    }
    assert found == want
    assert 0 < want["layers/int4"] < params["layers"]["int4"].size  # rounding makes zeros too


def test_one_matrix_at_a_time_is_made_dense(monkeypatch):
    sizes = []

    def recorded(leaf, index):
        made = taken(leaf, index)
        sizes.append(made.size)
        return made

    taken = module.taken
    monkeypatch.setattr(module, "taken", recorded)
    module._program.cache_clear()
    leaf = tree(5)["2:4 int4"]
    assert nonzero({"a": leaf})["a"] == np.count_nonzero(leaf.dense())
    assert sizes == [12 * 64]  # traced once, for one of the five
    module._program.cache_clear()


def test_counts_on_a_mesh_are_those_of_one_device():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = {"a": drawn(2, 64, 32) * (drawn(2, 64, 32, seed=1) > 0)}
    split = jax.NamedSharding(mesh, jax.P(None, "data", "fsdp"))
    assert nonzero(jax.device_put(params, split)) == nonzero(params)


def test_footprint_counts_every_buffer():
    params = {"a": int4(drawn(12, 64)), "b": drawn(7)}
    found = footprint(params)
    packed = 12 * 64 // 2 + 12 * 2 * params["a"].scale.dtype.itemsize
    assert found["bytes"] == packed + 28
    assert found["parameters"] == 12 * 64 + 7
    assert found["bits_per_weight"] == 8 * found["bytes"] / found["parameters"]
