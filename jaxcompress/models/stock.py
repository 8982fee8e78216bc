"""The same network under a config that stock transformers loads.

Two architectures cannot say every number of heads. `BertModel` takes `hidden_size /
num_attention_heads` for the size of a head, so that heads which are gone must stand there as
zeros. `LlamaConfig` refuses a `hidden_size` that is no multiple of `num_attention_heads`, although
`head_dim` has an entry of its own; `MistralConfig` does not, and without a sliding window its
network is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxcompress.core.arrays.base import dense
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.models.blocks import is_stacked
from jaxcompress.models.config import ModelConfig
from jaxcompress.models.decoder_config import DecoderConfig
from jaxcompress.models.encoder import EncoderConfig
from jaxcompress.models.families import build_model
from jaxcompress.models.names import LAYERS


def stock_form(model: Model) -> Model:
    """The model itself where transformers loads its config, or the same function under another.

    A BERT gets back the heads that were cut, as zeros (its attention becomes dense); a Llama is
    called a Mistral, its parameters as they are. `notes` say so.

    Args:
      model: a reference model, or any without config.

    Raises:
      InputError: there is no such config.
    """
    config = model.config
    if config is None or config.stock_refusal is None:
        return model
    if isinstance(config, EncoderConfig):
        return _with_all_heads(model, config)
    if not isinstance(config, DecoderConfig) or config.attention_bias or config.mlp_bias:
        raise InputError(f"config: {config.stock_refusal}; use format native")
    entries = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    original = {**config.original, **entries, "sliding_window": None} if config.original else {}
    config = dataclasses.replace(config, model_type="mistral", original=original)
    return _rebuilt(model, config, model.params, "written as a Mistral, which is the same network")


def _with_all_heads(model: Model, config: EncoderConfig) -> Model:
    heads, uneven = divmod(config.hidden_size, config.head_dim)
    if uneven or heads < config.num_attention_heads:
        raise InputError(f"config: {config.stock_refusal}; use format native")
    missing = (heads - config.num_attention_heads) * config.head_dim

    def grown(block: Mapping[str, Any]) -> dict[str, Any]:
        attn = dict(block["attn"])
        for name in ("q_proj", "k_proj", "v_proj"):
            attn[name] = {leaf: _padded(value, missing, -1) for leaf, value in attn[name].items()}
        attn["o_proj"] = {
            **attn["o_proj"],
            "kernel": _padded(attn["o_proj"]["kernel"], missing, -2),
        }
        return {**block, "attn": attn}

    layers = model.params[LAYERS]
    if is_stacked(model.params):
        layers = grown(layers)
    else:
        layers = {key: grown(block) for key, block in layers.items()}
    config = dataclasses.replace(config, num_attention_heads=heads)
    return _rebuilt(model, config, {**model.params, LAYERS: layers}, "its cut heads are zeros")


def _padded(value: Any, missing: int, axis: int) -> Any:
    value = jnp.asarray(dense(value))
    widths = [(0, 0)] * value.ndim
    widths[axis] = (0, missing)
    return jnp.pad(value, widths)


def _rebuilt(model: Model, config: ModelConfig, params: Any, done: str) -> Model:
    made = build_model(config, params)
    return model.replace(
        apply=made.apply,
        params=params,
        blocks=made.blocks,
        config=config,
        notes=(*model.notes, f"{model.config.stock_refusal}: {done}"),
    )
