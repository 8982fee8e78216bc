"""SmoothQuant against its formula in NumPy."""

import jax
import numpy as np
import pytest
from fold_cases import CONFIGS, IDS, OWN, QUICK, assert_same_function, changed, leaf, model
from marks import slow_but

from jaxcompress.core.errors import InputError
from jaxcompress.quantization.smoothquant import smoothquant


@pytest.mark.parametrize("name", slow_but([*CONFIGS, *OWN], QUICK))
def test_function_stays(name):
    before = model(name)
    after = smoothquant(before, calibration=IDS)
    assert_same_function(before, after)
    if name != "equinox":
        assert changed(before, after)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_scales_are_those_of_the_formula(alpha):
    before = model("plain")
    after = smoothquant(before, calibration=IDS, alpha=alpha)
    w = jax.tree.map(np.asarray, before.params)["layers"][0]
    x = leaf(before, "table")[IDS].reshape(-1, 16)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w["g1"]
    of = [w[name].reshape(16, -1) for name in "qkv"]
    largest = np.max([np.abs(m).max(1) for m in of], axis=0)
    s = np.abs(x).max(0) ** alpha / largest ** (1 - alpha)
    np.testing.assert_allclose(leaf(after, "layers/0/g1"), w["g1"] / s, rtol=1e-4)
    np.testing.assert_allclose(
        leaf(after, "layers/0/q"), w["q"] * s[:, None, None], rtol=1e-4, atol=1e-6
    )


def test_alpha_is_checked():
    with pytest.raises(InputError, match="alpha"):
        smoothquant(model("plain"), calibration=IDS, alpha=1.5)
