"""Sensitivities against NumPy: divergences, Fisher, exact Hessians; and what comes of them."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.layerwise import output_moments
from jaxcompress.layerwise.calibrate import Calibration
from jaxcompress.models import with_scan_layers
from jaxcompress.quantization.candidates import Candidate, Trials
from jaxcompress.quantization.curvature import hessian_traces
from jaxcompress.quantization.latency import measure_latency
from jaxcompress.quantization.sensitivity import sensitivities, shared_inputs

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 300, (6, 24)).astype(np.int32)
TWO, FOUR = {"bits": 2, "group_size": 16}, {"bits": 4, "group_size": 16}
BLOCK = "layers/{}/attn/q_proj/kernel"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return jc.load(tiny.write_llama(tmp_path_factory.mktemp("llama"), layers=2))


def leaf(model, path):
    return np.asarray(dict(leaves_with_paths(model.params))[path])


def rounded(kernel, bits, group):
    """An `[in, out]` kernel on symmetric integers, groups along the inputs."""
    grouped = kernel.T.reshape(kernel.shape[1], -1, group)
    scale = np.abs(grouped).max(-1, keepdims=True) / np.float32((2**bits - 1) / 2)
    codes = np.clip(np.round(grouped / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scale).reshape(kernel.T.shape).T


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(model, path, kernel, inputs):
    """KL(dense || replaced) in float64, mean over the predictions."""
    params = map_with_paths(lambda p, x: jnp.asarray(kernel) if p == path else x, model.params)
    dense, other = log_softmax(model(inputs)), log_softmax(model.apply(params, inputs))
    return (np.exp(dense) * (dense - other)).sum(-1).mean()


def plain(model):
    return model.replace(blocks=None)


@pytest.mark.parametrize("form", ["blocks", "plain", "chunked"])
def test_kl_is_that_of_numpy(llama, form, monkeypatch):
    paths = [BLOCK.format(1), "embed/embedding", BLOCK.format(0), "lm_head/kernel"]
    if form == "chunked":  # of samples and of positions, both with a rest
        monkeypatch.setattr("jaxcompress.quantization.divergence.TOKENS_TOGETHER", 50)
        monkeypatch.setattr("jaxcompress.core.losses.sum_over_chunks.__kwdefaults__", {"chunk": 7})
    model = plain(llama) if form == "plain" else llama
    found = sensitivities(model, [TWO, FOUR], calibration=IDS, paths=paths)
    assert found.paths == tuple(paths)
    for row, path in enumerate(paths):
        for column, options in enumerate((TWO, FOUR)):
            kernel = leaf(llama, path)
            is_table = path.startswith("embed")  # whose features are contracted
            args = options["bits"], options["group_size"]
            kernel = rounded(kernel.T, *args).T if is_table else rounded(kernel, *args)
            want = divergence(llama, path, kernel, IDS)
            np.testing.assert_allclose(found.costs[row, column], want, rtol=2e-3, err_msg=path)


def test_a_stacked_parameter_is_one(llama):
    stacked = with_scan_layers(llama, True)
    path = "layers/attn/q_proj/kernel"
    found = sensitivities(stacked, [TWO], calibration=IDS, paths=[path])
    kernel = np.stack([rounded(layer, 2, 16) for layer in leaf(stacked, path)])
    np.testing.assert_allclose(found.costs, divergence(stacked, path, kernel, IDS), rtol=2e-3)
    asked = {"calibration": IDS, "by": "kronecker"}
    both = sensitivities(llama, [TWO], paths=[BLOCK.format(0), BLOCK.format(1)], **asked)
    together = sensitivities(stacked, [TWO], paths=[path], **asked)
    np.testing.assert_allclose(together.costs[0, 0], both.costs.sum(), rtol=1e-3)


def test_output_error_is_that_of_numpy(llama):
    encoder = llama.replace(config=SimpleNamespace(gives_logits=False))
    with pytest.raises(InputError, match="use by='output_error'"):
        sensitivities(encoder, [TWO], calibration=IDS, paths=[BLOCK.format(1)])
    found = sensitivities(
        encoder, [TWO], calibration=IDS, paths=[BLOCK.format(1)], by="output_error"
    )
    kernel = jnp.asarray(rounded(leaf(llama, BLOCK.format(1)), 2, 16))
    params = map_with_paths(lambda p, x: kernel if p == BLOCK.format(1) else x, llama.params)
    dense, other = np.asarray(llama(IDS)), np.asarray(llama.apply(params, IDS))
    np.testing.assert_allclose(
        found.costs, np.square(other - dense).sum() / np.square(dense).sum(), rtol=1e-3
    )


# --------------------------------------------------- curvature, against exact ones of small models


def bigram():
    """Logits of the next token from a fixed table and a kernel; the table, and some ids."""
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.standard_normal((12, 8)), jnp.float32)
    kernel = jnp.asarray(0.4 * rng.standard_normal((8, 12)), jnp.float32)
    model = jc.Model(lambda params, ids: table[ids] @ params["kernel"], {"kernel": kernel})
    return model, table, rng.integers(0, 12, (8, 9))


def test_fisher_is_that_of_numpy():
    model, table, ids = bigram()
    kernel = np.asarray(model.params["kernel"])
    squares = np.zeros_like(kernel)
    for sequence in ids:
        x, labels = np.asarray(table, np.float64)[sequence[:-1]], sequence[1:]
        error = np.exp(log_softmax(x @ kernel)) - np.eye(12)[labels]
        squares += np.square(x.T @ error / len(labels)) / len(ids)
    change = rounded(kernel, 3, 4) - kernel
    found = sensitivities(
        model, [{"bits": 3, "group_size": 4}], calibration=ids, paths=["kernel"], by="fisher"
    )
    want = 8 * (squares * change**2).sum() / 2  # of 8 independent predictions in a sequence
    np.testing.assert_allclose(found.costs, want, rtol=1e-4)


def classifier():
    """A network of two kernels in float64, 16 weights, with images and labels."""
    rng = np.random.default_rng(2)
    params = {
        "first": jnp.asarray(rng.standard_normal((3, 2))),
        "second": jnp.asarray(rng.standard_normal((2, 5))),
    }
    model = jc.Model(lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"], params)
    images = rng.standard_normal((8, 3))
    return model, (images, np.asarray(model(images)).argmax(-1))


def test_hessian_traces_are_hutchinsons():
    """Mean and variance of the estimate from the exact Hessian, over all 2^16 directions."""
    with jax.enable_x64(True):
        model, (images, labels) = classifier()
        flat, back = jax.flatten_util.ravel_pytree(model.params)

        def loss(flat):
            logp = jax.nn.log_softmax(model.apply(back(flat), images))
            return -jnp.take_along_axis(logp, labels[:, None], 1).mean()

        hessian = np.asarray(jax.hessian(loss)(flat))
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=16)))
        products = signs * (signs @ hessian)
        data = Calibration((images,), labels)
        trials = Trials.of(model, [TWO], data.inputs, ["first", "second"])
        found = hessian_traces(trials, data, probes=100, seed=3)
        for path, part in (("first", slice(0, 6)), ("second", slice(6, 16))):
            draws = products[:, part].sum(1)
            trace = np.trace(hessian[part, part])
            np.testing.assert_allclose(draws.mean(), trace, rtol=1e-9)
            spread = draws.std() / np.sqrt(100)
            assert abs(found[path] - trace) < 3.5 * spread
            assert spread < 0.2 * abs(trace)


def test_hessian_cost_is_trace_times_error():
    model, _, ids = bigram()
    trials = Trials.of(model, [{"bits": 3, "group_size": 4}], (ids,), ["kernel"])
    trace = hessian_traces(trials, Calibration((ids,)), probes=2, seed=1)["kernel"]
    assert trace > 0
    asked = {"paths": ["kernel"], "by": "hessian_trace", "probes": 2, "seed": 1}
    found = sensitivities(model, trials.candidates, calibration=ids, **asked)
    kernel = np.asarray(model.params["kernel"])
    error = np.square(rounded(kernel, 3, 4) - kernel).sum()
    np.testing.assert_allclose(found.costs, trace / kernel.size * error / 2, rtol=1e-4)


def test_kronecker_is_that_of_numpy():
    model, table, ids = bigram()
    x = np.asarray(table, np.float64)[ids].reshape(-1, 8)
    batches = Calibration((ids,)).batches()
    output = np.asarray(output_moments(model, ["kernel"], batches, seed=5)["kernel"], np.float64)
    kernel = np.asarray(model.params["kernel"])
    change = (rounded(kernel, 3, 4) - kernel).T
    want = np.trace(output @ change @ x.T @ x @ change.T) / 2 / len(x) ** 2
    asked = {"paths": ["kernel"], "by": "kronecker", "seed": 5}
    found = sensitivities(model, [{"bits": 3, "group_size": 4}], calibration=ids, **asked)
    np.testing.assert_allclose(found.costs, want, rtol=1e-4)
    # And what it estimates: the divergence of one matrix's small change.
    fine = [{"bits": 6, "group_size": 4}]
    estimate = sensitivities(model, fine, calibration=ids, **asked).costs[0, 0]
    kl = divergence(model, "kernel", rounded(kernel, 6, 4), ids)
    assert 0.5 * kl < estimate < 2 * kl


@pytest.mark.parametrize("by", ["fisher", "kronecker"])  # the trace of random weights may be < 0
def test_estimates_order_as_the_divergence(llama, by):
    paths = [p for p, x in leaves_with_paths(llama.params) if p.startswith("layers") and x.ndim > 1]
    measured = sensitivities(llama, [FOUR], calibration=IDS, paths=paths)
    found = sensitivities(llama, [FOUR], calibration=IDS, paths=paths, by=by)
    logs = np.log(measured.costs[:, 0]), np.log(found.costs[:, 0])
    assert np.corrcoef(*logs)[0, 1] > 0.5


# ------------------------------------------------------------------------------ the rest of a table


def test_sizes_are_those_of_the_stored(llama):
    formats = [FOUR, {"dtype": "mxfp4"}, {"bits": 3, "group_size": 48}, "dense"]
    found = sensitivities(llama, formats, calibration=IDS, by="fisher")
    assert [c.name for c in found.candidates] == ["int4 g16", "mxfp4", "int3 g48", "dense"]
    assert np.isinf(found.costs[:, 2]).all()  # 48 divides no width here
    assert (found.costs[:, 3] == 0).all()
    for column, options in enumerate(formats[:2]):
        small = jc.compress(llama, "rtn", **options)
        for row, path in enumerate(found.paths):
            stored = dict(leaves_with_paths(small.params))[path]
            assert found.bytes[row, column] == stored.nbytes
    entries = [leaf(llama, path).size for path in found.paths]
    np.testing.assert_array_equal(found.entries, entries)
    np.testing.assert_array_equal(found.bytes[:, 3], 4 * np.array(entries))


@pytest.mark.parametrize("form", ["blocks", "stacked", "plain", "stranger"])
def test_groups_are_what_reads_the_same_values(llama, form):
    stacked = with_scan_layers(llama, True)
    model = {"blocks": llama, "stacked": stacked, "plain": plain(llama), "stranger": plain(stacked)}
    model = model[form]
    paths = [p for p, x in leaves_with_paths(model.params) if "kernel" in p or "embed" in p]
    found = shared_inputs(model, paths, [IDS])
    assert sorted(p for group in found for p in group) == sorted(paths)
    together = {frozenset(p.split("/")[-2] for p in group) for group in found}
    assert frozenset({"q_proj", "k_proj", "v_proj"}) in together
    assert frozenset({"gate_proj", "up_proj"}) in together
    assert frozenset({"down_proj"}) in together
    assert max(len(group) for group in found) == 3


def test_a_mesh_gives_the_same(llama):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def spread(x):
        axes = ("data", "fsdp") if x.ndim == 2 else (None,)
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))

    split = llama.replace(params=jax.tree.map(spread, llama.params))
    path = BLOCK.format(1)
    alone, both = (sensitivities(m, [TWO], calibration=IDS, paths=[path]) for m in (llama, split))
    np.testing.assert_allclose(alone.costs, both.costs, rtol=2e-3)


def test_refuses(llama):
    def ask(candidates=(TWO,), **options):
        sensitivities(llama, candidates, calibration=IDS, **options)

    with pytest.raises(InputError, match="candidate 'int4': give options"):
        ask(["int4"])
    with pytest.raises(InputError, match="each once"):
        ask([TWO, TWO])
    with pytest.raises(InputError, match="dtype 'int4x'"):
        ask([{"dtype": "int4x"}])
    with pytest.raises(InputError, match="no such parameter"):
        ask(paths=["layers/9/kernel"])
    with pytest.raises(InputError, match="by 'loss': use kl"):
        ask(by="loss")
    with pytest.raises(InputError, match="probes 0"):
        ask(by="hessian_trace", probes=0)


def test_names_tell_candidates_apart():
    given = [TWO, {}, {"bits": 8, "group_size": -1}, {"bits": 4, "symmetric": False}, "dense"]
    names = [Candidate.of(one).name for one in given]
    assert names == ["int2 g16", "int4 g128", "int8 rows", "int4 g128 asymmetric", "dense"]


def test_latency_is_positive_and_shared_by_equal_shapes(llama):
    paths = [f"layers/0/attn/{name}_proj/kernel" for name in ("k", "v", "q")]
    formats = [FOUR, {"bits": 4, "group_size": 48}, "dense"]
    found = measure_latency(llama, formats, calibration=IDS, paths=paths, repeats=3)
    assert found.shape == (3, 3)
    assert np.isnan(found[:, 1]).all()
    assert (found[:, [0, 2]] > 0).all()
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0, 0] != found[2, 0]
