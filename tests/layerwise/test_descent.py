"""Descent on codes and scales: against NumPy float64, brute force, and what it must never do."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import solver_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.core.errors import InputError
from jaxcompress.layerwise import grid_of, on_grid, solve, squared_error
from jaxcompress.layerwise.descent import _rescale, damped, descend, search
from jaxcompress.layerwise.grid import parameters_of


def problem(seed, rows, columns, **options):
    return tuple(map(jnp.asarray, oracle.problem(seed, rows, columns, **options)))


def rounded(grid, weight):
    """Nearest values and their parameters."""
    parameters, share = parameters_of(grid, weight)
    return on_grid(grid, weight, parameters), parameters, share


def sweep_in_float64(weight, start, scale, zero, top, moment):
    """One pass of coordinate descent over the columns, a weight at a time."""
    weight, found, moment = (np.asarray(x, np.float64) for x in (weight, start, moment))
    found = found.copy()
    for i in range(weight.shape[1]):
        slope = (found - weight) @ moment[:, i]
        wanted = found[:, i] - slope / moment[i, i]
        codes = np.clip(np.round(wanted / scale + zero), 0, top)
        found[:, i] = (codes - zero) * scale
    return found


def test_one_sweep_is_that_of_numpy():
    weight, moment = problem(0, 24, 160)  # two panels, the second filled up
    grid = grid_of("int", bits=3, group_size=-1)
    start, parameters, _ = rounded(grid, weight)
    scale = np.asarray(parameters[0][:, 0], np.float64)
    wide = np.asarray(damped(moment, 0.01))
    expected = sweep_in_float64(weight, start, scale, 4, 7, wide)
    after = np.einsum("nk,kl,nl->n", d := expected - np.asarray(weight), wide, d)
    found = descend(weight, start, parameters, moment, grid=grid, rounds=1)
    # Least squares of the scale follows the sweep: never worse than the sweep alone.
    assert (np.asarray(found.after) <= after * (1 + 1e-3)).all()
    assert (np.asarray(found.after) < np.asarray(found.before)).all()


def test_comes_near_to_the_best_of_all_codes():
    weight, moment = problem(1, 32, 6)
    grid = grid_of("int", bits=2, group_size=-1)
    _, parameters, share = rounded(grid, weight)
    wide = np.asarray(damped(moment, 0.01), np.float64)
    scale = np.asarray(parameters[0], np.float64)
    codes = np.array(list(itertools.product(range(4), repeat=6))) - 2.0
    change = codes[None] * scale[:, None] - np.asarray(weight, np.float64)[:, None]
    best = np.einsum("rck,kl,rcl->rc", change, wide, change).min(1)
    found = search(weight, moment, (parameters, share), grid=grid, rounds=4)
    # Its scales are free, those of the brute force are not.
    assert float(found.after.sum()) < 1.1 * best.sum()


@pytest.mark.parametrize(
    "numbers",
    [
        {"dtype": "int", "bits": 4, "group_size": 32},
        {"dtype": "int", "bits": 3, "group_size": 32, "symmetric": False},
        {"dtype": "nf4", "group_size": 32},
        pytest.param({"dtype": "ternary", "group_size": 32}, marks=pytest.mark.slow),
        pytest.param({"dtype": "fp8", "group_size": -1}, marks=pytest.mark.slow),
        {"dtype": "mxfp4"},
        {"dtype": "nvfp4"},
    ],
    ids=str,
)
def test_improves_the_solver_on_any_grid_and_stays_on_it(numbers):
    weight, moment = problem(2, 48, 96)
    grid = grid_of(**numbers)
    known = parameters_of(grid, weight)
    greedy = solve(weight, moment, grid=grid, parameters=known, act_order=True)
    found = descend(weight, greedy.weight, greedy.parameters, moment, grid=grid)
    wide = damped(moment, 0.01)
    given = squared_error(weight, greedy.weight, wide)
    np.testing.assert_allclose(found.before, given, rtol=1e-4)
    assert (np.asarray(found.after) <= np.asarray(found.before)).all()
    assert float(found.after.sum()) < 0.99 * float(found.before.sum())
    np.testing.assert_allclose(
        found.after, squared_error(weight, found.weight, wide), rtol=2e-3, atol=1e-6
    )
    stored = grid.encode(found.weight, found.parameters, known[1])
    np.testing.assert_array_equal(stored.dense(), found.weight)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([(5, 32), (16, 64), (3, 136)]), st.integers(2, 5))
def test_never_worse_whatever_comes(seed, shape, bits):
    weight, moment = problem(seed, *shape)
    grid = grid_of("int", bits=bits, group_size=-1)
    _, parameters, _ = rounded(grid, weight)
    start = on_grid(grid, jax.random.normal(jax.random.key(seed), shape), parameters)
    found = descend(weight, start, parameters, moment, grid=grid, rounds=2)
    assert (np.asarray(found.after) <= np.asarray(found.before)).all()


def test_scales_are_the_least_squares_of_their_codes():
    """Codes that round to themselves: what is left to find is a scale for every group."""
    rows, columns, groups = 8, 64, 4
    grid = grid_of("int", bits=8, group_size=columns // groups)
    weight, moment = problem(3, rows, columns)
    start, parameters, _ = rounded(grid, weight)
    wide = np.asarray(damped(moment, 0.0), np.float64)
    # A target in which every group is a multiple of what lies on the grid.
    factors = 1 + 0.004 * np.random.default_rng(0).standard_normal((rows, groups))
    target = np.asarray(start, np.float64) * np.repeat(factors, columns // groups, 1)
    with jax.default_matmul_precision("highest"):
        found, scaled = _rescale(grid, jnp.float32(target), start, parameters, jnp.float32(wide))
    np.testing.assert_allclose(
        np.asarray(scaled[0]) / np.asarray(parameters[0]), factors, atol=2e-4
    )
    np.testing.assert_allclose(found, target, atol=1e-5)


def test_scales_below_zero_reach_a_step_further():
    """A row whose largest weight is positive: the mirrored grid holds 8 steps above zero."""
    weight = jnp.asarray([[8.0, -7.0, 3.0, 1.0] * 8])
    grid = grid_of("int", bits=4, group_size=-1)
    mirrored = grid.rescaled((jnp.ones((1, 1)), None), jnp.full((1, 1), -1.0))
    np.testing.assert_array_equal(on_grid(grid, weight, mirrored), weight)
    assert (on_grid(grid, weight, (jnp.ones((1, 1)), None)) != weight).any()


def test_dead_inputs_do_no_harm():
    weight, moment = problem(4, 16, 64)
    moment = moment.at[5].set(0).at[:, 5].set(0)
    grid = grid_of("int", bits=4, group_size=32)
    known = parameters_of(grid, weight)
    found = search(weight, moment, known, grid=grid)
    assert np.isfinite(np.asarray(found.weight)).all()
    assert (np.asarray(found.after) <= np.asarray(found.before)).all()


def test_given_parameters_need_a_static_grid():
    weight, moment = problem(5, 8, 32)
    grid = grid_of("int", bits=4, group_size=16, static=False)
    with pytest.raises(InputError, match="static"):
        solve(weight, moment, grid=grid, parameters=parameters_of(grid, weight))


def test_a_batch_on_a_mesh_holds_no_collective():
    program = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxcompress.layerwise import grid_of
from jaxcompress.layerwise.batch import split
from jaxcompress.layerwise.descent import search
from jaxcompress.layerwise.grid import parameters_of
grid = grid_of("int", bits=3, group_size=16)
class Solve:
    def __call__(self, w, h):
        return search(w, h, parameters_of(grid, w), grid=grid, rounds=2).weight
mesh = Mesh(np.array(jax.devices()), ("data",))
x = jax.random.normal(jax.random.key(0), (8, 100, 32))
h = jnp.einsum("btk,btl->bkl", x, x)
w = jax.random.normal(jax.random.key(1), (8, 24, 32))
solve = Solve()
put = partial(jax.device_put, device=NamedSharding(mesh, P("data")))
text = split.lower(solve, mesh, "data", put(w), put(h)).compile().as_text()
assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all", "permute"))
many = split(solve, mesh, "data", put(w), put(h))
np.testing.assert_array_equal(many, jnp.stack([solve(a, b) for a, b in zip(w, h)]))
"""
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
