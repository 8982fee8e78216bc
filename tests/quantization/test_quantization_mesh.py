"""Calibrated rounding under a mesh of eight devices, and how much program it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fold_cases import reference
from jax.sharding import Mesh

import jaxcompress as jc
from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.layerwise import grid_of, solve
from jaxcompress.layerwise.descent import search
from jaxcompress.layerwise.grid import parameters_of
from jaxcompress.layerwise.journal import Journal
from jaxcompress.training.mesh import make_mesh, param_shardings

IDS = np.random.default_rng(0).integers(0, 40, (32, 16)).astype(np.int32)
OPTIONS = {"bits": 4, "group_size": 16}


def mesh_of_eight():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))


def share_of_equal_codes(one, other):
    pairs = zip(leaves_with_paths(one.params), leaves_with_paths(other.params), strict=True)
    same = count = 0
    for (_, a), (_, b) in pairs:
        if is_compressed(a):
            same += int((np.asarray(a.integers()) == np.asarray(b.integers())).sum())
            count += a.size
    return same / count


@pytest.mark.parametrize("name", ["gptq", pytest.param("coordinate", marks=pytest.mark.slow)])
def test_the_same_codes_from_the_dense_inputs(name):
    model = reference("decoder")
    options = {"calibration": IDS, "sequential": "none", "dense_target": 0.0, **OPTIONS}
    whole = jc.compress(model, name, **options)
    parted = jc.compress(model, name, mesh=mesh_of_eight(), **options)
    assert share_of_equal_codes(whole, parted) > 0.995


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq", "coordinate"])
def test_the_same_perplexity_by_their_defaults(name):
    model = reference("decoder")
    whole = jc.compress(model, name, calibration=IDS, **OPTIONS)
    parted = jc.compress(model, name, mesh=mesh_of_eight(), calibration=IDS, **OPTIONS)
    held = np.random.default_rng(1).integers(0, 40, (64, 16))

    def loss(model):
        logp = jax.nn.log_softmax(model(held))
        return float(-jnp.take_along_axis(logp[:, :-1], held[:, 1:, None], -1).mean())

    assert abs(loss(whole) - loss(parted)) < 5e-3 * loss(whole)


@pytest.mark.slow
def test_results_lie_as_the_weights_lay():
    model, mesh = reference("decoder"), make_mesh(2, 2, 2)
    shardings = param_shardings(model, mesh)
    spread = model.replace(params=jax.device_put(model.params, shardings))
    options = {"calibration": IDS, "mesh": mesh, "sequential": "none", "bits": 4}
    small = jc.compress(spread, "gptq", group_size=-1, **options)
    whole = jc.compress(model, "gptq", group_size=-1, **options)
    assert share_of_equal_codes(whole, small) > 0.995
    wanted = jax.tree.leaves(param_shardings(small, mesh))
    assert any("fsdp" in jax.tree.leaves(tuple(sharding.spec)) for sharding in wanted)
    for leaf, sharding in zip(jax.tree.leaves(small.params), wanted, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_figures_of_a_batch_are_those_of_its_matrices(tmp_path):
    model = reference("decoder")
    alone, spread = Journal(tmp_path / "a"), Journal(tmp_path / "b")
    options = {"calibration": IDS, "sequential": "none", **OPTIONS}
    jc.compress(model, "gptq", journal=alone, **options)
    jc.compress(model, "gptq", journal=spread, mesh=mesh_of_eight(), **options)
    assert alone.told.keys() == spread.told.keys()
    for path, told in alone.told.items():
        assert told.keys() == spread.told[path].keys()
        for name in ("loss", "loss_nearest", "damp", "saturation"):
            np.testing.assert_allclose(told[name], spread.told[path][name], rtol=2e-2)


@pytest.mark.parametrize("solver", ["gptq", "coordinate"])
def test_the_program_is_as_long_for_any_matrix(solver):
    grid = grid_of("int", bits=4, group_size=128)

    def one(weight, moment):
        known = parameters_of(grid, weight)
        if solver == "coordinate":
            return search(weight, moment, known, grid=grid).weight
        return solve(weight, moment, grid=grid, parameters=known, act_order=True).weight

    def lines(n):
        shapes = [jax.ShapeDtypeStruct((n, n), jnp.float32)] * 2
        return len(jax.jit(one).lower(*shapes).as_text().splitlines())

    assert lines(4096) <= lines(512) + 50
    assert lines(4096) < {"gptq": 1500, "coordinate": 4500}[solver]
