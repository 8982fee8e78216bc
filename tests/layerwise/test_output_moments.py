"""Second moments of output gradients against explicit gradients of every output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.layerwise import output_moments
from jaxcompress.models import linear_paths


def perceptron(depth=None):
    """Two matrices and a table of logits, plain JAX; `depth`: the hidden one stacked in a scan."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (depth or 1, 6, 6)) * 0.5
    params = {"hidden": hidden if depth else hidden[0], "out": jax.random.normal(keys[1], (6, 5))}

    def apply(params, x, taps=None):
        taps = taps or (0.0, 0.0)
        layers = params["hidden"] if depth else params["hidden"][None]
        first = jnp.zeros((len(layers), *x.shape)) + taps[0]

        def layer(x, given):
            kernel, tap = given
            return jnp.tanh(x @ kernel + tap), None

        x, _ = jax.lax.scan(layer, x, (layers, first))
        return x @ params["out"] + taps[1]

    return Model(apply, params)


@pytest.mark.parametrize("depth", [None, 3])
def test_equal_the_gradients_of_added_zeros(depth):
    model = perceptron(depth)
    inputs = np.asarray(jax.random.normal(jax.random.key(1), (40, 6)))
    labels = np.zeros(40, np.int32)
    got = output_moments(model, ["hidden", "out"], [(inputs[:24], labels[:24])], seed=7)

    def loss(taps, x, key):
        logits = model.apply(model.params, x, taps)
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[:, None], axis=-1).sum()

    taps = jnp.zeros((depth or 1, 24, 6)), jnp.zeros((24, 5))
    gradients = jax.grad(loss)(taps, inputs[:24], jax.random.key(7))
    squares = [np.einsum("...mn,...mo->...no", g, g) for g in map(np.asarray, gradients)]
    want = {"hidden": squares[0] if depth else squares[0][0], "out": squares[1]}
    for path, moment in got.items():
        assert moment.shape == want[path].shape
        np.testing.assert_allclose(np.asarray(moment), want[path], rtol=2e-3, atol=1e-5)


def test_of_the_last_matrix_they_are_those_of_the_softmax():
    # Over the labels that the model draws, E[g g'] = diag(p) - p p'.
    model = perceptron()
    inputs = np.tile(np.asarray(jax.random.normal(jax.random.key(1), (1, 6))), (4000, 1))
    got = output_moments(model, ["out"], [(inputs, np.zeros(4000, np.int32))])["out"] / 4000
    p = np.asarray(jax.nn.softmax(model.apply(model.params, inputs[0])))
    np.testing.assert_allclose(np.asarray(got), np.diag(p) - np.outer(p, p), atol=0.03)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_sum_over_batches_of_a_language_model(tmp_path, scan_layers):
    directory = tiny.write_llama(tmp_path, layers=2)
    model = jc.load(directory, scan_layers=scan_layers)
    ids = np.random.default_rng(0).integers(0, 300, (4, 12)).astype(np.int32)
    paths = linear_paths(model)
    got = output_moments(model, paths, [ids[:2], ids[2:]])
    parts = [
        output_moments(model, paths, [ids[:2]]),
        output_moments(model, paths, [ids[2:]], seed=1),
    ]
    assert set(got) == set(paths)
    for path in paths:
        moment = np.asarray(got[path])
        np.testing.assert_allclose(
            moment, sum(np.asarray(p[path]) for p in parts), rtol=1e-3, atol=1e-6
        )
        assert np.linalg.eigvalsh(moment).min() > -1e-4 * np.abs(moment).max()


def test_unknown_paths_get_one_line():
    with pytest.raises(InputError, match="no such parameter"):
        output_moments(perceptron(), ["hiden"], [(np.zeros((1, 6)), np.zeros(1, int))])
