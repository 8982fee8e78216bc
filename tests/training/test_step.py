"""One step: any split of a batch has its gradient, summed in float32, on float32 weights."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from training_cases import Drawn, decoder, perceptron, points, same, sentences, squared_error, train

from jaxcompress.core.model import Model
from jaxcompress.core.partition import split
from jaxcompress.models.precision import with_compute_dtype
from jaxcompress.training.objective import Objective, next_token
from jaxcompress.training.optimizers import make_optimizer
from jaxcompress.training.step import init_state, make_step, pmap_step


def after_one_step(objective, params, batch, *, learning_rate=1.0, **options):
    """(weights, metrics) of one step of plain gradient descent."""
    optimizer = optax.sgd(learning_rate)
    trainable, frozen = split(params)
    state = init_state(trainable, optimizer)
    step = make_step(objective, optimizer, **options)
    compiled = pmap_step(step) if "axis_name" in options else jax.jit(step)
    state, metrics = compiled(state, frozen, objective.constants, batch)
    return state.trainable, metrics


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2}, {"accumulate": 8}, {"accumulate": 2, "axis_name": "data"}],
    ids=str,
)
def test_micro_batches_with_uneven_weights_are_the_whole_batch(options):
    """Against the gradient in float64: sum of all over the sum of all weights."""
    model, rng = perceptron(), np.random.default_rng(1)
    batch = points(rng, 16)
    batch["weights"] = (rng.random(16) < 0.4).astype(np.float32) * rng.random(16).astype("f4")
    got, metrics = after_one_step(squared_error(model), model.params, batch, **options)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
    x, y, w = (batch[name].astype(np.float64) for name in ("x", "y", "weights"))
    h = np.tanh(x * p["norm"]["scale"] @ p["first"]["kernel"] + p["first"]["bias"])
    error = h @ p["second"]["kernel"] + p["second"]["bias"] - y
    slope = 2 * error * w[:, None] / w.sum()
    back = slope @ p["second"]["kernel"].T * (1 - h**2)
    np.testing.assert_allclose(
        metrics["loss"], (np.square(error).sum(-1) * w).sum() / w.sum(), rtol=1e-5
    )
    for layer, name, gradient in [
        ("second", "kernel", h.T @ slope),
        ("second", "bias", slope.sum(0)),
        ("first", "kernel", (x * p["norm"]["scale"]).T @ back),
        ("norm", "scale", ((back @ p["first"]["kernel"].T) * x).sum(0)),
    ]:
        expected = p[layer][name] - gradient
        np.testing.assert_allclose(got[layer][name], expected, rtol=2e-5, atol=2e-6)


def test_a_batch_in_which_nothing_counts_changes_nothing():
    model = perceptron()
    batch = points(np.random.default_rng(0), 8) | {"weights": np.zeros(8, np.float32)}
    got, metrics = after_one_step(squared_error(model), model.params, batch, accumulate=2)
    assert float(metrics["loss"]) == 0
    assert same(got, model.params)


def test_many_small_contributions_add_up_in_float32():
    """1 + 2047 times 1/256: a bfloat16 sum stays at 1, an eighth of what is right."""

    def function(params, batch, key, constants):
        product = params["w"].astype(jnp.bfloat16) * batch["x"].astype(jnp.bfloat16)
        return {"loss": (product.astype(jnp.float32).sum(), jnp.float32(len(batch["x"])))}

    x = np.full(2048, 1 / 256, np.float32)
    x[0] = 1
    params = {"w": jnp.zeros(())}
    got, _ = after_one_step(Objective(function), params, {"x": x}, accumulate=2048)
    assert float(-got["w"]) == pytest.approx(x.sum() / 2048, rel=1e-6)
    stalled = ml_dtypes.bfloat16(0)
    for value in x.astype(ml_dtypes.bfloat16):
        stalled = ml_dtypes.bfloat16(stalled + value)
    assert x.sum() > 8 * float(stalled)


def test_small_updates_of_bfloat16_weights_are_not_lost(tmp_path):
    """1000 updates of 1/4096 of a weight of 1: a bfloat16 master would never move."""

    def function(params, batch, key, constants):
        assert params["w"].dtype == jnp.bfloat16
        return {"loss": ((params["w"] * batch["x"]).astype(jnp.float32).sum(), 4 * 8.0)}

    model = Model(lambda params: params["w"], {"w": jnp.ones(4, jnp.bfloat16)})
    ones = Drawn(lambda rng, rows: {"x": np.ones((rows, 4), np.float32)}, 8)
    options = {"schedule": "constant", "learning_rate": 4 / 4096, "weight_decay": 0, "clip": None}
    out = train(
        model, tmp_path, objective=Objective(function), batches=ones, steps=1000, log_every=1000,
        checkpoint_every=1000, optimizer={"name": "sgd", **options},
    )  # fmt: skip
    assert out.params["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(out.params["w"].astype(np.float32), 1 - 1000 / 4096, rtol=0.004)
    assert ml_dtypes.bfloat16(ml_dtypes.bfloat16(1) - ml_dtypes.bfloat16(1 / 4096)) == 1


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


def _is_jaxpr(x):
    return isinstance(x, (Jaxpr, ClosedJaxpr))


@pytest.mark.parametrize("scan", [False, True])
def test_a_bfloat16_decoder_reduces_in_float32(scan):
    """Softmax, norms, losses, all that is summed over the batch; and weights stay float32."""
    model = with_compute_dtype(decoder(scan_layers=scan, attention_bias=True), "bfloat16")
    optimizer = make_optimizer(steps=10, weight_decay=0.1)
    trainable, frozen = split(model.params)
    state = init_state(trainable, optimizer)
    batch = sentences(np.random.default_rng(0), 4)
    step = make_step(next_token(model, chunk=4), optimizer, accumulate=2)
    traced = jax.make_jaxpr(step)(state, frozen, None, batch)
    found = {"reduce_sum": 0, "reduce_max": 0, "exp": 0, "log": 0, "dot_general": 0}
    for eqn in equations(traced.jaxpr):
        name = eqn.primitive.name
        if name not in found or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            continue
        if name == "dot_general" and eqn.params["dimension_numbers"][1][0]:
            continue  # attention: within one row of the batch
        found[name] += 1
        assert eqn.outvars[0].aval.dtype == jnp.float32, eqn
    assert min(found.values()) > 0
    assert any(
        eqn.primitive.name == "dot_general" and eqn.invars[0].aval.dtype == jnp.bfloat16
        for eqn in equations(traced.jaxpr)
    )
    after, _ = jax.eval_shape(step, state, frozen, None, batch)
    assert {x.dtype for x in jax.tree.leaves(after.trainable)} == {jnp.dtype("float32")}
