"""The ResNets of CIFAR-10: 20, 32, 44, 56 layers (He et al. 2015, arXiv:1512.03385, section 4.2).

Images are `[batch, height, width, channels]`, kernels `[height, width, in, out]`. The parameters
of the model are Flax variables: `params/layer1/0/conv1/kernel`, `params/layer1/0/bn1/scale`,
`batch_stats/layer1/0/bn1/mean`, ..., `params/linear/kernel`.

`apply(variables, images)` uses the running statistics; for training,
`apply(variables, images, train=True, mutable=["batch_stats"])` gives `(logits, updates)`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jaxcompress.core.errors import InputError
from jaxcompress.models.config import ModelConfig
from jaxcompress.models.functions import Functions
from jaxcompress.models.layers import Linear
from jaxcompress.models.names import NameMap, Parameter

_KERNEL_AXES = (2, 3, 1, 0)  # OIHW to HWIO


@dataclass(frozen=True)
class ResNetConfig(ModelConfig):
    """Architecture of a CIFAR ResNet.

    Attributes:
      stage_sizes: residual blocks per stage; n blocks in each of 3 stages are 6 n + 2 layers.
      widths: channels per stage; a stage after the first halves height and width.
      num_classes: size of the output.
      channels: of the images.
      shortcut: where shapes change, "A" pads with zero channels, "B" projects by a 1x1
        convolution with batch norm (section 3.3).
      batch_norm_epsilon: added to the variance.
      batch_norm_momentum: share of a batch in the update of the running statistics.
    """

    model_type: str = "cifar_resnet"
    stage_sizes: tuple[int, ...] = (3, 3, 3)
    widths: tuple[int, ...] = (16, 32, 64)
    num_classes: int = 10
    channels: int = 3
    shortcut: str = "A"
    batch_norm_epsilon: float = 1e-5
    batch_norm_momentum: float = 0.1

    def __post_init__(self) -> None:
        if self.shortcut not in ("A", "B"):
            raise InputError(f"config: shortcut {self.shortcut!r} must be 'A' or 'B'")
        if len(self.stage_sizes) != len(self.widths):
            raise InputError(
                f"config: {len(self.stage_sizes)} stage_sizes but {len(self.widths)} widths"
            )

    def stages(self) -> list[tuple[str, int, int, int]]:
        """(path, width in, width out, stride) of every block, in order."""
        rows, width_in = [], self.widths[0]
        for stage, (size, width) in enumerate(zip(self.stage_sizes, self.widths), 1):
            for index in range(size):
                stride = 2 if index == 0 and stage > 1 else 1
                rows.append((f"layer{stage}/{index}", width_in, width, stride))
                width_in = width
        return rows


class Conv(nn.Module):
    """Convolution without bias; padding as in PyTorch, `size // 2` on both sides."""

    features: int
    size: int
    stride: int
    config: ResNetConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[batch, height, width, in]` to `[batch, height / stride, width / stride, features]`."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, self.config.param_dtype)
        return jax.lax.conv_general_dilated(
            x,
            kernel.astype(self.config.dtype),
            window_strides=(self.stride, self.stride),
            padding=[(self.size // 2, self.size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class BatchNorm(nn.Module):
    """Batch norm (Ioffe and Szegedy 2015, arXiv:1502.03167) that updates as PyTorch does."""

    config: ResNetConfig

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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a residual."""

    features: int
    stride: int
    config: ResNetConfig

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`[batch, height, width, in]` to `[batch, height / stride, ..., features]`."""
        cfg = self.config
        y = Conv(self.features, 3, self.stride, cfg, name="conv1")(x)
        y = jax.nn.relu(BatchNorm(cfg, name="bn1")(y, train))
        y = Conv(self.features, 3, 1, cfg, name="conv2")(y)
        y = BatchNorm(cfg, name="bn2")(y, train)
        return jax.nn.relu(y + self._shortcut(x, train))

    def _shortcut(self, x: Array, train: bool) -> Array:
        extra = self.features - x.shape[-1]
        if self.stride == 1 and extra == 0:
            return x
        if self.config.shortcut == "B":
            y = Conv(self.features, 1, self.stride, self.config, name="shortcut_conv")(x)
            return BatchNorm(self.config, name="shortcut_bn")(y, train)
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


class _Stage(nn.Module):
    """Children `0`, `1`, ... of one resolution."""

    blocks: tuple[tuple[int, int], ...]
    config: ResNetConfig

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for index, (width, stride) in enumerate(self.blocks):
            x = BasicBlock(width, stride, self.config, name=str(index))(x, train)
        return x


class ResNet(nn.Module):
    """Images `[batch, height, width, channels]` to logits `[batch, classes]`."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Logits; with `train` by the statistics of this batch."""
        cfg = self.config
        x = Conv(cfg.widths[0], 3, 1, cfg, name="conv1")(images.astype(cfg.dtype))
        x = jax.nn.relu(BatchNorm(cfg, name="bn1")(x, train))
        for stage in range(1, len(cfg.widths) + 1):
            blocks = tuple(
                (width, stride)
                for path, _, width, stride in cfg.stages()
                if path.startswith(f"layer{stage}/")
            )
            x = _Stage(blocks, cfg, name=f"layer{stage}")(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return Linear(cfg.num_classes, True, cfg.dtype, cfg.param_dtype, name="linear")(x)


@functools.lru_cache(maxsize=64)
def build(config: ResNetConfig) -> Functions:
    """The pure functions of a ResNet; equal configs give the same function objects."""
    module = ResNet(config)

    def apply(variables: Any, images: Array, train: bool = False, mutable: Any = False) -> Any:
        return module.apply(variables, images, train, mutable=mutable)

    return Functions(
        apply=apply,
        init=lambda key: dict(module.init(key, jnp.zeros((1, 32, 32, config.channels)))),
    )


def name_map(config: ResNetConfig) -> NameMap:
    """The table between variables and the `state_dict` of the PyTorch model."""
    rows = [*_conv_rows("conv1", "conv1", ("channels", "width")), *_norm_rows("bn1", "bn1")]
    for path, width_in, width, stride in config.stages():
        name = path.replace("/", ".")
        for index in (1, 2):
            rows += _conv_rows(f"{path}/conv{index}", f"{name}.conv{index}", ("width", "width"))
            rows += _norm_rows(f"{path}/bn{index}", f"{name}.bn{index}")
        if config.shortcut == "B" and (stride != 1 or width_in != width):
            rows += _conv_rows(f"{path}/shortcut_conv", f"{name}.shortcut.0", ("width", "width"))
            rows += _norm_rows(f"{path}/shortcut_bn", f"{name}.shortcut.1")
    rows += [
        Parameter("params/linear/kernel", "linear.weight", "head", ("width", "classes"), (1, 0)),
        Parameter("params/linear/bias", "linear.bias", "bias", ("classes",)),
    ]
    return NameMap(tuple(rows))


def infer(shapes: Mapping[str, tuple[int, ...]], **settings: Any) -> dict[str, Any]:
    """The config of a `state_dict`, from the names and shapes of its tensors.

    Raises:
      InputError: tensors that are not those of a CIFAR ResNet.
    """
    shapes = {name.removeprefix("module."): shape for name, shape in shapes.items()}
    found = [re.fullmatch(r"layer(\d+)\.(\d+)\.conv1\.weight", name) for name in shapes]
    blocks = [(int(m[1]), int(m[2])) for m in found if m]
    if not blocks or "conv1.weight" not in shapes or "linear.weight" not in shapes:
        raise InputError("checkpoint: not a CIFAR ResNet (no conv1, layer1.0.conv1 and linear)")
    stages = range(1, max(stage for stage, _ in blocks) + 1)
    return {
        "model_type": "cifar_resnet",
        "stage_sizes": [sum(s == stage for s, _ in blocks) for stage in stages],
        "widths": [shapes[f"layer{stage}.0.conv1.weight"][0] for stage in stages],
        "num_classes": shapes["linear.weight"][0],
        "channels": shapes["conv1.weight"][1],
        "shortcut": "B" if any(".shortcut.0." in name for name in shapes) else "A",
    } | settings


def _conv_rows(path: str, name: str, logical: tuple[str, str]) -> list[Parameter]:
    axes = (None, None, *logical)
    return [Parameter(f"params/{path}/kernel", f"{name}.weight", "conv", axes, _KERNEL_AXES)]


def _norm_rows(path: str, name: str) -> list[Parameter]:
    return [
        Parameter(f"params/{path}/scale", f"{name}.weight", "norm", ("width",)),
        Parameter(f"params/{path}/bias", f"{name}.bias", "norm", ("width",)),
        Parameter(f"batch_stats/{path}/mean", f"{name}.running_mean", "statistic", ("width",)),
        Parameter(f"batch_stats/{path}/var", f"{name}.running_var", "statistic", ("width",)),
    ]
