"""The search for a better mask: against all masks, and against its steps in NumPy float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import solver_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.core.errors import InputError
from jaxcompress.layerwise import refine, refit, solve, squared_error


def started(seed, rows, columns, pattern, **options):
    """A problem with the greedy solution: `(weight, start, mask, moment)`."""
    weight, moment = map(jnp.asarray, oracle.problem(seed, rows, columns, **options))
    start = solve(weight, moment, **pattern)
    return weight, start.weight, start.mask, moment


def gradients(seed, rows):
    spread = np.random.default_rng(seed).standard_normal((rows, 3 * rows)).astype(np.float32)
    spread *= np.linspace(0.2, 2, rows, dtype=np.float32)[:, None]
    return jnp.asarray(spread @ spread.T)


def least(weight, mask, moment, output_moment):
    """The least error under a mask, by the normal equations of all kept entries."""
    curvature = np.kron(np.asarray(output_moment, np.float64), np.asarray(moment, np.float64))
    kept = np.asarray(mask).ravel()
    wanted = np.asarray(weight, np.float64).ravel()
    best = np.zeros_like(wanted)
    normal = curvature[np.ix_(kept, kept)]
    best[kept] = np.linalg.solve(normal, curvature[kept] @ wanted)
    return float((best - wanted) @ curvature @ (best - wanted))


def test_comes_near_to_the_best_of_all_masks():
    rows, columns = 48, 8
    weight, start, mask, moment = started(0, rows, columns, {"n_m": (2, 4)})
    halves = [np.isin(range(4), kept) for kept in itertools.combinations(range(4), 2)]
    masks = [np.concatenate(pair) for pair in itertools.product(halves, repeat=2)]
    one = np.ones((1, 1))
    best = sum(min(least(row, m, moment, one) for m in masks) for row in np.asarray(weight))
    greedy = float(refit(weight, start, mask, moment).after.sum())
    found = refine(weight, start, mask, moment, n_m=(2, 4))
    assert best * (1 - 1e-4) < float(found.after) < best + 0.3 * (greedy - best)


@pytest.mark.parametrize("with_outputs", [False, True])
@pytest.mark.parametrize("pattern", [{"n_m": (2, 4)}, {"sparsity": 0.5}], ids=str)
def test_beats_the_refitted_greedy_mask(pattern, with_outputs):
    weight, start, mask, moment = started(1, 24, 64, pattern)
    outputs = gradients(0, 24) if with_outputs else None
    found = refine(weight, start, mask, moment, outputs, n_m=pattern.get("n_m"))
    assert int(found.mask.sum()) == int(mask.sum())
    assert not np.asarray(found.weight)[~np.asarray(found.mask)].any()
    if "n_m" in pattern:
        assert (np.asarray(found.mask).reshape(24, -1, 4).sum(-1) == 2).all()
    # `after` is measured with the damped moment of the outputs.
    measured = None
    if with_outputs:
        measured = outputs + 0.1 * jnp.mean(jnp.diagonal(outputs)) * jnp.eye(24)
    greedy = refit(weight, start, mask, moment, measured, iterations=50)
    after = float(squared_error(weight, found.weight, moment, measured).sum())
    assert after == pytest.approx(float(found.after), rel=1e-3)
    assert after < 0.95 * float(greedy.after.sum()) < 0.95 * float(found.before)


@settings(max_examples=4)
@given(st.integers(1, 8), st.integers(1, 40), st.floats(0.05, 0.95), st.integers(0, 99))
def test_never_makes_it_worse_and_keeps_the_count(rows, columns, sparsity, seed):
    weight, start, mask, moment = started(
        seed, rows, columns, {"sparsity": sparsity}, tokens=max(columns // 2, 1)
    )
    found = refine(weight, start, mask, moment, iterations=5)
    assert int(found.mask.sum()) == int(mask.sum())
    before, after = (oracle.error(weight, q, moment) for q in (start, found.weight))
    assert after <= before * (1 + 1e-5) + 1e-7 * oracle.error(weight, 0, moment)


def alternate(weight, moment, output_moment, count, iterations, damp=0.01, output_damp=0.1):
    """The method's steps on the whole Kronecker product: the mask at the end."""
    damped = []
    for m, d in ((output_moment, output_damp), (moment, damp)):
        m = np.asarray(m, np.float64)
        m = m + d * np.diag(m).mean() * np.eye(len(m))
        damped.append((m / np.sqrt(np.outer(np.diag(m), np.diag(m))), np.sqrt(np.diag(m))))
    curvature = np.kron(damped[0][0], damped[1][0])
    wanted = (np.asarray(weight, np.float64) * np.outer(damped[0][1], damped[1][1])).ravel()

    def project(x):
        mask = np.ones(x.size, bool)
        mask[np.argsort(np.abs(x), kind="stable")[:count]] = False
        return np.where(mask, x, 0), mask

    sparse, mask = project(wanted)
    dual, rho = np.zeros_like(wanted), 0.1
    for _ in range(iterations):
        full = np.linalg.solve(
            curvature + rho * np.eye(len(curvature)),
            curvature @ wanted + rho * sparse - dual,
        )
        sparse, mask = project(full + dual / rho)
        dual = dual + rho * (full - sparse)
        rho *= 240 ** (1 / iterations)
    return mask.reshape(weight.shape)


@pytest.mark.parametrize("with_outputs", [False, True])
def test_the_steps_are_those_of_alternating_directions(with_outputs):
    weight, start, mask, moment = started(2, 6, 24, {"sparsity": 0.5})
    outputs = gradients(1, 6) if with_outputs else None
    found = refine(weight, start, mask, moment, outputs, iterations=20)
    outputs = np.eye(6) if outputs is None else outputs
    want = alternate(weight, moment, outputs, 72, 20, output_damp=0.1 if with_outputs else 0)
    assert np.mean(np.asarray(found.mask) != want) <= 2 / 144


def test_a_singular_moment_with_dead_inputs_does():
    pattern = {"n_m": (2, 4)}
    weight, start, mask, moment = started(3, 16, 64, pattern, dead=6, tokens=30)
    found = refine(weight, start, mask, moment, jnp.zeros((16, 16)), **pattern)
    assert np.isfinite(np.asarray(found.weight)).all()
    assert oracle.error(weight, found.weight, moment) < oracle.error(weight, start, moment)


def test_a_batch_is_refined_as_each_alone():
    problems = [started(seed, 8, 32, {"sparsity": 0.4}) for seed in range(3)]
    stacked = [jnp.stack(parts) for parts in zip(*problems)]
    together = jax.vmap(refine)(*stacked)
    alone = [refine(*each) for each in problems]
    assert np.mean(np.asarray(together.mask) != np.stack([a.mask for a in alone])) < 0.02
    after = np.array([float(a.after) for a in alone])
    np.testing.assert_allclose(np.asarray(together.after), after, rtol=0.02)


def test_runs_that_do_not_divide_get_one_line():
    with pytest.raises(InputError, match="does not divide"):
        refine(*started(0, 2, 6, {"sparsity": 0.5}), n_m=(2, 4))
