"""Every kind of leaf trains through `fit`: what may move moves, what is removed stays 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import Drawn, perceptron, same, squared_error, train

from jaxcompress.core.arrays.affine import encode_affine, minmax_range
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.arrays.sparse import NMSparse, UnstructuredSparse
from jaxcompress.core.arrays.training import FakeQuantized, Masked
from jaxcompress.core.model import Model
from jaxcompress.core.partition import split
from jaxcompress.distillation import distill
from jaxcompress.models import ResNetConfig, build_model
from jaxcompress.training.checkpoints import TrainCheckpoints
from jaxcompress.training.loop import fit
from jaxcompress.training.mesh import make_mesh
from jaxcompress.training.objective import classification
from jaxcompress.training.optimizers import make_optimizer
from jaxcompress.training.step import init_state

MASK = np.random.default_rng(3).random((64, 64)) < 0.4
TWO_OF_FOUR = np.arange(64) % 4 < 2


def affine(matrix):
    scale, zero = minmax_range(matrix, bits=4, groups=2, symmetric=True)
    return encode_affine(matrix, scale, zero, bits=4)


LEAVES = {
    "Masked": lambda w: Masked(w, jnp.asarray(MASK)),
    "NMSparse": lambda w: NMSparse.from_mask(w, jnp.tile(TWO_OF_FOUR, (64, 1)), 2, 4),
    "UnstructuredSparse": lambda w: UnstructuredSparse.from_mask(w, jnp.asarray(MASK)),
    "Affine": affine,
    "LowRank": lambda w: LowRank(w[:, :8], w[:8]),
    "FakeQuantized": lambda w: FakeQuantized(w, jnp.abs(w).max(1, keepdims=True) / 7),
}
REMOVED = {"Masked": ~MASK, "UnstructuredSparse": ~MASK, "NMSparse": np.tile(~TWO_OF_FOUR, (64, 1))}


def with_leaf(name) -> Model:
    model = perceptron()
    model.params["first"]["kernel"] = LEAVES[name](model.params["first"]["kernel"].T)
    return model


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """(name, model before, model after, final optimizer state): momentum and weight decay."""
    model = with_leaf(request.param)
    workdir = tmp_path_factory.mktemp(request.param)
    before = jax.tree.map(np.array, model.params)
    optimizer = {"name": "sgd", "momentum": 0.9, "learning_rate": 0.02, "weight_decay": 0.1}
    if request.param in ("Masked", "FakeQuantized"):
        optimizer = {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.3}
    out = train(model, workdir, steps=40, checkpoint_every=40, log_every=20, optimizer=optimizer)
    trainable, _ = split(model.params)
    settings = {"schedule": "cosine", "steps": 40, **optimizer}
    state = init_state(trainable, make_optimizer(**settings))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    saved = TrainCheckpoints(workdir / "checkpoints")
    state, _ = saved.restore(state, jax.tree.map(lambda _: here, state), model.params)
    saved.close()
    assert same(model.params, before)  # the caller's arrays are his own, and alive
    return request.param, model, out, state.optimizer


@pytest.mark.parametrize("trained", LEAVES, indirect=True)
def test_what_trains_moves_and_the_rest_is_bit_equal(trained):
    name, before, after, _ = trained
    (_, frozen), (_, still) = split(before.params), split(after.params)
    assert same(frozen, still)
    kinds = {"Masked": 1, "FakeQuantized": 2, "LowRank": 2}
    moved, held = split(before.params)[0], split(after.params)[0]
    assert len(jax.tree.leaves(moved["first"]["kernel"])) == kinds.get(name, 1)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(held), strict=True):
        assert not np.array_equal(a, b)
    assert jax.tree.structure(before.params) == jax.tree.structure(after.params)


@pytest.mark.parametrize("trained", REMOVED, indirect=True)
def test_removed_entries_are_0_after_momentum_and_decay(trained):
    name, _, after, _ = trained
    kernel = np.asarray(after.params["first"]["kernel"].dense()).T
    np.testing.assert_array_equal(kernel[REMOVED[name]], 0)
    assert np.count_nonzero(kernel) == (~REMOVED[name]).sum()


@pytest.mark.parametrize("trained", ["Masked"], indirect=True)
def test_moments_of_removed_entries_are_0(trained):
    _, _, _, moments = trained
    found = [x for x in jax.tree.leaves(moments) if x.shape == (64, 64)]
    assert len(found) == 2  # first and second moment
    for moment in found:
        np.testing.assert_array_equal(np.asarray(moment)[~MASK], 0)
        assert np.all(np.asarray(moment)[MASK] != 0)


@pytest.mark.parametrize("name", ["lion", "adafactor"])
def test_masks_hold_under_other_optimizers(name, tmp_path):
    out = train(with_leaf("Masked"), tmp_path, optimizer={"name": name, "weight_decay": 0.3})
    kernel = np.asarray(out.params["first"]["kernel"].dense()).T
    np.testing.assert_array_equal(kernel[~MASK], 0)
    assert np.all(kernel[MASK] != 0)


def test_kinds_and_paths_choose_what_trains(tmp_path):
    model = with_leaf("Affine")
    out = train(model, tmp_path, train=("scales", "dense"), exclude="second/*")
    changed = {
        name
        for name in ("norm", "first", "second")
        if not same(out.params[name], model.params[name])
    }
    assert changed == {"norm", "first"}
    assert same(out.params["first"]["kernel"].codes, model.params["first"]["kernel"].codes)


def test_leaves_that_are_no_arrays_stay(tmp_path):
    """As in an Equinox module: functions, strings and numbers beside the arrays."""
    model = perceptron()
    inner = model.apply

    def apply(params, x):
        assert params["name"] == "tanh"
        return params["function"](inner(params["net"], x)) * params["factor"]

    params = {"net": model.params, "function": jnp.tanh, "name": "tanh", "factor": 2.0}
    model = Model(apply, params)
    objective = squared_error(model)  # what lift traces are the arrays alone
    out = train(model, tmp_path, objective=objective)
    assert out.params["function"] is jnp.tanh
    assert (out.params["name"], out.params["factor"]) == ("tanh", 2.0)
    assert not same(out.params["net"], params["net"])


def test_running_statistics_do_not_train(tmp_path):
    model = build_model(ResNetConfig(stage_sizes=(1,), widths=(4,)))

    def images(rng, rows):
        return {
            "images": rng.normal(size=(rows, 8, 8, 3)).astype(np.float32),
            "labels": rng.integers(0, 10, rows).astype(np.int32),
        }

    out = fit(
        model, classification(model), Drawn(images, 8), make_optimizer(steps=2), steps=2,
        workdir=tmp_path,
    )  # fmt: skip
    assert same(out.params["batch_stats"], model.params["batch_stats"])
    assert not same(out.params["params"], model.params["params"])
    assert (tmp_path / "metrics.jsonl").read_text().count("accuracy") == 1


def test_several_inputs_are_the_one_that_they_make(tmp_path):
    """A batch holds a tuple of arrays where the function takes several."""
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=(6, 3)).astype(np.float32) for _ in range(2)]
    apart = [Model(lambda p, a, b: jnp.concatenate([a, b], 1) @ p["kernel"],
                   {"kernel": jnp.asarray(kernel)}) for kernel in kernels]  # fmt: skip
    whole = [Model(lambda p, x: x @ p["kernel"], model.params) for model in apart]

    def inputs(rng, rows):
        return {"inputs": rng.normal(size=(rows, 6)).astype(np.float32)}

    def halves(rng, rows):
        x = inputs(rng, rows)["inputs"]
        return {"inputs": (x[:, :2], x[:, 2:])}

    found = [
        fit(
            student, distill(student, teacher, alpha=1.0), Drawn(drawn, 16),
            make_optimizer(steps=3), steps=3, workdir=tmp_path / name, mesh=make_mesh(),
            accumulate=2,
        ).params["kernel"]
        for name, drawn, (student, teacher) in (("apart", halves, apart), ("whole", inputs, whole))
    ]  # fmt: skip
    np.testing.assert_allclose(*found, atol=1e-6)
    assert np.abs(np.asarray(found[0]) - kernels[0]).max() > 1e-4
