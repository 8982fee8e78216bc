"""Groups of coupled axes of the CNNs and the encoder, and the smaller config that a cut ends in."""

import dataclasses

import jax
import numpy as np
import pytest
from torch_twins import assert_close

from jaxcompress.core.readers.coupling import coupling
from jaxcompress.core.readers.cut import combine, cut, masked
from jaxcompress.models import (
    EncoderConfig,
    MobileNetConfig,
    ResNetConfig,
    VGGConfig,
    abstract_params,
    build_model,
    family_of,
    name_map_of,
)

RANDOM = np.random.default_rng(0)
# What shapes do not tell.
MOBILE = {"strides": [1, 2, 1, 1], "stem_stride": 1, "residuals": [False, False, True, False]}
CONFIGS = {
    "vgg": VGGConfig(layers=(5, "M", 7, 6, "M"), hidden=(12,), pool_size=4, num_classes=4),
    "mobilenet": MobileNetConfig(
        stem_width=8, expanded=(0, 20, 31, 18), widths=(6, 10, 10, 12), last_width=24,
        num_classes=4, **{name: value if name == "stem_stride" else tuple(value)
                          for name, value in MOBILE.items()},
    ),
    "resnet": ResNetConfig(stage_sizes=(1, 1), widths=(4, 8), inner_widths=(5, 9)),
    "bert": EncoderConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=6,
        intermediate_size=40, max_position_embeddings=32,
    ),
}  # fmt: skip
# Sizes of the groups that can be cut.
SIZES = {
    "vgg": [5, 6, 7, 12],
    "mobilenet": [6, 8, 10, 12, 18, 20, 24, 31],
    "resnet": [2, 2, 4, 5, 9],
    "bert": [4, 4, 6, 6, 6, 6, 40, 40],
}


def drawn(name):
    """A model with random parameters and running statistics, and inputs."""
    config = CONFIGS[name]

    def draw(path, leaf):
        noise = 0.5 * RANDOM.normal(size=leaf.shape).astype(np.float32)
        return np.abs(noise) + 0.5 if path[-1].key == "var" else noise

    params = jax.tree_util.tree_map_with_path(draw, abstract_params(config))
    inputs = RANDOM.normal(size=(2, 16, 16, 3)).astype(np.float32)
    if name == "bert":
        inputs = RANDOM.integers(0, 50, (2, 11))
    return build_model(config, params), inputs


def places(groups, path, axis):
    (group,) = groups.at(path, axis)
    assert group.cuttable
    return {(m.path, m.axis, m.offset, m.stride) for m in group.members}


def of_norms(*paths):
    names = [
        ("params", "scale"),
        ("params", "bias"),
        ("batch_stats", "mean"),
        ("batch_stats", "var"),
    ]
    return {(f"{tree}/{path}/{leaf}", 0, 0, 1) for path in paths for tree, leaf in names}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_can_be_cut(name):
    model, inputs = drawn(name)
    groups = coupling(model.apply)(model.params, inputs)
    assert sorted(group.size for group in groups if group.cuttable) == SIZES[name]


def test_filters_through_batch_norm_and_flatten():
    model, images = drawn("vgg")
    groups = coupling(model.apply)(model.params, images)
    conv = {("params/conv3/kernel", 3, 0, 1), ("params/conv3/bias", 0, 0, 1)}
    # PyTorch flattens channels first: a filter is 4 x 4 neighbouring rows.
    hidden = {("params/hidden1/kernel", 0, 0, 16)}
    assert places(groups, "params/conv3/kernel", 3) == conv | of_norms("bn3") | hidden


def test_a_depthwise_convolution_joins_what_expands_and_what_projects():
    model, images = drawn("mobilenet")
    groups = coupling(model.apply)(model.params, images)
    block = "blocks/2"
    expected = {
        (f"params/{block}/{name}/conv/kernel", axis, 0, 1)
        for name, axis in (("expand", 3), ("depthwise", 3), ("project", 2))
    }
    expected |= of_norms(f"{block}/expand/bn", f"{block}/depthwise/bn")
    assert places(groups, f"params/{block}/depthwise/conv/kernel", 3) == expected


def test_heads_and_neurons_of_the_encoder():
    model, ids = drawn("bert")
    groups = coupling(model.apply)(model.params, ids)
    attn = "layers/1/attn"
    heads = next(g for g in groups.at(f"{attn}/v_proj/kernel", 1) if g.size == 4)
    found = {(m.path, m.axis, m.offset, m.stride) for m in heads.members}
    kernels = {(f"{attn}/{p}_proj/kernel", 1, 0, 6) for p in "qkv"}
    biases = {(f"{attn}/{p}_proj/bias", 0, 0, 6) for p in "qkv"}
    assert found == kernels | biases | {(f"{attn}/o_proj/kernel", 0, 0, 6)}


def resized(name, config, params):
    """The config with the sizes of smaller parameters."""
    if name == "bert":
        layer = params["layers"]["0"]
        return dataclasses.replace(
            config,
            num_attention_heads=layer["attn"]["q_proj"]["kernel"].shape[1] // config.head_dim,
            intermediate_size=layer["mlp"]["up_proj"]["kernel"].shape[1],
        )
    family = family_of(config)
    shapes = {n: np.shape(x) for n, x in name_map_of(config).tensors(params)}
    settings = MOBILE if name == "mobilenet" else {}
    return family.config.from_hf(family.infer(shapes, **settings))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cut_is_a_smaller_config_and_smaller_arrays(name):
    model, inputs = drawn(name)
    groups = [g for g in coupling(model.apply)(model.params, inputs) if g.cuttable and g.size > 2]
    if name == "resnet":  # both pads go on being halves of what is missing
        groups = [g for g in groups if g.size != 4]
    if name == "bert":
        groups = [g for g in groups if g.size != 6]
    kept = combine(
        *(g.keep(np.sort(RANDOM.permutation(g.size)[: g.size * 2 // 3])) for g in groups)
    )
    small, smaller = cut(model.apply, model.params, kept, inputs)
    made = build_model(resized(name, model.config, small), small)
    want = jax.jit(model.apply)(masked(model.params, kept), inputs)
    assert_close(jax.jit(made.apply)(small, inputs), want)
    assert_close(jax.jit(smaller)(small, inputs), want)
    assert type(made.config).from_hf(made.config.to_hf()) == made.config
