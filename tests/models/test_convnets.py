"""VGG, MobileNetV2 and ResNets of uneven widths compute what PyTorch computes."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import torch
from torch_convnets import MobileNetModel, VGGModel
from torch_twins import ResNetModel, assert_close, run, scramble

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.models import (
    MobileNetConfig,
    ResNetConfig,
    VGGConfig,
    abstract_params,
    from_state_dict,
    linear_paths,
    to_checkpoint_tensors,
    vgg_layers,
)

# 32 -> 16 -> 8: flattened from 8 x 8, averaged to less, or straight to the classes.
SHALLOW = (5, "M", 7, 6, "M")
VGGS = {
    "one linear layer": {"layers": (8, "M", 6, "M", 7, "M", 9, 5, "M", 11, "M")},
    "flattened places": {"layers": SHALLOW, "pool_size": 8, "hidden": (12,)},
    "overlapping bins": {"layers": SHALLOW, "pool_size": 3, "hidden": (12, 9), "classes": 4},
    "more bins than places": {"layers": (*SHALLOW, "M", "M", "M"), "pool_size": 7},
}
# Expanded, width, stride, residual. The last block has the shapes of a residual and is none.
BLOCKS = (
    (0, 6, 1, False), (20, 10, 2, False), (31, 10, 1, True), (18, 12, 2, False),
    (18, 12, 1, False),
)  # fmt: skip
MOBILE = {
    "strides": [stride for _, _, stride, _ in BLOCKS],
    "residuals": [residual for *_, residual in BLOCKS],
    "stem_stride": 1,
}


def images(count=3, size=32):
    return np.random.default_rng(0).normal(size=(count, size, size, 3)).astype(np.float32)


def torch_logits(twin, pixels):
    with torch.no_grad():
        return twin(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).numpy()


def assert_twins(model, twin, pixels):
    """The same logits, the same state out as in, and PyTorch takes what we write."""
    want = torch_logits(twin, pixels)
    assert_close(run(model, pixels), want)
    state = {n: v.numpy() for n, v in twin.state_dict().items() if "num_batches" not in n}
    written = dict(to_checkpoint_tensors(model))
    assert written.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(written[name], value)


@pytest.mark.parametrize("name", VGGS)
def test_vgg_logits_equal_torch(name):
    twin = scramble(VGGModel(**VGGS[name]))
    settings = {"layers": VGGS[name]["layers"]} if name == "more bins than places" else {}
    model = from_state_dict(twin.state_dict(), "vgg", **settings)
    assert model.config.layers == VGGS[name]["layers"]
    assert_twins(model, twin, images())


def test_mobilenet_logits_equal_torch():
    twin = scramble(MobileNetModel(BLOCKS))
    model = from_state_dict(twin.state_dict(), "mobilenet", **MOBILE)
    assert model.config.expanded == (0, 20, 31, 18, 18)
    assert_twins(model, twin, images())
    # By shapes alone the last block would be one with a residual.
    guessed = from_state_dict(twin.state_dict(), "mobilenet", **MOBILE | {"residuals": []})
    assert guessed.config.residuals == (False, False, True, False, True)


def test_mobilenet_gradients_equal_torch():
    twin = scramble(MobileNetModel(BLOCKS[:3]))
    model = from_state_dict(twin.state_dict(), "mobilenet", strides=[1, 2, 1], stem_stride=1)
    pixels, weights = images(), np.random.default_rng(1).normal(size=(3, 10)).astype(np.float32)
    twin(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).mul(
        torch.from_numpy(weights)
    ).sum().backward()

    @jax.jit
    @jax.grad
    def gradient(params):
        return (model.apply({**model.params, "params": params}, pixels) * weights).sum()

    found = {**model.params, "params": gradient(model.params["params"])}
    tensors = dict(to_checkpoint_tensors(model.replace(params=found)))
    for name, value in twin.named_parameters():
        assert_close(tensors[name], value.grad.numpy())


def test_resnet_of_uneven_inner_widths_equals_torch():
    shape = {"sizes": (1, 2, 1), "widths": (8, 12, 20), "inner": (5, 12, 3, 31), "pads": (1, 6)}
    twin = scramble(ResNetModel(**shape))
    model = from_state_dict(twin.state_dict(), "cifar_resnet", pads=(1, 6))
    assert model.config.inner_widths == (5, 12, 3, 31)
    assert_twins(model, twin, images(size=16))


def test_widths_that_say_nothing_new_are_left_out():
    plain = ResNetConfig(stage_sizes=(1, 2), widths=(4, 8))
    assert ResNetConfig(stage_sizes=(1, 2), widths=(4, 8), inner_widths=(4, 8, 8)) == plain
    assert ResNetConfig(stage_sizes=(1, 2), widths=(4, 8), pads=(2,)) == plain
    with pytest.raises(InputError, match="2 inner_widths for 3 blocks"):
        dataclasses.replace(plain, inner_widths=(1, 2))
    with pytest.raises(InputError, match="no room for zeros"):
        dataclasses.replace(plain, pads=(5,))


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(11, 132_868_840), (13, 133_053_736), (16, 138_365_992), (19, 143_678_248)],
)
def test_vggs_have_the_parameters_of_torchvision(depth, parameters):
    entries = {"depth": depth, "hidden": [4096, 4096], "pool_size": 7, "num_classes": 1000}
    config = VGGConfig.from_hf({"model_type": "vgg", **entries})
    assert config.layers == vgg_layers(depth)
    assert config.depth == depth
    found = jax.tree.leaves(abstract_params(config)["params"])
    assert sum(math.prod(x.shape) for x in found) == parameters


def test_mobilenet_has_the_parameters_of_torchvision():
    shapes = abstract_params(MobileNetConfig())["params"]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 3_504_872
    assert MobileNetConfig().residuals.count(True) == 10
    assert shapes["blocks"]["16"]["depthwise"]["conv"]["kernel"].shape == (3, 3, 1, 960)


def test_configs_survive_json():
    for config in (
        VGGConfig(layers=SHALLOW, hidden=(12, 9), pool_size=3),
        VGGConfig(layers=vgg_layers(11)),
        MobileNetConfig(),
        dataclasses.replace(MobileNetConfig(), residuals=(False,) * 17),
        ResNetConfig(stage_sizes=(1, 1), widths=(4, 8), inner_widths=(3, 5), pads=(0,)),
    ):
        assert type(config).from_hf(json.loads(json.dumps(config.to_hf()))) == config
    cut = VGGConfig.from_hf({"model_type": "vgg", "depth": 11})
    cut = dataclasses.replace(cut, layers=SHALLOW)
    assert VGGConfig.from_hf(json.loads(json.dumps(cut.to_hf()))) == cut


def test_a_pruned_vgg_is_another_config_and_its_directory_loads(tmp_path):
    twin = scramble(VGGModel(**VGGS["flattened places"]))
    torch.save(twin.state_dict(), tmp_path / "vgg.pth")
    model = jc.load(tmp_path / "vgg.pth", arch="vgg")
    jc.save(model, tmp_path / "out")
    again = jc.load(tmp_path / "out")
    assert again.config == model.config
    assert_close(run(again, images()), torch_logits(twin, images()))
    jc.save_state_dict(tmp_path / "again.pth", dict(to_checkpoint_tensors(again)))
    twin.load_state_dict(torch.load(tmp_path / "again.pth", weights_only=True))
    assert_close(run(again, images()), torch_logits(twin, images()))


def test_arch_names_what_a_state_dict_is(tmp_path):
    narrow = tuple(4 if isinstance(layer, int) else layer for layer in vgg_layers(11))
    torch.save(VGGModel(narrow).state_dict(), tmp_path / "vgg.pth")
    assert jc.load(tmp_path / "vgg.pth", arch="vgg11").config.widths == (4,) * 8
    with pytest.raises(InputError, match=r"vgg16, but the tensors are those of vgg11"):
        jc.load(tmp_path / "vgg.pth", arch="vgg16")
    torch.save(MobileNetModel(BLOCKS).state_dict(), tmp_path / "mobile.pth")
    told = {name: value for name, value in MOBILE.items() if name != "residuals"}
    assert jc.load(tmp_path / "mobile.pth", arch="mobilenet_v2", config=told).config.stem_width == 8
    with pytest.raises(InputError, match="pass strides="):
        jc.load(tmp_path / "mobile.pth", arch="mobilenet_v2")


def test_linear_paths_are_convolutions_and_hidden_layers():
    vgg = from_state_dict(VGGModel(**VGGS["flattened places"]).state_dict(), "vgg")
    assert linear_paths(vgg) == tuple(
        f"params/{n}/kernel" for n in ("conv1", "conv2", "conv3", "hidden1")
    )
    mobile = from_state_dict(MobileNetModel(BLOCKS).state_dict(), "mobilenet", **MOBILE)
    assert len(linear_paths(mobile)) == 2 + 2 + 4 * 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: vgg_layers(12), "depth 12 is not one of 11, 13, 16, 19"),
        (lambda: VGGConfig(layers=("M",)), "give filters"),
        (lambda: MobileNetConfig(widths=(8,)), "one of each for every block"),
        (lambda: MobileNetConfig(residuals=(True,) * 17), "only where stride is 1"),
        (lambda: from_state_dict(ResNetModel().state_dict(), "vgg"), "not a VGG"),
        (lambda: from_state_dict(ResNetModel().state_dict(), "mobilenet"), "not a MobileNetV2"),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(InputError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
