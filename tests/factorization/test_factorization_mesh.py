"""On a mesh of 8 devices: the same ranks and the same matrices as on one."""

import re

import jax
import numpy as np
import pytest
import tiny

import jaxcompress as jc
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.layerwise import batch
from jaxcompress.layerwise.low_rank import _truncation

IDS = np.random.default_rng(0).integers(0, 300, (8, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tiny.write_llama(tmp_path_factory.mktemp("llama"), layers=2, intermediate_size=96)
    return jc.load(directory)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svd_llm", {"ratio": 0.5}),
        pytest.param("asvd", {"ratio": 0.5, "allocate": "global"}, marks=pytest.mark.slow),
        pytest.param("qera", {"rank": 4, "group_size": 32}, marks=pytest.mark.slow),
    ],
)
def test_same_matrices(model, method, options):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
    alone = jc.compress(model, method, calibration=IDS, **options)
    spread = jc.compress(model, method, calibration=IDS, mesh=mesh, **options)
    pairs = zip(leaves_with_paths(alone.params), leaves_with_paths(spread.params), strict=True)
    for (path, one), (_, other) in pairs:
        assert type(one) is type(other), path
        if isinstance(one, LowRank):
            assert one.rank == other.rank, path
        if jc.is_compressed(one):
            np.testing.assert_allclose(one.dense(), other.dense(), atol=2e-3, err_msg=path)


def test_a_batch_needs_no_other_device():
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=axes)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    given = [
        jax.ShapeDtypeStruct(shape, np.float32, sharding=split)
        for shape in ((8, 32, 64), (8, 64, 64))
    ]
    run = jax.jit(lambda *given: batch.split(_truncation(4), mesh, ("data", "fsdp"), *given))
    text = run.lower(*given).compile().as_text()
    assert not re.search("all-gather|all-reduce|collective|all-to-all|reduce-scatter", text)
