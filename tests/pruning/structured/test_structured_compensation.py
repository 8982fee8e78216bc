"""What is made up for: exactly where that is possible, and always less error than before."""

import jax
import numpy as np
import pytest
import structured_cases as cases
from marks import slow_but

from jaxcompress.core.model import Model
from jaxcompress.core.readers.coupling import coupling
from jaxcompress.core.readers.cut import cut
from jaxcompress.pruning.structured import filters, heads, neurons
from jaxcompress.pruning.structured.compensate import compensated, find_biases
from jaxcompress.pruning.structured.cutting import Cut
from jaxcompress.pruning.structured.data import data_of


def error(small, model, inputs):
    """Squared difference of the outputs, as a share of their size."""
    got, want = (np.asarray(m(inputs), np.float64) for m in (small, model))
    return float(((got - want) ** 2).sum() / (want**2).sum())


def two_layers(constant, copied):
    """relu(x a + c) b + d, of eight neurons; some are constant, one is another's double."""
    params = cases.drawn({"a": (5, 8), "c": (8,), "b": (8, 3), "d": (3,)}, seed=2)
    for k in constant:
        params["a"] = params["a"].at[:, k].set(0.0)
        params["c"] = params["c"].at[k].set(1.0 + k)
    for k, of in copied:
        params["a"] = params["a"].at[:, k].set(2 * params["a"][:, of])
        params["c"] = params["c"].at[k].set(2 * params["c"][of])
    model = Model(lambda p, x: jax.nn.relu(x @ p["a"] + p["c"]) @ p["b"] + p["d"], params)
    return model, np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)


def kept_exactly(model, x, keep, how):
    """Outputs of the model that keeps these neurons, compensated."""
    whole = Cut.of(model, data_of(model, x))
    (group,) = whole.of_kind("neurons")
    kept = group.keep(keep)
    params, notes = compensated(whole.seen, whole.groups.program, [group], kept, how)
    small, function = cut(model.apply, params, kept, x)
    assert notes == [f"compensate {how}: 1 of 1 weights that consume what was cut"]
    return np.asarray(function(small, x))


def test_constant_neurons_go_into_the_bias():
    model, x = two_layers(constant=[1, 5], copied=[])
    for how in ("bias", "refit"):
        found = kept_exactly(model, x, [0, 2, 3, 4, 6, 7], how)
        cases.close(found, np.asarray(model(x)), 2e-4)


def test_what_others_can_tell_is_refitted():
    model, x = two_layers(constant=[], copied=[(6, 2)])
    found = kept_exactly(model, x, [0, 1, 2, 3, 4, 5, 7], "refit")
    cases.close(found, np.asarray(model(x)), 5e-3)  # the ridge keeps it from being exact
    found = kept_exactly(model, x, [0, 1, 2, 3, 4, 5, 7], "bias")
    assert np.abs(found - np.asarray(model(x))).max() > 0.05


def test_the_refit_is_least_squares():
    """Against NumPy's, in float64, of the deviations from the mean."""
    model, x = two_layers(constant=[], copied=[])
    keep = [0, 2, 3, 5, 7]
    found = kept_exactly(model, x, keep, "refit")
    p = {name: np.asarray(value, np.float64) for name, value in model.params.items()}
    hidden = np.maximum(x @ p["a"] + p["c"], 0)
    design = np.concatenate([hidden[:, keep], np.ones((len(x), 1))], 1)
    wanted = hidden @ p["b"] + p["d"]
    best = design @ np.linalg.lstsq(design, wanted, rcond=None)[0]
    least, ours = (((y - wanted) ** 2).sum() for y in (best, found))
    assert least <= ours < 1.02 * least


@pytest.mark.parametrize("name", slow_but(["llama", "llama_scan", "decoder"], ["llama_scan"]))
@pytest.mark.parametrize("method", [heads, neurons])
def test_refit_lowers_the_error_of_a_transformer(name, method):
    model = cases.reference(name)
    ids = cases.inputs_of(model, samples=16, length=12)
    options = {"calibration": ids, "sparsity": 0.5, "score": "random"}
    if name == "decoder" and method is heads:
        options["form"] = "function"
    plain = error(method(model, **options), model, ids)
    fitted = error(method(model, **options, compensate="refit"), model, ids)
    assert fitted < 0.9 * plain


@pytest.mark.parametrize("how", ["bias", "refit"])
@pytest.mark.parametrize("name", slow_but(["resnet_b", "vgg", "mobilenet"], ["resnet_b"]))
def test_convolutions_take_the_mean_into_their_norm(name, how):
    model = cases.reference(name)
    images = cases.inputs_of(model, samples=16)
    options = {"calibration": images, "sparsity": 0.5}
    plain = error(filters(model, **options), model, images)
    assert error(filters(model, **options, compensate=how), model, images) < plain


def test_biases_are_found_by_the_program():
    resnet = cases.reference("resnet_b")
    program = coupling(resnet.apply)(resnet.params, cases.inputs_of(resnet)).program
    found = find_biases(program)
    assert found["params/layer1/0/conv2/kernel"] == ("batch_stats/layer1/0/bn2/mean", -1)
    assert found["params/linear/kernel"] == ("params/linear/bias", 1)
    gpt = cases.reference("gpt2")
    program = coupling(gpt.apply)(gpt.params, cases.inputs_of(gpt)).program
    assert find_biases(program)["layers/0/mlp/c_proj/kernel"] == ("layers/0/mlp/c_proj/bias", 1)
    llama = cases.reference("llama")
    program = coupling(llama.apply)(llama.params, cases.inputs_of(llama)).program
    assert find_biases(program) == {}


def test_a_bias_that_is_read_twice_is_none():
    def shared(p, x):
        return (x @ p["a"] + p["c"]) @ p["b"] + p["c"][:3]

    params = cases.drawn({"a": (5, 8), "c": (8,), "b": (8, 3)})
    assert find_biases(coupling(shared)(params, np.zeros((2, 5))).program) == {}
