"""Ranges of activations against NumPy on the raw values, and against NVIDIA's loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress.core.errors import InputError
from jaxcompress.core.readers.capture import capture, combine
from jaxcompress.core.readers.statistics import EXPONENT_BIAS, STATISTICS, VALUE_BINS
from jaxcompress.layerwise.observe import ACTIVATIONS
from jaxcompress.quantization.observers import (
    Seen,
    _divergences,
    entropy_range,
    mse_range,
    nearest,
    observed_range,
)


def stream(seed=0, parts=5, rows=40, features=24):
    """Batches of values of growing and shrinking size, skewed, with heavy tails."""
    rng = np.random.default_rng(seed)
    sizes = [0.3, 5.0, 0.01, 40.0, 2.0][:parts]
    return [
        (rng.standard_t(4, size=(rows, features)) * s + s / 2).astype(np.float32) for s in sizes
    ]


def statistics_of(batches, names=("extremes", "values")):
    """As the walk gathers them: batch after batch, jitted."""
    made = {}
    for name in names:
        statistic = ACTIVATIONS[name]
        compute, merge = jax.jit(statistic.compute), jax.jit(statistic.combine)
        parts = [compute(jnp.asarray(x), jnp.ones(x.shape[:-1])) for x in batches]
        total = jax.tree.map(jnp.zeros_like, parts[0])
        for part in parts:
            total = merge(total, part)
        made[name] = jax.device_get(total)
    return made


def seen_of(batches):
    return Seen(statistics_of(batches))


# ------------------------------------------------------------------------------- the histogram


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 0, 4, 1, 2), (2, 4, 0, 1, 3)])
def test_a_stream_gives_the_histogram_of_all_values_together(order):
    batches = stream()
    found = statistics_of([batches[i] for i in order])["values"]
    raw = np.concatenate([x.ravel() for x in batches]).astype(np.float64)
    exponent = int(np.floor(np.log2(np.abs(raw).max()))) + 1
    assert int(found["exponent"]) == exponent + EXPONENT_BIAS
    want, edges = np.histogram(raw, VALUE_BINS, (-(2.0**exponent), 2.0**exponent))
    np.testing.assert_array_equal(found["counts"], want)
    np.testing.assert_array_equal(Seen(statistics_of(batches)).edges, edges)


def test_rows_of_no_weight_and_empty_batches_do_not_count():
    x, statistic = stream()[0], STATISTICS["values"]
    weight = np.zeros(40, np.float32)
    weight[:7] = 1
    some = statistic.compute(jnp.asarray(x), jnp.asarray(weight))
    only = statistic.compute(jnp.asarray(x[:7]), jnp.ones(7))
    jax.tree.map(np.testing.assert_array_equal, some, only)
    nothing = statistic.compute(jnp.asarray(x), jnp.zeros(40))
    jax.tree.map(np.testing.assert_array_equal, statistic.combine(nothing, only), only)
    ends = STATISTICS["extremes"]
    both = ends.combine(
        ends.compute(jnp.asarray(x), jnp.zeros(40)), ends.compute(jnp.asarray(x), jnp.ones(40))
    )
    assert (both["low"], both["high"], both["batches"]) == (x.min(), x.max(), 1)


def test_magnitudes_span_more_numbers_than_there_are_levels():
    for seed in range(5):
        x = stream(seed, parts=1)[0]
        counts, width = seen_of([x]).magnitudes()
        assert VALUE_BINS // 4 < len(counts) <= VALUE_BINS // 2
        assert (len(counts) - 1) * width <= np.abs(x).max() < len(counts) * width


# ----------------------------------------------------------------------------- where it is taken


def layers(params, x):
    def step(hidden, w):
        h = hidden @ w
        return h / (1 + jnp.abs(h)), None

    return jax.lax.scan(step, x, params["w"])[0] @ params["out"]


@pytest.fixture(scope="module")
def layered():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 24, 24)) / 5, "out": rng.normal(size=(24, 4))}
    return jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)


def test_captured_in_a_scan_and_over_batches(layered):
    names = ["values", "extremes"]
    run = jax.jit(capture(layers, names))
    batches = stream(parts=2, rows=16)
    found = combine(*(run(layered, x) for x in batches))
    hidden = np.concatenate(batches)
    for i in range(3):
        counts = found["w", 0]["values"]["counts"][i]
        exponent = int(found["w", 0]["values"]["exponent"][i]) - EXPONENT_BIAS
        edges = (-(2.0**exponent), 2.0**exponent)
        want = np.histogram(hidden.astype(np.float64), VALUE_BINS, edges)[0]
        # Products differ in the last place; almost no value lies so near an edge.
        assert np.abs(np.asarray(counts) - want).sum() <= (0 if i == 0 else 0.02 * hidden.size)
        assert np.allclose(found["w", 0]["extremes"]["high"][i], hidden.max(), rtol=1e-5)
        hidden = hidden @ np.asarray(layered["w"][i])
        hidden = hidden / (1 + np.abs(hidden))


def test_on_a_mesh_it_is_the_histogram_of_one_device(layered):
    x = stream(parts=1, rows=16)[0]
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    run = jax.jit(capture(layers, ["values", "extremes"]))
    spread = jax.device_put(x, NamedSharding(mesh, P("data")))
    alone, over_all = run(layered, x), run(layered, spread)
    first = jax.tree.map(lambda v: np.asarray(v[0]), (alone["w", 0], over_all["w", 0]))
    jax.tree.map(np.testing.assert_array_equal, *first)

    def by_hand(params, x):
        return jax.shard_map(
            lambda x: x @ params["out"], mesh=mesh, in_specs=P("data"), out_specs=P("data")
        )(x)

    inside = jax.jit(capture(by_hand, ["values", "extremes"]))(layered, x)["out", 0]
    want = statistics_of([x])
    jax.tree.map(np.testing.assert_array_equal, inside["values"], want["values"])
    assert inside["extremes"]["low"] == x.min()
    assert inside["extremes"]["high"] == x.max()


# -------------------------------------------------------------------------------- the observers


def test_minmax_and_moving_averages_are_those_of_pytorch():
    from torch.ao.quantization.observer import MinMaxObserver, MovingAverageMinMaxObserver

    batches = stream()
    for name, theirs in (("minmax", MinMaxObserver()), ("moving", MovingAverageMinMaxObserver())):
        for x in batches:
            theirs(torch.tensor(x))
        low, high = observed_range(statistics_of(batches), name)
        np.testing.assert_allclose(low, theirs.min_val.numpy(), rtol=1e-5)
        np.testing.assert_allclose(high, theirs.max_val.numpy(), rtol=1e-5)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_percentiles_are_within_a_bin_of_the_raw_values(percentile):
    batches = stream()
    raw = np.concatenate([x.ravel() for x in batches]).astype(np.float64)
    found, width = statistics_of(batches), np.diff(seen_of(batches).edges)[0]

    def holds(values, top, share):
        """Whether a share of the values is at most `top`, but for those of one bin."""
        wanted = share * len(values) / 100
        return np.sum(values < top - width) <= wanted + 1e-6 <= np.sum(values <= top + width) + 1e-5

    low, high = observed_range(found, "percentile", percentile=percentile)
    assert holds(np.abs(raw), max(-low, high), percentile)
    low, high = observed_range(found, "percentile", symmetric=False, percentile=percentile)
    assert holds(raw, low, 100 - percentile)
    assert holds(raw, high, percentile)
    assert raw.min() <= low < high <= raw.max()


def nvidias_divergence(bins, kept, levels):
    """One step of the loop in NVIDIA's calibrators, written out."""
    bins = bins.copy()
    space = np.linspace(0, kept, levels + 1)
    digitized = np.digitize(range(kept), space) - 1
    digitized[bins[:kept] == 0] = -1
    density = np.zeros(levels)
    members = np.zeros(levels)
    for bin_, level in enumerate(digitized):
        if level != -1:
            density[level] += bins[bin_]
            members[level] += 1
    spread = np.zeros(kept)
    for bin_, level in enumerate(digitized):
        if level != -1:
            spread[bin_] = density[level] / members[level]
    reference = bins[:kept].copy()
    reference[-1] += bins[kept:].sum()
    return scipy.stats.entropy(reference, spread)


@pytest.mark.parametrize("levels", [8, 128])
def test_entropies_are_those_of_nvidias_loop(levels):
    counts, _ = seen_of(stream(3)).magnitudes()
    counts[0] = counts[1]
    kept = np.unique(np.linspace(max(levels, 128), len(counts), 40).astype(int))
    kept = np.union1d(kept, np.flatnonzero(counts[128:160]) + 129)
    want = [nvidias_divergence(counts, int(i), levels) for i in kept]
    np.testing.assert_allclose(_divergences(counts, kept, levels), want, rtol=1e-9, atol=1e-12)


def test_entropy_clips_a_long_tail_and_keeps_a_short_one():
    rng = np.random.default_rng(0)
    bulk = rng.normal(size=(400, 256)).astype(np.float32)
    tailed = bulk.copy()
    tailed[0, :4] = 60.0
    low, high = entropy_range(seen_of([tailed]), "int8")
    assert 3.0 < high < 15.0
    assert low == max(-high, bulk.min())
    flat = rng.uniform(-1, 1, size=(400, 256)).astype(np.float32)
    assert entropy_range(seen_of([flat]), "int8")[1] > 0.98


@pytest.mark.parametrize(
    ("name", "symmetric"), [("int8", True), ("int4", True), ("int4", False), ("fp8", True)]
)
def test_the_least_error_of_the_histogram_is_that_of_the_raw_values(name, symmetric):
    raw = np.concatenate([x.ravel() for x in stream(1)]).astype(np.float64)
    low, high = mse_range(seen_of(stream(1)), name, symmetric)

    def error(low, high):
        return np.square(raw - nearest(raw, low, high, name, symmetric)).sum()

    best = min(error(raw.min() * s / 200, raw.max() * s / 200) for s in range(1, 201))
    assert error(low, high) <= 1.01 * best
    if name == "int4":
        assert error(low, high) < 0.8 * error(raw.min(), raw.max())


def test_every_layer_of_a_stack_has_its_own():
    batches = [np.stack([x, 3 * x, 0 * x]) for x in stream()]
    for observer in ("minmax", "moving", "percentile", "entropy", "mse"):
        low, high = observed_range(statistics_of(batches), observer)
        one = observed_range(statistics_of(stream()), observer)
        assert low.shape == high.shape == (3,)
        np.testing.assert_allclose((low[0], high[0]), one, rtol=1e-6)
        if observer in ("minmax", "moving"):
            np.testing.assert_allclose((low[1], high[1]), np.multiply(one, 3), rtol=1e-5)
        assert low[2] == high[2] == 0


def test_refusals():
    found = statistics_of(stream())
    with pytest.raises(InputError, match="activation_range 'max': use one of minmax, moving"):
        observed_range(found, "max")
    with pytest.raises(InputError, match=r"activation_percentile 20: must lie in \(50, 100\]"):
        observed_range(found, "percentile", percentile=20)
    with pytest.raises(InputError, match="entropy: fp8 has no equal levels; use mse"):
        observed_range(found, "entropy", input_dtype="fp8")
    nothing = jax.tree.map(np.zeros_like, found)
    with pytest.raises(InputError, match="no calibration data reached a matrix"):
        observed_range(nothing, "minmax")
