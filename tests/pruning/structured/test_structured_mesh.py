"""The same choices whether the parameters lie on one device or are split over eight."""

import jax
import numpy as np
import pytest
import structured_cases as cases
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress.models import build_model
from jaxcompress.pruning.structured import heads, neurons, width


def split(model, mesh):
    """Every matrix split along its last axis where that divides, else along the one before."""

    def place(x):
        spec = [None] * x.ndim
        for axis in range(x.ndim - 1, -1, -1):
            if x.shape[axis] % mesh.size == 0:
                spec[axis] = "fsdp"
                break
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    return model.replace(params=jax.tree.map(place, model.params))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param(neurons, {"score": "wanda", "compensate": "refit"}, marks=pytest.mark.slow),
        (heads, {"score": "gate"}),
        pytest.param(heads, {"score": "entropy"}, marks=pytest.mark.slow),
        pytest.param(width, {"score": "activation"}, marks=pytest.mark.slow),
        pytest.param(neurons, {"score": "taylor", "reduce": "l2"}, marks=pytest.mark.slow),
    ],
)
def test_the_same_indices_stay(method, options):
    assert len(jax.devices()) == 8
    config = type(cases.CONFIGS["llama_scan"])(
        **{**vars(cases.CONFIGS["llama_scan"]), "num_attention_heads": 8, "num_key_value_heads": 4}
    )
    model = build_model(config, seed=7)
    ids = cases.inputs_of(model, samples=8)
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    whole = method(model, calibration=ids, sparsity=0.5, **options)
    parted = method(split(model, mesh), calibration=ids, sparsity=0.5, **options)
    assert parted.config == whole.config
    for a, b in zip(jax.tree.leaves(parted.params), jax.tree.leaves(whole.params), strict=True):
        cases.close(a, b, 1e-4 if "compensate" in options else 0.0)
