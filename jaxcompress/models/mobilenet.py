"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381): inverted residuals, depthwise convolutions.

Checkpoints have torchvision's names: `features.0.0.weight`, `features.2.conv.1.0.weight`, ...,
`classifier.1.weight`. Parameters: `params/stem/conv/kernel` `[3, 3, channels, out]`,
`params/blocks/1/{expand,depthwise,project}/{conv/kernel,bn/scale,bn/bias}` (a depthwise kernel is
`[3, 3, 1, channels]`), `params/last/...`, `params/linear/kernel`, and `batch_stats/...` beside
them. The channels of every layer are the config's, so a pruned network is another config. There
is no dropout.

`apply` is as in `jaxcompress.models.resnet`.
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
from jaxcompress.models.names import NameMap, Parameter

# Table 2 of the paper: expansion, channels out, blocks, stride of the first of them.
_STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
    (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip
_WIDTHS = tuple(width for _, width, count, _ in _STAGES for _ in range(count))
_STRIDES = tuple(s if i == 0 else 1 for _, _, n, s in _STAGES for i in range(n))
_FACTORS = tuple(factor for factor, _, count, _ in _STAGES for _ in range(count))


@dataclass(frozen=True)
class MobileNetConfig(ConvNetConfig):
    """Architecture of a MobileNetV2; the defaults are the paper's, for images of 224x224.

    Images of 32x32 want smaller strides, such as `stem_stride=1` and a second stage of stride 1.

    Attributes:
      stem_width: channels of the first convolution.
      stem_stride: its stride.
      expanded: channels of each block's depthwise convolution; 0 where no expansion precedes it,
        so that it has the channels that come in.
      widths: channels out of each block.
      strides: stride of each block.
      residuals: whether a block adds what comes in; empty: wherever shapes allow it. A pruned
        network says so itself, because cut channels may come to agree by accident.
      last_width: channels of the last convolution.
    """

    model_type: str = "mobilenet"
    stem_width: int = 32
    stem_stride: int = 2
    expanded: tuple[int, ...] = tuple(
        0 if factor == 1 else factor * width
        for factor, width in zip(_FACTORS, (32, *_WIDTHS), strict=False)
    )
    widths: tuple[int, ...] = _WIDTHS
    strides: tuple[int, ...] = _STRIDES
    residuals: tuple[bool, ...] = ()
    last_width: int = 1280
    num_classes: int = 1000

    def __post_init__(self) -> None:
        if not len(self.expanded) == len(self.widths) == len(self.strides):
            raise InputError(
                f"config: {len(self.expanded)} expanded, {len(self.widths)} widths and "
                f"{len(self.strides)} strides; give one of each for every block"
            )
        possible = tuple(
            stride == 1 and before == after
            for stride, before, after in zip(self.strides, self.widths_in, self.widths)
        )
        if not self.residuals:
            object.__setattr__(self, "residuals", possible)
        if len(self.residuals) != len(possible) or any(
            asked and not can for asked, can in zip(self.residuals, possible)
        ):
            raise InputError(
                "config: residuals: one for every block, and only where stride is 1 and channels "
                f"in and out agree ({''.join('-+'[can] for can in possible)})"
            )

    @property
    def widths_in(self) -> tuple[int, ...]:
        """Channels that come into each block."""
        return (self.stem_width, *self.widths[:-1])


class ConvNorm(nn.Module):
    """Convolution and batch norm, and ReLU6 where asked."""

    features: int
    size: int
    stride: int
    config: MobileNetConfig
    depthwise: bool = False
    relu: bool = True

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`[batch, height, width, in]` to `[batch, height / stride, ..., features]`."""
        groups = self.features if self.depthwise else 1
        conv = Conv(self.features, self.size, self.stride, self.config, groups, name="conv")
        y = BatchNorm(self.config, name="bn")(conv(x), train)
        return jax.nn.relu6(y) if self.relu else y


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection (figure 3 of the paper)."""

    expanded: int
    width: int
    stride: int
    residual: bool
    config: MobileNetConfig

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`[batch, height, width, in]` to `[batch, height / stride, ..., width]`."""
        cfg, y = self.config, x
        if self.expanded:
            y = ConvNorm(self.expanded, 1, 1, cfg, name="expand")(y, train)
        channels = y.shape[-1]
        y = ConvNorm(channels, 3, self.stride, cfg, depthwise=True, name="depthwise")(y, train)
        y = ConvNorm(self.width, 1, 1, cfg, relu=False, name="project")(y, train)
        return x + y if self.residual else y


class _Blocks(nn.Module):
    """Children `0`, `1`, ..."""

    config: MobileNetConfig

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        cfg = self.config
        rows = zip(cfg.expanded, cfg.widths, cfg.strides, cfg.residuals)
        for index, row in enumerate(rows):
            x = InvertedResidual(*row, cfg, name=str(index))(x, train)
        return x


class MobileNet(nn.Module):
    """Images `[batch, height, width, channels]` to logits `[batch, classes]`."""

    config: MobileNetConfig

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Logits; with `train` by the statistics of this batch."""
        cfg = self.config
        x = ConvNorm(cfg.stem_width, 3, cfg.stem_stride, cfg, name="stem")(
            images.astype(cfg.dtype), train
        )
        x = _Blocks(cfg, name="blocks")(x, train)
        x = ConvNorm(cfg.last_width, 1, 1, cfg, name="last")(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return Linear(cfg.num_classes, True, cfg.dtype, cfg.param_dtype, name="linear")(x)


@functools.lru_cache(maxsize=64)
def build(config: MobileNetConfig) -> Functions:
    """The pure functions of a MobileNetV2; equal configs give the same function objects."""
    return convnet_functions(MobileNet(config), config.channels)


def name_map(config: MobileNetConfig) -> NameMap:
    """The table between variables and a `state_dict` with torchvision's names."""
    rows = _rows("stem", "features.0.0", "features.0.1", ("channels", "width"))
    for index, expanded in enumerate(config.expanded):
        ours, theirs, place = f"blocks/{index}", f"features.{index + 1}.conv", 0
        if expanded:
            rows += _rows(f"{ours}/expand", f"{theirs}.0.0", f"{theirs}.0.1")
            place = 1
        depthwise = f"{theirs}.{place}"
        rows += _rows(f"{ours}/depthwise", f"{depthwise}.0", f"{depthwise}.1", (None, "width"))
        rows += _rows(f"{ours}/project", f"{theirs}.{place + 1}", f"{theirs}.{place + 2}")
    last = f"features.{len(config.widths) + 1}"
    rows += _rows("last", f"{last}.0", f"{last}.1")
    return NameMap((*rows, *head_rows("linear", "classifier.1")))


def _rows(
    path: str, conv: str, norm: str, logical: tuple[str | None, str] = ("width", "width")
) -> list[Parameter]:
    return [*conv_rows(f"{path}/conv", conv, logical), *norm_rows(f"{path}/bn", norm)]


def infer(shapes: Mapping[str, tuple[int, ...]], **settings: Any) -> dict[str, Any]:
    """The config of a `state_dict`; shapes do not tell strides, which are the paper's.

    Raises:
      InputError: tensors that are not those of a MobileNetV2, or, for another number of blocks
        than the paper's, no `strides` in `settings`.
    """
    shapes = {name.removeprefix("module."): shape for name, shape in shapes.items()}
    pattern = r"features\.(\d+)\.conv\.\d(?:\.0)?\.weight"
    blocks: dict[int, list[tuple[int, ...]]] = {}
    for name, shape in sorted(shapes.items()):
        if (match := re.fullmatch(pattern, name)) and len(shape) == 4:
            blocks.setdefault(int(match[1]), []).append(shape)
    last = f"features.{len(blocks) + 1}.0.weight"
    if not blocks or "classifier.1.weight" not in shapes or last not in shapes:
        raise InputError("checkpoint: not a MobileNetV2 (no features.1.conv and classifier.1)")
    if "strides" not in settings and len(blocks) != len(_STRIDES):
        raise InputError("mobilenet: shapes do not tell the strides of the blocks; pass strides=")
    ordered = [blocks[index] for index in sorted(blocks)]
    return {
        "model_type": "mobilenet",
        "stem_width": shapes["features.0.0.weight"][0],
        "expanded": [convs[0][0] if len(convs) == 3 else 0 for convs in ordered],
        "widths": [convs[-1][0] for convs in ordered],
        "strides": list(_STRIDES),
        "last_width": shapes[last][0],
        "num_classes": shapes["classifier.1.weight"][0],
        "channels": shapes["features.0.0.weight"][1],
    } | settings
