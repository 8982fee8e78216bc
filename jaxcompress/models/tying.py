"""Weights that stand in two places: output layers and embeddings, layers and layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from jaxcompress.core.model import Model
from jaxcompress.models.families import build_model, functions_of
from jaxcompress.models.names import LAYERS
from jaxcompress.models.sharing import SharedApply, share_blocks, spread, stored_under


def untie(model: Model) -> Model:
    """The same model with an `lm_head/kernel` of its own where it shared the embedding.

    A compressed output layer cannot be the embedding at once; a model that is not tied passes as
    it is.
    """
    if not getattr(model.config, "tie_word_embeddings", False):
        return model
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    params = {**model.params, "lm_head": {"kernel": model.params["embed"]["embedding"].T}}
    loose = build_model(config, params)
    return model.replace(apply=loose.apply, params=params, blocks=loose.blocks, config=config)


def share_layers(
    model: Model, layer_map: Sequence[int], *, weights: Literal["mean", "first"] = "mean"
) -> Model:
    """The model with blocks that share their parameters, held and stored once.

    Args:
      model: with `blocks`, all of one shape, stacked or not.
      layer_map: for every layer a number; layers of the same number share: [0, 0, 1, 1].
      weights: of a shared block: the "mean" of its layers', or those of the "first".

    Raises:
      InputError: a map of another length, a model without blocks, or blocks that differ.
    """
    params, checked = share_blocks(model, layer_map, weights=weights)
    if model.config is None:
        assert model.blocks is not None
        apply = SharedApply(model.apply, model.blocks, checked)
        return model.replace(apply=apply, params=params, blocks=None)
    return _rebuilt(model, params, checked)


def unshare_layers(model: Model) -> Model:
    """The same model with a block of its own for every layer, as any other program holds it.

    A model that shares none passes as it is.
    """
    if model.config is None:
        if not isinstance(model.apply, SharedApply):
            return model
        shared = model.apply
        params = spread(model.params, shared.blocks, shared.layer_map)
        return model.replace(apply=shared.apply, params=params, blocks=shared.blocks)
    layer_map = model.config.layer_map
    if not layer_map:
        return model
    whole = functions_of(dataclasses.replace(model.config, layer_map=()))
    blocks = whole.blocks or stored_under(LAYERS)
    return _rebuilt(model, spread(model.params, blocks, layer_map), ())


def _rebuilt(model: Model, params: Any, layer_map: tuple[int, ...]) -> Model:
    config = dataclasses.replace(model.config, layer_map=layer_map)
    made = build_model(config, params)
    return model.replace(apply=made.apply, params=params, blocks=made.blocks, config=config)
