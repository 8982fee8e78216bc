"""Every method under a mesh of eight devices: the same masks and sizes as on one."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.methods import METHODS
from jaxcompress.models import build_model
from jaxcompress.models.decoder_config import DecoderConfig
from jaxcompress.models.lstm import LSTMConfig
from jaxcompress.models.vgg import VGGConfig

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 50, (32, 16)).astype(np.int32)
IMAGES = RNG.normal(size=(8, 8, 8, 3)).astype(np.float32)

LLAMA = DecoderConfig(
    model_type="llama",
    vocab_size=50,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
LSTM = LSTMConfig(vocab_size=50, embedding_dim=16, hidden_size=16, num_hidden_layers=2)
VGG = VGGConfig(layers=(8, "M", 16, "M"), hidden=(16,), pool_size=2)

PER_MATRIX = sorted(name for name, method in METHODS.items() if method.produces == "sparse")
# Of methods that differ in a formula only, one of each way through the model.
QUICK = {"magnitude", "threshold", "wanda", "taylor", "sparsegpt"}
# From the dense inputs: sums over a mesh differ by 1e-5, and what follows from what was compressed
# before may turn on that.
ALONE = {"sequential": "none", "dense_target": 0.0}
OPTIONS = {"refit": ALONE, "kronecker": ALONE}
SHRINKING = {
    "heads": (LLAMA, {"score": "taylor"}),
    "queries": (LLAMA, {"sparsity": 0.5}),
    "neurons": (LLAMA, {"score": "wanda"}),
    "width": (LLAMA, {}),
    "depth": (LLAMA, {"drop": 1}),
    "shrink": (LLAMA, {"budget": 0.8}),
    "units": (LSTM, {}),
    "filters": (VGG, {"score": "activation"}),
}


def mesh_of_eight():
    assert len(jax.devices()) == 8
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))


def split(model, mesh):
    """Every array split over all devices along its last axis that divides, if there is one."""

    def place(x):
        spec = [None] * x.ndim
        divides = [axis for axis in range(x.ndim) if x.shape[axis] % mesh.size == 0]
        if divides:
            spec[divides[-1]] = ("data", "fsdp")
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    return model.replace(params=jax.tree.map(place, model.params))


def test_all_methods_of_pruning_are_here():
    models = {name for name, method in METHODS.items() if method.produces == "model"}
    assert models - {"share"} == set(SHRINKING)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PER_MATRIX]
)
def test_the_same_masks(name):
    model = build_model(LLAMA, seed=5)
    mesh = mesh_of_eight()
    data = {"calibration": IDS} if METHODS[name].needs == "calibration" else {}
    data |= OPTIONS.get(name, {})
    whole = jc.compress(model, name, **data)
    parted = jc.compress(split(model, mesh), name, mesh=mesh, **data)
    gone = 0
    pairs = zip(leaves_with_paths(whole.params), leaves_with_paths(parted.params), strict=True)
    for (path, one), (_, other) in pairs:
        np.testing.assert_array_equal(np.asarray(one) == 0, np.asarray(other) == 0, err_msg=path)
        np.testing.assert_allclose(one, other, atol=1e-2, err_msg=path)
        gone += int((np.asarray(one) == 0).sum())
    assert gone


@pytest.mark.parametrize("allocation", ["global", "owl"])
def test_the_same_is_spent_on_every_matrix(allocation):
    model = build_model(LLAMA, seed=5)
    given = {"calibration": IDS, "allocation": allocation}
    whole = jc.compress(model, "wanda", **given)
    parted = jc.compress(model, "wanda", mesh=mesh_of_eight(), **given)
    shares = []
    pairs = zip(leaves_with_paths(whole.params), leaves_with_paths(parted.params), strict=True)
    for (path, one), (_, other) in pairs:
        np.testing.assert_array_equal(np.asarray(one) == 0, np.asarray(other) == 0, err_msg=path)
        shares.append(np.mean(np.asarray(one) == 0))
    assert len({round(share, 3) for share in shares if share}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_nearly_the_same_masks_matrix_after_matrix(name):
    model, mesh = build_model(LLAMA, seed=5), mesh_of_eight()
    whole = jc.compress(model, name, calibration=IDS)
    parted = jc.compress(split(model, mesh), name, mesh=mesh, calibration=IDS)
    alike = [
        np.mean((np.asarray(a) == 0) == (np.asarray(b) == 0))
        for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parted.params))
    ]
    assert min(alike) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", SHRINKING)
def test_the_same_shapes_and_indices(name):
    config, options = SHRINKING[name]
    model = build_model(config, seed=5)
    data = IMAGES if config is VGG else IDS
    whole = jc.compress(model, name, calibration=data, **options)
    parted = jc.compress(split(model, mesh_of_eight()), name, calibration=data, **options)
    assert whole.config == parted.config
    before, after = (sum(x.size for x in jax.tree.leaves(m.params)) for m in (model, whole))
    assert after < before
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parted.params), strict=True):
        np.testing.assert_array_equal(a, b)
