"""Sparse and quantized at once, and a mask that rounding keeps: against NumPy, and each other."""

import jax.numpy as jnp
import numpy as np
import pytest
import solver_oracle as oracle

import jaxcompress as jc
from jaxcompress.core.arrays.base import dense
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.layerwise.descent import damped, descend
from jaxcompress.layerwise.grid import grid_of, on_grid, parameters_of
from jaxcompress.models import build_model, linear_paths
from jaxcompress.models.decoder_config import DecoderConfig
from jaxcompress.pruning.kronecker import kronecker
from jaxcompress.pruning.sparsegpt import sparsegpt
from jaxcompress.quantization.coordinate import coordinate
from jaxcompress.quantization.gptq import gptq

INT4 = {"bits": 4, "group_size": 32}


def problem(seed=0, rows=48, columns=96):
    return tuple(map(jnp.asarray, oracle.problem(seed, rows, columns)))


def error(weight, found, moment):
    return oracle.error(weight, dense(found), moment)


def runs(matrix):
    """How many of every four columns are there."""
    return (np.asarray(dense(matrix)) != 0).reshape(-1, 4).sum(-1)


class AsStored:
    """The oracle's grid with the scales of a result: float32 and float64 break ties differently."""

    def __init__(self, scale):
        self.scales = list(np.asarray(scale, np.float64).T)

    def find(self, weight):
        return self.scales.pop(0)

    def snap(self, weight, scale):
        return np.clip(np.round(weight / scale), -8, 7) * scale


def test_one_pass_is_that_of_numpy_with_whole_runs_by_falling_activation():
    weight, moment = problem()
    found = sparsegpt(weight, moment, pattern="2:4", **INT4)
    assert found.bits == 4
    want, keep = oracle.solve(
        weight, moment, grid=AsStored(found.scale), group=32, n_m=(2, 4), act_order=True
    )
    assert (keep.reshape(-1, 4).sum(-1) == 2).all()
    assert runs(found).max() == 2
    assert np.mean(np.abs(np.asarray(dense(found)) - want) > 1e-4) < 5e-3


def test_one_pass_errs_less_than_pruning_and_then_rounding():
    ours, chain = [], []
    for seed in range(3):
        weight, moment = problem(seed)
        sparse = sparsegpt(weight, moment, pattern="2:4")
        chain.append(error(weight, gptq(sparse, moment, **INT4), moment))
        ours.append(error(weight, sparsegpt(weight, moment, pattern="2:4", **INT4), moment))
    assert sum(ours) < 0.97 * sum(chain)


def test_the_order_is_a_choice():
    weight, moment = problem()
    given = {"pattern": "2:4", **INT4}
    ordered, stored = (sparsegpt(weight, moment, act_order=o, **given) for o in (True, False))
    np.testing.assert_array_equal(dense(sparsegpt(weight, moment, **given)), dense(ordered))
    assert error(weight, ordered, moment) < error(weight, stored, moment)
    plain = [sparsegpt(weight, moment, pattern="2:4", act_order=o) for o in (None, False)]
    np.testing.assert_array_equal(*plain)


@pytest.mark.parametrize("store", ["zeros", "sparse"])
def test_gptq_of_a_pruned_matrix_keeps_its_mask_and_makes_up_for_it(store):
    weight, moment = problem()
    sparse = sparsegpt(weight, moment, pattern="2:4", store=store)
    plain = np.asarray(dense(sparse))
    found = gptq(sparse, moment, **INT4)
    assert not np.asarray(dense(found))[plain == 0].any()
    want, _ = oracle.solve(
        plain, moment, grid=AsStored(found.scale), group=32, keep=plain != 0, act_order=True
    )
    assert np.mean(np.abs(np.asarray(dense(found)) - want) > 1e-4) < 5e-3


@pytest.mark.parametrize(
    "numbers",
    [{"dtype": "int", "bits": 3}, {"dtype": "int", "symmetric": False}],
    ids=str,
)
def test_coordinate_descent_keeps_the_mask(numbers):
    weight, moment = problem()
    sparse = sparsegpt(weight, moment, pattern="2:4")
    found = [method(sparse, moment, group_size=32, **numbers) for method in (gptq, coordinate)]
    for each in found:
        assert not np.asarray(dense(each))[np.asarray(sparse) == 0].any()
    greedy, better = (error(sparse, each, moment) for each in found)
    assert better < 0.9 * greedy


def test_a_sweep_under_a_mask_is_that_of_numpy():
    weight, moment = problem(1, 16, 160)
    weight = jnp.where(np.random.default_rng(0).random(weight.shape) < 0.5, weight, 0)
    grid = grid_of(bits=3, group_size=-1)
    parameters, _ = parameters_of(grid, weight)
    start = on_grid(grid, weight, parameters)
    wide = np.asarray(damped(moment, 0.01), np.float64)
    wanted, scale = np.asarray(weight, np.float64), np.asarray(parameters[0][:, 0], np.float64)
    found = np.asarray(start, np.float64)
    for i in range(160):
        best = found[:, i] - (found - wanted) @ wide[:, i] / wide[i, i]
        snapped = np.clip(np.round(best / scale), -4, 3) * scale
        found[:, i] = np.where(wanted[:, i] == 0, 0, snapped)
    change = found - wanted
    got = descend(weight, start, parameters, moment, grid=grid, rounds=1)
    # Least squares of the scale follows the sweep.
    swept = np.einsum("nk,kl,nl->n", change, wide, change)
    assert (np.asarray(got.after) <= swept * (1 + 1e-3)).all()
    assert not np.asarray(got.weight)[wanted == 0].any()


def test_kronecker_rounds_under_its_mask():
    weight, moment = problem(columns=128)
    joint = kronecker(weight, moment, pattern="2:4", **INT4)
    assert joint.scale.dtype == jnp.float16
    assert (runs(joint) <= 2).all()
    pruned = kronecker(weight, moment, pattern="2:4")
    assert not np.asarray(dense(joint))[np.asarray(pruned) == 0].any()
    afterwards = error(weight, coordinate(pruned, moment, **INT4), moment)
    assert error(weight, joint, moment) == pytest.approx(afterwards, rel=1e-3)
    greedy = sparsegpt(weight, moment, pattern="2:4", **INT4)
    assert error(weight, joint, moment) < 0.9 * error(weight, greedy, moment)
    packed = kronecker(weight, moment, pattern="2:4", store="sparse", **INT4)
    np.testing.assert_array_equal(dense(packed), dense(joint))
    # Two codes of four bits and their places in every run of four, and a scale for every group.
    assert packed.nbytes * 8 / packed.size == pytest.approx(3 + 16 / 32, abs=0.01)


# --------------------------------------------------------------------------- on whole models

IDS = np.random.default_rng(0).integers(0, 40, (6, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    config = DecoderConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return build_model(config)


def assert_sparse_and_of_4_bits(model):
    leaves = dict(leaves_with_paths(model.params))
    for path in linear_paths(model):
        assert leaves[path].bits == 4, path
        assert (runs(np.asarray(dense(leaves[path])).T) <= 2).all(), path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsegpt+gptaq", "kronecker", "kronecker+coordinate"])
def test_every_way_is_2_of_4_and_of_4_bits(model, method):
    small = jc.compress(model, method, calibration=IDS, pattern="2:4", **INT4)
    assert_sparse_and_of_4_bits(small)


def test_in_a_chain_the_second_link_rounds(model):
    numbers = {"pattern": "2:4", "calibration": IDS}
    chain = jc.compress(model, "sparsegpt+gptq", **numbers, **INT4)
    assert_sparse_and_of_4_bits(chain)
    sparse = jc.compress(model, "sparsegpt", **numbers)
    alone = jc.compress(sparse, "gptq", calibration=IDS, **INT4)
    for (path, found), (_, want) in zip(
        leaves_with_paths(chain.params), leaves_with_paths(alone.params), strict=True
    ):
        np.testing.assert_array_equal(found, want, path)
