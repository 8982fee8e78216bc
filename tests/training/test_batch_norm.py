"""Running statistics of batch norms, measured, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.models import ResNetConfig, build_model
from jaxcompress.training.batch_norm import recalibrate

SMALL = ResNetConfig(stage_sizes=(1, 1), widths=(8, 16), num_classes=5)


def drawn_images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return build_model(SMALL, seed=1)


def test_statistics_are_those_of_all_images(model):
    images = drawn_images(32, 0)
    found = recalibrate(model, [{"images": images[:16]}, {"images": images[16:]}])
    kernel = model.params["params"]["conv1"]["kernel"]
    convolved = np.asarray(
        jax.lax.conv_general_dilated(
            images, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        np.float64,
    )
    measured = found.params["batch_stats"]["bn1"]
    np.testing.assert_allclose(measured["mean"], convolved.mean((0, 1, 2)), atol=1e-5)
    # Each batch's variance is the unbiased one, as PyTorch remembers it.
    np.testing.assert_allclose(measured["var"], convolved.var((0, 1, 2)), rtol=1e-3)
    assert found.params["params"] is model.params["params"]
    before, after = (jax.tree.structure(m.params) for m in (model, found))
    assert before == after


def test_a_channel_far_from_zero_keeps_its_small_variance(model):
    """Variances are not differences of squares, which would lose it or make it negative."""
    kernel = jnp.zeros((3, 3, 3, 8)).at[1, 1, 0].set(1.0)  # each channel is that of the images
    params = {**model.params["params"], "conv1": {"kernel": kernel}}
    model = model.replace(params={**model.params, "params": params})
    images = 1000 + 0.1 * drawn_images(48, 0)
    batches = [{"images": images[:32]}, {"images": images[32:]}]
    measured = recalibrate(model, batches).params["batch_stats"]["bn1"]
    channel = images[..., 0].astype(np.float64)
    np.testing.assert_allclose(measured["mean"], np.full(8, channel.mean()), rtol=1e-6)
    np.testing.assert_allclose(measured["var"], np.full(8, channel.var()), rtol=1e-3)


def test_measured_on_one_batch_it_runs_as_it_trains(model):
    images = drawn_images(64, 0)
    found = recalibrate(model, [{"images": images}])

    @jax.jit
    def training(params):
        return model.apply(params, images, train=True, mutable=["batch_stats"])[0]

    want = training(model.params)
    got = jax.jit(model.apply)(found.params, images)
    np.testing.assert_allclose(got, want, atol=1e-3 * np.ptp(want))


def test_statistics_can_only_be_measured_where_there_are_some(model):
    with pytest.raises(InputError, match="no images"):
        recalibrate(model, [])
    with pytest.raises(InputError, match="only a convolutional model"):
        recalibrate(Model(lambda params, x: x, {}), [])
