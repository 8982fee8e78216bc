"""GPTQ, GPTAQ, coordinate descent, tuned scales and chains: on matrices and on whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fold_cases import IDS, reference
from marks import slow_but

import jaxcompress as jc
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.inputs import QuantizedInput
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.layerwise import squared_error
from jaxcompress.methods import method_named
from jaxcompress.quantization.coordinate import coordinate
from jaxcompress.quantization.gptq import gptq
from jaxcompress.quantization.rtn import rtn

UP = "layers/0/mlp/up_proj/kernel"


def problem(seed=0, rows=32, columns=64, lead=(), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (*lead, 256, columns))
    x = x @ jax.random.normal(keys[1], (columns, columns)) / 8
    weight = jax.random.normal(keys[2], (*lead, rows, columns)).astype(dtype)
    return weight, jnp.einsum("...tk,...tl->...kl", x, x)


def greedy_in_float64(weight, moment, scale, order, damp=0.01):
    """GPTQ as its paper has it: quantize a column, spread its error by the inverse's factor."""
    weight, moment = np.asarray(weight, np.float64)[:, order], np.asarray(moment, np.float64)
    moment = moment[np.ix_(order, order)]
    moment = moment + damp * np.mean(np.diag(moment)) * np.eye(len(moment))
    factor = np.linalg.cholesky(np.linalg.inv(moment)).T
    scale = np.asarray(scale, np.float64)[:, order]
    result = np.zeros_like(weight)
    for i in range(weight.shape[1]):
        result[:, i] = np.clip(np.round(weight[:, i] / scale[:, i]), -8, 7) * scale[:, i]
        error = (weight[:, i] - result[:, i]) / factor[i, i]
        weight[:, i:] -= error[:, None] * factor[i, i:]
    return result[:, np.argsort(order)]


def test_gptq_is_the_papers_with_static_groups_and_activation_order():
    weight, moment = problem()
    found = gptq(weight, moment, bits=4, group_size=32)
    scale = np.repeat(np.asarray(found.scale), 32, axis=1)
    np.testing.assert_array_equal(found.scale, rtn(weight, bits=4, group_size=32).scale)
    order = np.argsort(-np.diag(np.asarray(moment)), kind="stable")
    expected = greedy_in_float64(weight, moment, scale, order)
    assert (np.abs(np.asarray(found.dense()) - expected) > 1e-4).mean() < 0.005


def test_each_step_errs_less_than_the_one_before():
    weight, moment = problem(1)
    options = {"bits": 3, "group_size": 32}
    made = [
        rtn(weight, **options),
        gptq(weight, moment, **options),
        gptq(weight, moment, rounds=2, **options),
        coordinate(weight, moment, **options),
    ]
    errors = [float(squared_error(weight, leaf.dense(), moment).sum()) for leaf in made]
    assert errors[0] > 1.3 * errors[1] > 1.3 * 1.05 * errors[2] > 1.3 * 1.05 * errors[3]


@pytest.mark.parametrize("method", [gptq, coordinate])
def test_half_precision_keeps_scales_of_its_own_dtype(method):
    weight, moment = problem(2, dtype=jnp.bfloat16)
    found = method(weight, moment, bits=4, group_size=32)
    assert (found.scale.dtype, found.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert found.nbytes * 8 / found.size == 4.5
    steps = np.asarray(found.dense(), np.float32) / np.repeat(
        np.asarray(found.scale, np.float32), 32, axis=1
    )
    np.testing.assert_allclose(steps, np.round(steps), atol=0.04)


def test_scales_of_the_search_are_of_16_bits():
    weight, moment = problem(3)
    found = coordinate(weight, moment, bits=4, group_size=64)
    assert found.scale.dtype == jnp.float16
    assert found.nbytes * 8 / found.size == 4.25
    assert set(np.sign(np.asarray(found.scale)).ravel()) == {-1, 1}


@pytest.mark.parametrize("method", [gptq, coordinate])
def test_stacked_matrices_are_solved_one_by_one(method):
    weight, moment = problem(4, lead=(2,))
    both = method(weight, moment, bits=4, group_size=32).dense()
    for i in range(2):
        one = method(weight[i], moment[i], bits=4, group_size=32).dense()
        np.testing.assert_array_equal(both[i], one)


@pytest.mark.parametrize("dtype", ["nf4", "mxfp4", "nvfp4", "fp8", "ternary"])
def test_any_format(dtype):
    weight, moment = problem(5)
    size = {"fp8": -1, "ternary": 32}.get(dtype, 128)
    plain = rtn(weight, dtype=dtype, group_size=size)
    found = gptq(weight, moment, dtype=dtype, group_size=size)
    assert type(found) is type(plain)
    errors = [float(squared_error(weight, x.dense(), moment).sum()) for x in (plain, found)]
    assert errors[1] < 0.9 * errors[0]


def test_options_that_exclude_each_other():
    weight, moment = problem(6)
    with pytest.raises(InputError, match="act_order"):
        gptq(weight, moment, group_size=32, scales="updated", act_order=True)
    with pytest.raises(InputError, match="group size 48 does not divide"):
        gptq(weight, moment, group_size=48)


# --------------------------------------------------------------------------- on whole models


def errors_of(model, *others):
    """Squared distance of the logits from those of `model`."""
    wanted = model(IDS)
    return [float(jnp.square(other(IDS) - wanted).sum()) for other in others]


@pytest.mark.parametrize("name", slow_but(["decoder", "decoder_scan", "gpt2"], ["decoder"]))
def test_calibrated_methods_come_nearer_to_the_model(name):
    model = reference(name)
    options = {"bits": 3, "group_size": 16}
    made = [jc.compress(model, "rtn", **options)]
    for method in ("gptq", "coordinate", "coordinate+tune"):
        made.append(jc.compress(model, method, calibration=IDS, **options))
    found = errors_of(model, *made)
    assert found[0] > found[1] > found[2] > found[3]


def test_tuning_changes_the_scales_and_nothing_else():
    model = reference("decoder")
    rounded = jc.compress(model, "rtn", bits=3, group_size=16)
    tuned = jc.compress(rounded, "tune", calibration=IDS, dense=model, steps=20)
    before, after = (dict(leaves_with_paths(m.params)) for m in (rounded, tuned))
    for path, leaf in before.items():
        if isinstance(leaf, Affine):
            np.testing.assert_array_equal(leaf.codes, after[path].codes)
            assert (leaf.scale != after[path].scale).any()
        else:
            np.testing.assert_array_equal(leaf, after[path])
    assert np.subtract(*errors_of(model, rounded, tuned)) > 0
    again = jc.compress(rounded, "tune", calibration=IDS, dense=model, steps=20)
    jax.tree.map(np.testing.assert_array_equal, tuned.params, again.params)


def test_tuning_towards_the_text_itself():
    model = reference("decoder")
    rounded = jc.compress(model, "rtn", bits=3, group_size=16)

    def text_loss(m):
        logp = jax.nn.log_softmax(m(IDS)[:, :-1].astype(jnp.float32))
        return -float(jnp.take_along_axis(logp, IDS[:, 1:, None], -1).mean())

    options = {"calibration": IDS, "dense": model, "steps": 20}
    losses = [
        text_loss(jc.compress(rounded, "tune", next_token=share, **options))
        for share in (0.0, 0.5, 1.0)
    ]
    assert losses[0] > losses[1] > losses[2]
    assert text_loss(rounded) > losses[2]
    with pytest.raises(InputError, match="next_token 2"):
        jc.compress(rounded, "tune", next_token=2.0, **options)


def test_tuning_knows_no_dense_model_by_itself():
    rounded = jc.compress(reference("decoder"), "rtn", bits=3, group_size=16)
    with pytest.raises(InputError, match="needs the dense model"):
        jc.compress(rounded, "tune", calibration=IDS)


def test_gptaq_aims_at_what_the_dense_model_gives():
    model = reference("decoder")
    options = {"bits": 3, "group_size": 16, "calibration": IDS}
    aimed = jc.compress(model, "gptaq", **options)
    same = jc.compress(model, "gptq", dense_target=1.0, **options)
    plain = jc.compress(model, "gptq", **options)
    jax.tree.map(np.testing.assert_array_equal, aimed.params, same.params)
    leaves = (dict(leaves_with_paths(m.params)) for m in (plain, aimed))
    later = UP.replace("layers/0", "layers/1")  # the first block gets the dense inputs anyway
    assert len({np.asarray(leaf[later].codes).tobytes() for leaf in leaves}) == 2


def test_a_chain_is_its_links_one_after_the_other():
    model = reference("decoder")
    at_once = jc.compress(model, "quarot+rtn", calibration=IDS, bits=8, group_size=16)
    assert isinstance(dict(leaves_with_paths(at_once.params))[UP], Affine)
    assert errors_of(model, at_once)[0] < 0.01 * float(jnp.square(model(IDS)).sum())
    default = jc.compress(model, "quarot", calibration=IDS, bits=4, group_size=16)
    spelled = jc.compress(model, "quarot+gptq", calibration=IDS, bits=4, group_size=16)
    jax.tree.map(np.testing.assert_array_equal, default.params, spelled.params)


def test_smoothquant_rounds_weights_and_inputs_to_8_bits():
    model = reference("decoder")
    small = jc.compress(model, "smoothquant", calibration=IDS)
    leaf = dict(leaves_with_paths(small.params))[UP]
    assert isinstance(leaf, QuantizedInput)
    assert (leaf.weight.bits, leaf.weight.groups, leaf.input_dtype) == (8, 1, "int8")
    other = jc.compress(model, "rtn", bits=8, group_size=-1, activations="int8", calibration=IDS)
    assert isinstance(dict(leaves_with_paths(other.params))[UP], QuantizedInput)


def test_a_chain_tells_its_options_and_what_it_needs():
    chain = method_named("awq+coordinate+tune")
    assert [link.name for link in chain.links] == ["awq", "coordinate", "tune"]
    assert (chain.needs, chain.selects, chain.walks) == ("calibration", True, True)
    assert {"bits", "rounds", "steps", "weigh_outputs"} <= set(chain.options)
    assert "dense" not in chain.options
    assert method_named("smoothquant").options["bits"].default == 8
    with pytest.raises(InputError, match=r"'gptqq': unknown; .*gptq"):
        method_named("quarot+gptqq")
    with pytest.raises(InputError, match="no option 'sparsity'"):
        jc.compress(reference("decoder"), "quarot+gptq", calibration=IDS, sparsity=0.5)


@pytest.mark.slow
def test_a_plan_decides_for_the_rounding_that_follows():
    model = reference("decoder")
    options = {"calibration": IDS, "average_bits": 5.5, "group_size": 16, "candidates": "2,4,8"}
    small = jc.compress(model, "mixed+gptq", overrides={UP: {"bits": 3}}, **options)
    planned = method_named("mixed").plan(model, None, **options).overrides()
    leaves = dict(leaves_with_paths(small.params))
    assert leaves[UP].bits == 3
    assert {leaves[path].bits for path in planned} - {3} <= {2, 4, 8}
    for path, own in planned.items():
        if path != UP:
            assert leaves[path].bits == own["bits"]
    assert len({own["bits"] for own in planned.values()}) > 1
