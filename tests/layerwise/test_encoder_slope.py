"""Gradients for scores of an encoder, which predicts no tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.layerwise.gradients import gradient_statistics
from jaxcompress.layerwise.losses import loss_of, slope_of
from jaxcompress.models import EncoderConfig, build_model

CONFIG = EncoderConfig(
    vocab_size=40,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    head_dim=4,
    intermediate_size=12,
    max_position_embeddings=16,
    pooler=False,
)
KERNEL = "layers/0/mlp/up_proj/kernel"


@pytest.fixture(scope="module")
def encoder():
    model = build_model(CONFIG)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), model.params
    )
    return model.replace(params=params)


def drawn(samples, seq=6):
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (samples, seq)).astype(np.int32)


def embedding(model, params, ids):
    mean = model.apply(params, ids).mean(1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def test_squared_gradients_are_on_average_those_of_every_output(encoder):
    """E over v of (v . J)^2 is the sum over the outputs of the squared Jacobian."""
    ids = drawn(600)
    found = gradient_statistics(encoder, [KERNEL], ["squared_gradient"], [ids])
    found = np.asarray(found[KERNEL]["squared_gradient"])

    def of_kernel(kernel, row):
        layers = {"0": {**encoder.params["layers"]["0"]}}
        mlp = layers["0"]["mlp"]
        layers["0"]["mlp"] = {**mlp, "up_proj": {**mlp["up_proj"], "kernel": kernel}}
        return embedding(encoder, {**encoder.params, "layers": layers}, row[None])[0]

    kernel = encoder.params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    jacobians = jax.jit(jax.vmap(jax.jacrev(of_kernel), (None, 0)))(kernel, ids)
    want = np.asarray(jnp.square(jacobians).sum(1).mean(0))
    assert np.corrcoef(found.ravel(), want.ravel())[0, 1] > 0.97
    assert found.sum() == pytest.approx(want.sum(), rel=0.1)


def test_padding_does_not_count(encoder):
    ids = drawn(4)
    mask = np.ones_like(ids)
    padded = [np.pad(x, ((0, 0), (0, 3))) for x in (ids, mask)]
    slope = slope_of(encoder, ids)
    want = slope(encoder.params, ids)
    np.testing.assert_allclose(slope(encoder.params, (ids, mask))[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(slope(encoder.params, tuple(padded))[0], want[0], rtol=1e-4)


@pytest.mark.parametrize("score", ["gate", "fisher"])
def test_heads_and_neurons_by_gradients(encoder, score):
    small = jc.compress(encoder, "heads", sparsity=0.5, score=score, calibration=drawn(8))
    small = jc.compress(small, "neurons", sparsity=0.5, score=score, calibration=drawn(8))
    assert small.config.num_attention_heads == 1
    assert small.config.intermediate_size == 6


def test_a_loss_of_an_encoder_is_refused(encoder):
    with pytest.raises(InputError, match="an encoder predicts no tokens"):
        loss_of(encoder, drawn(2))
    with pytest.raises(InputError, match="an encoder predicts no tokens"):
        jc.compress(encoder, "shrink", calibration=drawn(2), kinds="neurons", multiple=1)
