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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jaxcompress.core.errors import InputError
from jaxcompress.models.convolution import (
    BatchNorm,
    Conv,
    ConvNetConfig,
    conv_rows,
    convnet_functions,
    head_rows,
    norm_rows,
)
from jaxcompress.models.functions import Functions
from jaxcompress.models.layers import Linear
from jaxcompress.models.names import NameMap


class BlockShape(NamedTuple):
    """One residual block: its path, channels in, between the convolutions and out, its stride."""

    path: str
    width_in: int
    inner: int
    width: int
    stride: int
    front: int  # zero channels before those of the shortcut (option A)


@dataclass(frozen=True)
class ResNetConfig(ConvNetConfig):
    """Architecture of a CIFAR ResNet.

    Attributes:
      stage_sizes: residual blocks per stage; n blocks in each of 3 stages are 6 n + 2 layers.
      widths: channels per stage; a stage after the first halves height and width.
      inner_widths: channels between the two convolutions of each block, in order; empty where
        they are the stage's.
      shortcut: where shapes change, "A" pads with zero channels, "B" projects by a 1x1
        convolution with batch norm (section 3.3).
      pads: zero channels that option A puts before the others, for each stage after the first;
        empty where half of them come before.
    """

    model_type: str = "cifar_resnet"
    stage_sizes: tuple[int, ...] = (3, 3, 3)
    widths: tuple[int, ...] = (16, 32, 64)
    inner_widths: tuple[int, ...] = ()
    shortcut: str = "A"
    pads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.shortcut not in ("A", "B"):
            raise InputError(f"config: shortcut {self.shortcut!r} must be 'A' or 'B'")
        if len(self.stage_sizes) != len(self.widths):
            raise InputError(
                f"config: {len(self.stage_sizes)} stage_sizes but {len(self.widths)} widths"
            )
        # What says nothing new is left out, so that equal networks have equal configs and other
        # stages need not repeat it.
        if self.inner_widths == self._stage_widths():
            object.__setattr__(self, "inner_widths", ())
        if self.pads == self._half_pads():
            object.__setattr__(self, "pads", ())
        if len(self.inner_widths) not in (0, sum(self.stage_sizes)):
            raise InputError(
                f"config: {len(self.inner_widths)} inner_widths for {sum(self.stage_sizes)} blocks"
            )
        if len(self.pads) not in (0, len(self.widths) - 1):
            raise InputError(f"config: {len(self.pads)} pads for {len(self.widths)} stages")
        grown = [b - a for a, b in zip(self.widths, self.widths[1:])]
        pads = self.pads or self._half_pads()
        if self.shortcut == "A" and any(not 0 <= p <= g for p, g in zip(pads, grown)):
            raise InputError(f"config: widths {self.widths} leave no room for zeros {pads} before")

    @property
    def depth(self) -> int:
        """Layers as the paper counts them: convolutions of the blocks, the first and the last."""
        return 2 * sum(self.stage_sizes) + 2

    def _stage_widths(self) -> tuple[int, ...]:
        return tuple(w for n, w in zip(self.stage_sizes, self.widths) for _ in range(n))

    def _half_pads(self) -> tuple[int, ...]:
        return tuple((b - a) // 2 for a, b in zip(self.widths, self.widths[1:]))

    def stages(self) -> list[list[BlockShape]]:
        """The blocks of every stage, in order."""
        inner = iter(self.inner_widths or self._stage_widths())
        pads = (0, *(self.pads or self._half_pads()))
        stages, width_in = [], self.widths[0]
        for stage, (size, width) in enumerate(zip(self.stage_sizes, self.widths), 1):
            blocks = []
            for index in range(size):
                first = index == 0 and stage > 1
                path = f"layer{stage}/{index}"
                front = pads[stage - 1] if first else 0
                shape = BlockShape(path, width_in, next(inner), width, 1 + first, front)
                blocks.append(shape)
                width_in = width
            stages.append(blocks)
        return stages


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a residual."""

    shape: BlockShape
    config: ResNetConfig

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`[batch, height, width, in]` to `[batch, height / stride, ..., out]`."""
        cfg, shape = self.config, self.shape
        y = Conv(shape.inner, 3, shape.stride, cfg, name="conv1")(x)
        y = jax.nn.relu(BatchNorm(cfg, name="bn1")(y, train))
        y = Conv(shape.width, 3, 1, cfg, name="conv2")(y)
        y = BatchNorm(cfg, name="bn2")(y, train)
        return jax.nn.relu(y + self._shortcut(x, train))

    def _shortcut(self, x: Array, train: bool) -> Array:
        shape = self.shape
        extra = shape.width - shape.width_in
        if shape.stride == 1 and extra == 0:
            return x
        if self.config.shortcut == "B":
            y = Conv(shape.width, 1, shape.stride, self.config, name="shortcut_conv")(x)
            return BatchNorm(self.config, name="shortcut_bn")(y, train)
        x = x[:, :: shape.stride, :: shape.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (shape.front, extra - shape.front)))


class _Stage(nn.Module):
    """Children `0`, `1`, ... of one resolution."""

    blocks: tuple[BlockShape, ...]
    config: ResNetConfig

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for index, shape in enumerate(self.blocks):
            x = BasicBlock(shape, self.config, name=str(index))(x, train)
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
        for number, blocks in enumerate(cfg.stages(), 1):
            x = _Stage(tuple(blocks), cfg, name=f"layer{number}")(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return Linear(cfg.num_classes, True, cfg.dtype, cfg.param_dtype, name="linear")(x)


@functools.lru_cache(maxsize=64)
def build(config: ResNetConfig) -> Functions:
    """The pure functions of a ResNet; equal configs give the same function objects."""
    return convnet_functions(ResNet(config), config.channels)


def name_map(config: ResNetConfig) -> NameMap:
    """The table between variables and the `state_dict` of the PyTorch model."""
    rows = [*conv_rows("conv1", "conv1", ("channels", "width")), *norm_rows("bn1", "bn1")]
    for path, width_in, _, width, stride, _ in (b for stage in config.stages() for b in stage):
        name = path.replace("/", ".")
        for index in (1, 2):
            rows += conv_rows(f"{path}/conv{index}", f"{name}.conv{index}")
            rows += norm_rows(f"{path}/bn{index}", f"{name}.bn{index}")
        if config.shortcut == "B" and (stride != 1 or width_in != width):
            rows += conv_rows(f"{path}/shortcut_conv", f"{name}.shortcut.0")
            rows += norm_rows(f"{path}/shortcut_bn", f"{name}.shortcut.1")
    return NameMap((*rows, *head_rows("linear", "linear")))


def infer(shapes: Mapping[str, tuple[int, ...]], **settings: Any) -> dict[str, Any]:
    """The config of a `state_dict`, from the names and shapes of its tensors.

    Raises:
      InputError: tensors that are not those of a CIFAR ResNet.
    """
    shapes = {name.removeprefix("module."): shape for name, shape in shapes.items()}
    found = [re.fullmatch(r"layer(\d+)\.(\d+)\.conv1\.weight", name) for name in shapes]
    blocks = sorted((int(m[1]), int(m[2])) for m in found if m)
    if not blocks or "conv1.weight" not in shapes or "linear.weight" not in shapes:
        raise InputError("checkpoint: not a CIFAR ResNet (no conv1, layer1.0.conv1 and linear)")
    stages = range(1, blocks[-1][0] + 1)
    return {
        "model_type": "cifar_resnet",
        "stage_sizes": [sum(s == stage for s, _ in blocks) for stage in stages],
        "widths": [shapes[f"layer{stage}.0.conv2.weight"][0] for stage in stages],
        "inner_widths": [shapes[f"layer{s}.{i}.conv1.weight"][0] for s, i in blocks],
        "num_classes": shapes["linear.weight"][0],
        "channels": shapes["conv1.weight"][1],
        "shortcut": "B" if any(".shortcut.0." in name for name in shapes) else "A",
    } | settings
