"""VGG with batch norm (Simonyan and Zisserman 2014, arXiv:1409.1556), for images of 32x32.

Checkpoints have torchvision's names: `features.0.weight`, `features.1.running_mean`, ...,
`classifier.0.weight`, `classifier.3.weight`, `classifier.6.weight`, or `classifier.weight` where
the last features go straight to the classes. Parameters: `params/conv1/kernel`
`[3, 3, in, out]`, `params/conv1/bias`, `params/bn1/scale`, `batch_stats/bn1/mean`, ...,
`params/hidden1/kernel` `[in, out]`, `params/linear/kernel`. The channels of every layer are the
config's, so a pruned VGG is another config. There is no dropout.

`apply` is as in `jaxcompress.models.resnet`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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

POOL = "M"
_CONVS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDTHS = (64, 128, 256, 512, 512)


def vgg_layers(depth: int) -> tuple[int | str, ...]:
    """`layers` of VGG-11, 13, 16 or 19 (table 1 of the paper, columns A, B, D, E).

    Raises:
      InputError: another depth.
    """
    if depth not in _CONVS:
        raise InputError(f"config: depth {depth!r} is not one of {', '.join(map(str, _CONVS))}")
    layers: list[int | str] = []
    for count, width in zip(_CONVS[depth], _WIDTHS):
        layers += [*[width] * count, POOL]
    return tuple(layers)


@dataclass(frozen=True)
class VGGConfig(ConvNetConfig):
    """Architecture of a VGG; a `config.json` may give `depth` (11, 13, 16, 19) for `layers`.

    Attributes:
      layers: filters of each 3x3 convolution in order, and "M" for each 2x2 max pooling.
      hidden: units of the linear layers before the last one.
      pool_size: height and width to which the last features are averaged before they are
        flattened, as by `nn.AdaptiveAvgPool2d`; torchvision has 7.
    """

    model_type: str = "vgg"
    layers: tuple[int | str, ...] = vgg_layers(16)
    hidden: tuple[int, ...] = ()
    pool_size: int = 1

    def __post_init__(self) -> None:
        if not self.widths or not all(x == POOL or isinstance(x, int) for x in self.layers):
            raise InputError(f"config: layers {self.layers!r}: give filters and {POOL!r} for pools")

    @property
    def widths(self) -> tuple[int, ...]:
        """Filters of each convolution in order."""
        return tuple(x for x in self.layers if isinstance(x, int))

    @property
    def depth(self) -> int:
        """Layers as the paper counts them: the convolutions and three linear ones."""
        return len(self.widths) + 3

    @classmethod
    def _read(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        if "depth" in config and "layers" not in config:
            config = {**config, "layers": vgg_layers(config["depth"])}
        return super()._read(config)

    def _write(self, name: str, out: dict[str, Any]) -> None:
        if name == "layers":
            out.pop("depth", None)
        super()._write(name, out)


class VGG(nn.Module):
    """Images `[batch, height, width, channels]` to logits `[batch, classes]`."""

    config: VGGConfig

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Logits; with `train` by the statistics of this batch."""
        cfg, number = self.config, 0
        x = images.astype(cfg.dtype)
        for layer in cfg.layers:
            if isinstance(layer, str):
                x = largest_of_four(x)
                continue
            number += 1
            x = Conv(layer, 3, 1, cfg, use_bias=True, name=f"conv{number}")(x)
            x = jax.nn.relu(BatchNorm(cfg, name=f"bn{number}")(x, train))
        x = average_to(x, cfg.pool_size)
        # PyTorch flattens channels first.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        for index, units in enumerate(cfg.hidden, 1):
            hidden = Linear(units, True, cfg.dtype, cfg.param_dtype, name=f"hidden{index}")
            x = jax.nn.relu(hidden(x))
        return Linear(cfg.num_classes, True, cfg.dtype, cfg.param_dtype, name="linear")(x)


def largest_of_four(x: Array) -> Array:
    """Max pooling 2x2, `[batch, height, width, c]` to half the height and width."""
    # The gradient of `reduce_window` takes a tenth of a training step on a CPU.
    height, width = (length // 2 * 2 for length in x.shape[1:3])
    places = [(row, column) for row in (0, 1) for column in (0, 1)]
    return functools.reduce(jnp.maximum, (x[:, i:height:2, j:width:2] for i, j in places))


def average_to(x: Array, size: int) -> Array:
    """`nn.AdaptiveAvgPool2d(size)`: `[batch, height, width, c]` to `[batch, size, size, c]`."""
    if x.shape[1:3] == (size, size):
        return x
    rows, columns = (jnp.asarray(_bins(length, size), x.dtype) for length in x.shape[1:3])
    return jnp.einsum("bhwc,hp,wq->bpqc", x, rows, columns)


def _bins(length: int, size: int) -> np.ndarray:
    """Shares `[length, size]` of each place in each average; bins may overlap."""
    shares = np.zeros((length, size))
    for index in range(size):
        start, stop = index * length // size, -(-(index + 1) * length // size)
        shares[start:stop, index] = 1 / (stop - start)
    return shares


@functools.lru_cache(maxsize=64)
def build(config: VGGConfig) -> Functions:
    """The pure functions of a VGG; equal configs give the same function objects."""
    return convnet_functions(VGG(config), config.channels)


def name_map(config: VGGConfig) -> NameMap:
    """The table between variables and a `state_dict` with torchvision's names."""
    rows: list[Parameter] = []
    place, number = 0, 0
    for layer in config.layers:
        if layer == POOL:
            place += 1
            continue
        number += 1
        logical = ("width" if place else "channels", "width")
        rows += conv_rows(f"conv{number}", f"features.{place}", logical, bias=True)
        rows += norm_rows(f"bn{number}", f"features.{place + 1}")
        place += 3  # convolution, norm, ReLU
    for index in range(len(config.hidden)):
        path, name = f"params/hidden{index + 1}", f"classifier.{3 * index}"  # ReLU, dropout
        axes = ("width", "hidden")
        rows.append(Parameter(f"{path}/kernel", f"{name}.weight", "linear", axes, (1, 0)))
        rows.append(Parameter(f"{path}/bias", f"{name}.bias", "bias", axes[1:]))
    last = f"classifier.{3 * len(config.hidden)}" if config.hidden else "classifier"
    return NameMap((*rows, *head_rows("linear", last)))


def infer(shapes: Mapping[str, tuple[int, ...]], **settings: Any) -> dict[str, Any]:
    """The config of a `state_dict`, from the names and shapes of its tensors.

    Whether a pooling follows the last convolution does not show; it is taken to, as in the paper.

    Raises:
      InputError: tensors that are not those of a VGG with batch norm.
    """
    shapes = {name.removeprefix("module."): shape for name, shape in shapes.items()}
    convs = {
        int(m[1]): shape
        for name, shape in shapes.items()
        if (m := re.fullmatch(r"features\.(\d+)\.weight", name)) and len(shape) == 4
    }
    linears = {
        int(m[1] or 0): shape
        for name, shape in shapes.items()
        if (m := re.fullmatch(r"classifier(?:\.(\d+))?\.weight", name)) and len(shape) == 2
    }
    layers, expected = [], 0
    for place in sorted(convs):
        normed = f"features.{place + 1}.running_mean" in shapes
        if place - expected not in (0, 1) or not normed or convs[place][2:] != (3, 3):
            raise InputError(f"checkpoint: features.{place} is not where a VGG with norms has one")
        layers += [POOL] * (place - expected) + [convs[place][0]]
        expected = place + 3
    if not layers or sorted(linears) != [3 * i for i in range(len(linears))] or not linears:
        raise InputError("checkpoint: not a VGG with batch norm (no features.0 and classifier)")
    flat = linears[0][1] // int(layers[-1])
    return {
        "model_type": "vgg",
        "layers": [*layers, POOL],
        "hidden": [linears[place][0] for place in sorted(linears)[:-1]],
        "pool_size": math.isqrt(flat),
        "num_classes": linears[max(linears)][0],
        "channels": convs[0][1],
    } | settings
