"""What the convolutional models share: layers, their functions and rows of their name maps.

Images are `[batch, height, width, channels]`, kernels `[height, width, in, out]`. The parameters
are Flax variables: `params/.../kernel`, and beside them `batch_stats/.../mean` and `var`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jaxcompress.models.config import ModelConfig
from jaxcompress.models.functions import Functions
from jaxcompress.models.layers import wide
from jaxcompress.models.names import Parameter

_KERNEL_AXES = (2, 3, 1, 0)  # OIHW to HWIO


@dataclass(frozen=True)
class ConvNetConfig(ModelConfig):
    """What every convolutional classifier with batch norm has.

    Attributes:
      num_classes: size of the output.
      channels: of the images.
      batch_norm_epsilon: added to the variance.
      batch_norm_momentum: share of a batch in the update of the running statistics.
    """

    num_classes: int = 10
    channels: int = 3
    batch_norm_epsilon: float = 1e-5
    batch_norm_momentum: float = 0.1


class Conv(nn.Module):
    """Convolution; padding as in PyTorch, `size // 2` on both sides.

    With `groups` equal to the channels it is depthwise, its kernel `[size, size, 1, channels]`.
    """

    features: int
    size: int
    stride: int
    config: ConvNetConfig
    groups: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[batch, height, width, in]` to `[batch, height / stride, width / stride, features]`."""
        cfg = self.config
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, cfg.param_dtype)
        y = jax.lax.conv_general_dilated(
            x,
            kernel.astype(cfg.dtype),
            window_strides=(self.stride, self.stride),
            padding=[(self.size // 2, self.size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape[-1:], cfg.param_dtype)
            y = (wide(y) + wide(bias.astype(cfg.dtype))).astype(y.dtype)
        return y


class BatchNorm(nn.Module):
    """Batch norm (Ioffe and Szegedy 2015, arXiv:1502.03167) that updates as PyTorch does."""

    config: ConvNetConfig

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`[batch, height, width, channels]`, by running or, in training, batch statistics."""
        cfg, shape = self.config, (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, cfg.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, cfg.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        y = x.astype(jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            mean = jnp.mean(y, axis=(0, 1, 2))
            var = jnp.mean(jnp.square(y - mean), axis=(0, 1, 2))
            if not self.is_initializing():
                count = y.size // y.shape[-1]
                share = cfg.batch_norm_momentum
                running_mean.value += share * (mean - running_mean.value)
                # PyTorch normalises by the biased variance and remembers the unbiased one.
                unbiased = var * (count / max(count - 1, 1))
                running_var.value += share * (unbiased - running_var.value)
        y = (y - mean) * jax.lax.rsqrt(var + cfg.batch_norm_epsilon)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(cfg.dtype)


def convnet_functions(module: nn.Module, channels: int) -> Functions:
    """The pure functions of a classifier `module(images, train)` of images with `channels`."""

    def apply(variables: Any, images: Array, train: bool = False, mutable: Any = False) -> Any:
        return module.apply(variables, images, train, mutable=mutable)

    return Functions(
        apply=apply,
        init=lambda key: dict(module.init(key, jnp.zeros((1, 32, 32, channels)))),
    )


def conv_rows(
    path: str, name: str, logical: tuple[str | None, str] = ("width", "width"), bias: bool = False
) -> list[Parameter]:
    """Rows of one convolution: the kernel and, where there is one, the bias."""
    axes = (None, None, *logical)
    rows = [Parameter(f"params/{path}/kernel", f"{name}.weight", "conv", axes, _KERNEL_AXES)]
    if bias:
        rows.append(Parameter(f"params/{path}/bias", f"{name}.bias", "bias", logical[1:]))
    return rows


def norm_rows(path: str, name: str) -> list[Parameter]:
    """Rows of one batch norm: scale, bias and running statistics."""
    return [
        Parameter(f"params/{path}/scale", f"{name}.weight", "norm", ("width",)),
        Parameter(f"params/{path}/bias", f"{name}.bias", "norm", ("width",)),
        Parameter(f"batch_stats/{path}/mean", f"{name}.running_mean", "statistic", ("width",)),
        Parameter(f"batch_stats/{path}/var", f"{name}.running_var", "statistic", ("width",)),
    ]


def head_rows(path: str, name: str) -> list[Parameter]:
    """Rows of the linear layer onto the classes."""
    return [
        Parameter(f"params/{path}/kernel", f"{name}.weight", "head", ("width", "classes"), (1, 0)),
        Parameter(f"params/{path}/bias", f"{name}.bias", "bias", ("classes",)),
    ]
