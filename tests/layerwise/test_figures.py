"""What is told of single matrices: errors, damping, saturation, and what went wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.core.method import Method
from jaxcompress.layerwise.figures import collecting, of_result, plain, record, warnings
from jaxcompress.layerwise.journal import Journal
from jaxcompress.layerwise.problem import Problem
from jaxcompress.layerwise.run import Run
from jaxcompress.quantization.coordinate import coordinate
from jaxcompress.quantization.gptq import gptq
from jaxcompress.quantization.rtn import rtn

OPTIONS = {"bits": 3, "group_size": 16}


def problem(seed=0, rows=8, columns=32):
    x = np.random.default_rng(seed).standard_normal((200, columns)).astype(np.float32)
    weight = np.random.default_rng(seed + 1).standard_normal((rows, columns)).astype(np.float32)
    return jnp.asarray(weight), jnp.asarray(x.T @ x)


def told_of(function, weight, moment):
    run = Run(Method(function, produces="quantized"), OPTIONS)
    leaf = run(Problem("up", weight, {"second_moment": moment}))
    return run, leaf


@pytest.mark.parametrize(("function", "scale_bits"), [(gptq, 0), (coordinate, 16)])
def test_losses_are_those_of_float64(function, scale_bits):
    weight, moment = problem()
    run, leaf = told_of(function, weight, moment)
    w, h = np.asarray(weight, np.float64), np.asarray(moment, np.float64)
    whole = np.einsum("nk,kl,nl->", w, h, w)
    nearest = rtn(weight, scale_bits=scale_bits, **OPTIONS)
    for name, other in (("loss_nearest", nearest), ("loss", leaf)):
        change = np.asarray(other.dense(), np.float64) - w
        expected = np.einsum("nk,kl,nl->", change, h, change) / whole
        np.testing.assert_allclose(run.told["up"][name], expected, rtol=1e-3)
    assert run.told["up"]["loss"] < run.told["up"]["loss_nearest"]


def test_saturation_counts_the_codes_at_both_ends():
    weight, _ = problem()
    leaf = rtn(weight, **OPTIONS)
    codes = np.asarray(leaf.integers())
    expected = np.isin(codes, (0, 7)).mean()
    np.testing.assert_allclose(plain(of_result(leaf))["saturation"], expected, rtol=1e-6)


def test_zero_scales_are_named():
    weight, _ = problem()
    leaf = rtn(weight, **OPTIONS)
    broken = leaf.replace(scale=leaf.scale.at[0, 0].set(0).at[1, 1].set(jnp.nan))
    told = plain(of_result(broken))
    assert told["bad_scales"] == 2
    assert warnings("up", told) == ["up: 2 scales are 0 or not finite"]
    assert not warnings("up", plain(of_result(leaf)))


@pytest.mark.parametrize(("function", "scale_bits"), [(gptq, 0), (coordinate, 16)])
def test_a_moment_that_is_not_finite_means_rounding_to_nearest(function, scale_bits):
    weight, moment = problem()
    run, leaf = told_of(function, weight, moment.at[3, 3].set(jnp.nan))
    expected = rtn(weight, scale_bits=scale_bits, **OPTIONS)
    np.testing.assert_array_equal(leaf.dense(), expected.dense())
    assert run.told["up"]["fallback"] == 1
    (line,) = run.notes
    assert line == "up: its second moment is not finite; rounded to nearest instead"


def test_damping_that_had_to_grow_is_told():
    rows = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    weight, _ = problem()
    run = Run(Method(gptq, produces="quantized"), {**OPTIONS, "damp": 1e-12})
    run(Problem("up", weight, {"second_moment": jnp.asarray(rows.T @ rows)}))
    assert run.told["up"]["damp"] > 1e-12
    assert run.notes[0].startswith("up: damp ")


def test_nobody_listens_and_nothing_is_traced():
    record(loss=1.0)
    with collecting() as told:
        jax.jit(lambda x: record(loss=x))(1.0)
        record(damp=2.0)
    assert told == {"damp": 2.0}


def test_stacked_matrices_of_a_batch_have_their_own():
    told = {"loss": np.array([0.1, 0.3]), "bad_scales": np.array([0, 2])}
    assert plain(told, 1) == {"loss": 0.3, "bad_scales": 2.0}
    assert plain(told) == {"loss": pytest.approx(0.2), "bad_scales": 2.0}


def test_a_journal_keeps_them(tmp_path):
    first = Journal(tmp_path / "kept")
    first.put("up", jnp.ones((2, 2)), 1.5, loss=0.25)
    first.flush()
    assert Journal(tmp_path / "kept").told == {"up": {"seconds": 1.5, "loss": 0.25}}
