"""Output layers that share the embedding's table."""

from __future__ import annotations

import dataclasses

from jaxcompress.core.model import Model
from jaxcompress.models.families import build_model


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
