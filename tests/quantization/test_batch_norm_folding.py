"""Folded batch norms: the same function, and kernels per output channel as of PyTorch's fusion."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.models import MobileNetConfig, ResNetConfig, VGGConfig, build_model
from jaxcompress.quantization.batch_norm import fold_batch_norm

CONFIGS = {
    "resnet A": ResNetConfig(stage_sizes=(1, 1), widths=(4, 8)),
    "resnet B": ResNetConfig(stage_sizes=(1, 1), widths=(4, 8), shortcut="B"),
    "vgg": VGGConfig(layers=(4, "M", 8, 8, "M"), hidden=(12,)),
    "mobilenet": MobileNetConfig(
        stem_width=4, stem_stride=1, expanded=(0, 8), widths=(4, 6), strides=(1, 2), last_width=12,
        num_classes=10,
    ),
}  # fmt: skip
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(4, 16, 16, 3)), jnp.float32)


def lived(name):
    """A network with statistics and scales of its own, some scales negative, and biases."""
    model = build_model(CONFIGS[name])
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        if leaf.ndim > 1:
            return leaf
        noise = jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        return jnp.exp(noise) if path.endswith("/var") else 0.5 * noise

    return model.replace(params=map_with_paths(drawn, model.params))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_function_stays_and_no_norm_scales(name):
    model = lived(name)
    folded = fold_batch_norm(model)
    before, after = (np.asarray(m(IMAGES), np.float64) for m in (model, folded))
    np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())
    norms = [(p, x) for p, x in leaves_with_paths(folded.params) if "/bn" in p or "_bn" in p]
    assert norms
    for path, leaf in norms:
        if path.endswith("/scale"):
            np.testing.assert_array_equal(leaf, 1)
        elif path.endswith("/mean"):
            np.testing.assert_array_equal(leaf, 0)
        elif path.endswith("/var"):
            np.testing.assert_allclose(leaf + model.config.batch_norm_epsilon, 1, atol=1e-7)
    moved = [
        path
        for path, leaf in leaves_with_paths(folded.params)
        if leaf.ndim == 4 and np.allclose(leaf, dict(leaves_with_paths(model.params))[path])
    ]
    assert not moved  # every convolution took a norm
    again = fold_batch_norm(folded)
    for (path, a), (_, b) in zip(*map(leaves_with_paths, (folded.params, again.params))):
        np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=path)


def test_kernels_and_biases_are_those_of_pytorchs_fusion():
    torch = pytest.importorskip("torch")
    model = lived("vgg")
    leaves = dict(leaves_with_paths(model.params))
    kernel = torch.tensor(np.asarray(leaves["params/conv2/kernel"]).transpose(3, 2, 0, 1))
    conv = torch.nn.Conv2d(*kernel.shape[1::-1], 3)
    norm = torch.nn.BatchNorm2d(kernel.shape[0]).eval()
    with torch.no_grad():
        conv.weight.copy_(kernel)
        for theirs, ours in (
            (conv.bias, "params/conv2/bias"),
            (norm.weight, "params/bn2/scale"),
            (norm.bias, "params/bn2/bias"),
            (norm.running_mean, "batch_stats/bn2/mean"),
            (norm.running_var, "batch_stats/bn2/var"),
        ):
            theirs.copy_(torch.tensor(np.asarray(leaves[ours])))
    fused = torch.nn.utils.fuse_conv_bn_eval(conv.eval(), norm)
    made = dict(leaves_with_paths(fold_batch_norm(model).params))
    found = np.asarray(made["params/conv2/kernel"]).transpose(3, 2, 0, 1)
    np.testing.assert_allclose(found, fused.weight.detach().numpy(), rtol=1e-5)
    bias = np.asarray(made["params/bn2/bias"])
    np.testing.assert_allclose(bias, fused.bias.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(made["params/conv2/bias"], 0)


def test_half_precision_stays_half_precision():
    model = build_model(dataclasses.replace(CONFIGS["vgg"], param_dtype="bfloat16"))
    made = fold_batch_norm(model)
    assert jax.tree.map(lambda x: x.dtype, made.params) == jax.tree.map(
        lambda x: x.dtype, model.params
    )


def test_other_models_are_refused():
    model = jc.Model(lambda p, x: x, {"kernel": jnp.ones((4, 4))})
    with pytest.raises(InputError, match="convolutional"):
        fold_batch_norm(model)
    model = build_model(CONFIGS["vgg"])
    with pytest.raises(InputError, match="conv1/kernel"):
        fold_batch_norm(jc.compress(model, "rtn", bits=8, group_size=-1))
