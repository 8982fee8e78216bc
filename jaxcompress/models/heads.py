"""Attention heads of zeros, where a format has no way to say that heads are gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxcompress.core.arrays.base import dense
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.models.blocks import is_stacked
from jaxcompress.models.encoder import EncoderConfig
from jaxcompress.models.families import build_model
from jaxcompress.models.names import LAYERS


def with_all_heads(model: Model) -> Model:
    """The same function as a BERT that transformers loads: heads that were cut are zeros.

    `BertModel` has `hidden_size / num_attention_heads` features per head, so that fewer heads of
    the same size cannot be said in its config. The attention of the result is dense; a model that
    has all of its heads passes as it is.

    Args:
      model: a BERT-style encoder.

    Raises:
      InputError: another model, or a `hidden_size` that is no multiple of `head_dim`.
    """
    config = model.config
    if not isinstance(config, EncoderConfig):
        raise InputError("with_all_heads: the model is no BERT; other formats say how many heads")
    if config.is_stock:
        return model
    heads, uneven = divmod(config.hidden_size, config.head_dim)
    if uneven or heads < config.num_attention_heads:
        raise InputError(
            f"with_all_heads: {config.num_attention_heads} heads of {config.head_dim} in a width "
            f"of {config.hidden_size}: BertModel wants their product to be the width; cut the "
            f"width to a multiple of {config.head_dim}, or save with format native"
        )
    missing = (heads - config.num_attention_heads) * config.head_dim

    def grown(block: Mapping[str, Any]) -> dict[str, Any]:
        attn = {
            name: {
                leaf: _padded(value, missing, -2 if (name, leaf) == ("o_proj", "kernel") else -1)
                if (name, leaf) != ("o_proj", "bias")
                else value
                for leaf, value in projection.items()
            }
            for name, projection in block["attn"].items()
        }
        return {**block, "attn": attn}

    layers = model.params[LAYERS]
    stacked = is_stacked(model.params)
    params = {
        **model.params,
        LAYERS: grown(layers) if stacked else {key: grown(block) for key, block in layers.items()},
    }
    config = dataclasses.replace(config, num_attention_heads=heads)
    whole = build_model(config, params)
    return model.replace(apply=whole.apply, params=params, blocks=whole.blocks, config=config)


def _padded(value: Any, missing: int, axis: int) -> Any:
    value = jnp.asarray(dense(value))
    widths = [(0, 0)] * value.ndim
    widths[axis] = (0, missing)
    return jnp.pad(value, widths)
