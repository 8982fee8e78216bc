"""The smaller config of a reference model, read off its smaller parameters.

One function for each kind of config: which sizes it has names for, and where they stand. What the
format cannot say (layers of different widths in a Hugging Face config) is refused with the reason.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers.kept import Kept
from jaxcompress.models import (
    DecoderConfig,
    EncoderConfig,
    GPT2Config,
    LSTMConfig,
    ModelConfig,
    ResNetConfig,
    TransformerDecoderConfig,
    abstract_params,
)
from jaxcompress.models.mobilenet import MobileNetConfig
from jaxcompress.models.names import LAYERS
from jaxcompress.models.vgg import POOL, VGGConfig

FUNCTION = "form='function' gives the smaller network as a function, without a config"


class Sizes:
    """Shapes of parameters, blocks unrolled or stacked."""

    def __init__(self, config: ModelConfig, params: Any, kept: Kept) -> None:
        self.kind, self.count, self.kept = config.model_type, None, kept
        self.shapes = {p: tuple(x.shape) for p, x in leaves_with_paths(params)}
        self.stacked = config.scan_layers

    def at(self, path: str, axis: int) -> int:
        """Size of one axis of one parameter."""
        return self.shapes[path][axis]

    def layers(self, name: str, axis: int) -> int:
        """Size of an axis of a parameter of every block.

        Raises:
          InputError: the blocks differ, and the format has one size for all.
        """
        if self.stacked:
            return self.shapes[f"{LAYERS}/{name}"][axis + 1]
        found: dict[int, str] = {}
        for path, shape in self.shapes.items():
            if path.startswith(f"{LAYERS}/") and path.split("/", 2)[2] == name:
                found.setdefault(shape[axis], path)
        if len(found) > 1:
            told = ", ".join(f"{size} in {path}" for size, path in found.items())
            raise InputError(
                f"{self.kind}: its config has one size for all layers, here they differ ({told}); "
                f"use allocation='uniform', or {FUNCTION}"
            )
        return next(iter(found))

    def heads(self, size: int, head_dim: int, what: str) -> int:
        """How many heads make `size` features."""
        if size % head_dim:
            raise InputError(f"{self.kind}: {what} of {size} features are no heads of {head_dim}")
        return size // head_dim


def smaller_config(config: ModelConfig, params: Any, kept: Kept) -> ModelConfig:
    """The config that fits smaller parameters.

    Args:
      config: of the network before the cut.
      params: after the cut; shapes are enough.
      kept: the record of the cut.

    Raises:
      InputError: the format cannot say it, with the reason.
    """
    made = _resized(config, Sizes(config, params, kept))
    wanted = {path: leaf.shape for path, leaf in leaves_with_paths(abstract_params(made))}
    for path, leaf in leaves_with_paths(params):
        if wanted.get(path) != tuple(leaf.shape):
            raise InputError(
                f"{config.model_type}: no config gives {path} the shape {tuple(leaf.shape)}; "
                f"{FUNCTION}"
            )
    return made


def tied_heads(config: ModelConfig | None) -> int:
    """Features of a head, where the format makes the heads together as wide as the residual; or 0.

    There heads can only be cut together with the width.
    """
    if isinstance(config, GPT2Config):
        return config.n_embd // config.n_head
    if isinstance(config, TransformerDecoderConfig):
        return config.d_model // config.num_heads
    return 0


@functools.singledispatch
def _resized(config: Any, sizes: Sizes) -> Any:
    raise InputError(f"{config.model_type}: its config has no smaller sizes; {FUNCTION}")


@_resized.register
def _decoder(config: DecoderConfig, sizes: Sizes) -> DecoderConfig:
    head_dim = config.head_dim
    return dataclasses.replace(
        config,
        hidden_size=sizes.at("embed/embedding", 1),
        intermediate_size=sizes.layers("mlp/down_proj/kernel", 0),
        num_attention_heads=sizes.heads(sizes.layers("attn/q_proj/kernel", 1), head_dim, "queries"),
        num_key_value_heads=sizes.heads(sizes.layers("attn/k_proj/kernel", 1), head_dim, "keys"),
    )


@_resized.register
def _encoder(config: EncoderConfig, sizes: Sizes) -> EncoderConfig:
    attention = sizes.layers("attn/o_proj/kernel", 0)
    return dataclasses.replace(
        config,
        hidden_size=sizes.at("embed/embedding", 1),
        intermediate_size=sizes.layers("mlp/up_proj/kernel", 1),
        num_attention_heads=sizes.heads(attention, config.head_dim, "queries"),
    )


def _tied(sizes: Sizes, width: int, attention: int, head_dim: int) -> int:
    """The number of heads, where heads * head_dim must be the width."""
    if attention != width:
        raise InputError(
            f"{sizes.kind}: its config makes all heads together as wide as the residual stream; "
            f"{attention // head_dim} heads of {head_dim} do not make {width}: cut both with "
            f"method width, or {FUNCTION}"
        )
    return sizes.heads(width, head_dim, "a residual stream")


@_resized.register
def _gpt2(config: GPT2Config, sizes: Sizes) -> GPT2Config:
    width, inner = sizes.at("embed/embedding", 1), sizes.layers("mlp/c_fc/kernel", 1)
    attention = sizes.layers("attn/c_proj/kernel", 0)
    heads = _tied(sizes, width, attention, config.n_embd // config.n_head)
    same = config.n_inner is None and inner == 4 * width
    return dataclasses.replace(config, n_embd=width, n_head=heads, n_inner=None if same else inner)


@_resized.register
def _transformer_decoder(
    config: TransformerDecoderConfig, sizes: Sizes
) -> TransformerDecoderConfig:
    width, head_dim = sizes.at("embed/embedding", 1), config.d_model // config.num_heads
    found = [
        _tied(sizes, width, sizes.layers(f"{name}/o_proj/kernel", 0), head_dim)
        for name in ("self_attn", "cross_attn")
    ]
    return dataclasses.replace(
        config,
        d_model=width,
        num_heads=found[0],
        dim_feedforward=sizes.layers("mlp/up_proj/kernel", 1),
    )


@_resized.register
def _lstm(config: LSTMConfig, sizes: Sizes) -> LSTMConfig:
    return dataclasses.replace(
        config,
        embedding_dim=sizes.at("embed/embedding", 1),
        hidden_size=sizes.layers("hh/kernel", 0),
    )


@_resized.register
def _resnet(config: ResNetConfig, sizes: Sizes) -> ResNetConfig:
    stages = config.stages()
    pads = []
    for first in (stage[0] for stage in stages[1:]):
        kept = sizes.kept.get(f"params/{first.path}/bn2/scale", {}).get(0, range(first.width))
        pads.append(sum(int(place) < first.front for place in kept))
    return dataclasses.replace(
        config,
        widths=tuple(sizes.at(f"params/{stage[0].path}/conv2/kernel", 3) for stage in stages),
        inner_widths=tuple(
            sizes.at(f"params/{block.path}/conv1/kernel", 3) for stage in stages for block in stage
        ),
        pads=tuple(pads) if config.shortcut == "A" else (),
    )


@_resized.register
def _vgg(config: VGGConfig, sizes: Sizes) -> VGGConfig:
    numbers = iter(range(1, len(config.widths) + 1))
    return dataclasses.replace(
        config,
        layers=tuple(
            layer if layer == POOL else sizes.at(f"params/conv{next(numbers)}/kernel", 3)
            for layer in config.layers
        ),
        hidden=tuple(
            sizes.at(f"params/hidden{index + 1}/kernel", 1) for index in range(len(config.hidden))
        ),
    )


@_resized.register
def _mobilenet(config: MobileNetConfig, sizes: Sizes) -> MobileNetConfig:
    def out(path: str) -> int:
        return sizes.at(f"params/{path}/conv/kernel", 3)

    blocks = range(len(config.widths))
    return dataclasses.replace(
        config,
        stem_width=out("stem"),
        expanded=tuple(out(f"blocks/{i}/expand") if config.expanded[i] else 0 for i in blocks),
        widths=tuple(out(f"blocks/{i}/project") for i in blocks),
        residuals=config.residuals,
        last_width=out("last"),
    )
