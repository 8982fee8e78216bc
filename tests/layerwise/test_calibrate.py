"""Methods of matrices with calibration data: what they are given, and what comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from marks import slow_but

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.layerwise.calibrate import Calibration

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 300, (8, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.write_llama(tmp_path_factory.mktemp("llama"), layers=2, intermediate_size=96)


def up(params, i=0):
    return params["layers"][str(i)]["mlp"]["up_proj"]["kernel"]


def test_taylor_is_pytorchs(directory):
    """|w dL/dw|, the gradient by PyTorch of the mean loss over all tokens."""
    import torch
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor(IDS, dtype=torch.long)
    reference(ids, labels=ids).loss.backward()
    weight = reference.model.layers[0].mlp.up_proj.weight
    scores = (weight * weight.grad).abs().detach().numpy().reshape(-1)
    small = jc.compress(jc.load(directory), "taylor", calibration=IDS, sparsity=0.5)
    gone = np.asarray(up(small.params)).T.reshape(-1) == 0
    assert gone.sum() == gone.size // 2
    agree = np.isin(np.flatnonzero(gone), np.argsort(scores, kind="stable")[: gone.sum()])
    assert agree.mean() > 0.999


@pytest.mark.parametrize("method", ["taylor", "wanda"])
@pytest.mark.parametrize("allocation", slow_but(["uniform", "global"], ["global"]))
def test_stacked_or_not_the_same_goes(directory, method, allocation):
    options = {"calibration": IDS, "sparsity": 0.4, "allocation": allocation, "scope": "layer"}
    options["sequential"] = "none"
    one = jc.compress(jc.load(directory), method, **options)
    stacked = jc.compress(jc.load(directory, scan_layers=True), method, **options)
    kernels = jax.tree.leaves(one.params["layers"]["1"])
    together = [leaf[1] for leaf in jax.tree.leaves(stacked.params["layers"])]
    same = [
        np.mean((np.asarray(a) == 0) == (np.asarray(b) == 0)) for a, b in zip(kernels, together)
    ]
    assert min(same) > 0.998
    flat = [np.asarray(x) for i in "01" for x in jax.tree.leaves(one.params["layers"][i])]
    matrices = [x for x in flat if x.ndim == 2]
    removed, total = sum((x == 0).sum() for x in matrices), sum(x.size for x in matrices)
    rounding = 0 if allocation == "global" else len(matrices)
    assert 0 <= int(0.4 * total) - removed <= rounding


def test_measured_allocation_spares_what_costs_more():
    """Of two matrices, one does next to nothing: it takes what it can."""
    params = {
        name: jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32) for name in ("loud", "quiet")
    }
    images = RNG.normal(size=(64, 16)).astype(np.float32)
    labels = np.argmax(images @ np.asarray(params["loud"]), axis=-1)

    def apply(params, x):
        return x @ params["loud"] + 1e-6 * x @ params["quiet"]

    small = jc.compress(
        Model(apply, params),
        "magnitude",
        calibration=(images, labels),
        allocation="measured",
        sparsity=0.4,
        include="*",
    )
    gone = {name: int((np.asarray(small.params[name]) == 0).sum()) for name in params}
    assert gone["loud"] + gone["quiet"] == 64
    assert gone["quiet"] > 3 * gone["loud"]


def classifier():
    """A convolution, and a linear layer in PyTorch's layout."""
    params = {
        "conv": jnp.asarray(RNG.normal(size=(3, 3, 2, 4)) / 3, jnp.float32),
        "last": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32),
    }

    def apply(params, images):
        h = jax.lax.conv_general_dilated(
            images, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(h).mean((1, 2)) @ params["last"].T

    return Model(apply, params)


@pytest.mark.parametrize("method", ["fisher", "taylor", "snip", "grasp", "wanda", "sparsegpt"])
def test_images_and_labels(method):
    images = RNG.normal(size=(12, 6, 6, 2)).astype(np.float32)
    labels = RNG.integers(0, 5, 12)
    data = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    small = jc.compress(
        classifier(), method, calibration=data, include=["conv", "last"], sparsity=0.5
    )
    assert (np.asarray(small.params["conv"]) == 0).sum() + (
        np.asarray(small.params["last"]) == 0
    ).sum() == (72 + 20) // 2
    with pytest.raises(InputError, match="loss needs") if method in (
        "fisher", "taylor", "snip", "grasp"
    ) else pytest.MonkeyPatch.context():  # fmt: skip
        jc.compress(classifier(), method, calibration=images, include=["conv", "last"])


def test_what_calibration_may_be(directory):
    model = jc.load(directory)

    def inputs(given):
        return Calibration.of(given, model, samples=2, ctx=8, seed=0)

    assert inputs(tiny.TEXT * 3).inputs[0].shape == (2, 8)
    assert inputs(list(range(40))).inputs[0].shape == (2, 8)
    assert inputs([IDS[:3], IDS[3:]]).inputs[0].shape == IDS.shape
    pair = inputs((IDS, IDS.astype(np.float32)))
    assert len(pair.inputs) == 2
    assert pair.labels is None
    assert inputs((IDS, np.arange(8))).labels is not None
    with pytest.raises(InputError, match="same number of samples"):
        inputs((IDS, np.arange(7)))
