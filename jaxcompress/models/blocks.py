"""The blocks of a model: stacked or one by one, and fewer of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.models.families import build_model
from jaxcompress.models.names import LAYERS


def is_stacked(params: Mapping[str, Any]) -> bool:
    """Whether the blocks are stacked along a leading axis.

    Raises:
      InputError: parameters without blocks.
    """
    if LAYERS not in params:
        raise InputError(f"params: no {LAYERS!r} among {sorted(params)}")
    return not all(key.isdigit() for key in params[LAYERS])


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with `layers/0/...`, `layers/1/...` as `layers/...` with a leading axis.

    Leaves may be compressed arrays, if those of all blocks have the same format.

    Raises:
      InputError: blocks that differ in shape or format.
    """
    if is_stacked(params):
        return dict(params)
    blocks = [params[LAYERS][str(i)] for i in range(len(params[LAYERS]))]
    return {**params, LAYERS: _stack(blocks)}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with stacked `layers/...` as `layers/0/...`, `layers/1/...`."""
    if not is_stacked(params):
        return dict(params)
    stacked = params[LAYERS]
    length = jax.tree.leaves(stacked, is_leaf=is_compressed)[0].shape[0]
    blocks = {
        str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stacked, is_leaf=is_compressed)
        for i in range(length)
    }
    return {**params, LAYERS: blocks}


def with_scan_layers(model: Model, scan_layers: bool) -> Model:
    """The same model with its blocks run by one `scan`, or unrolled."""
    params = stack_layers(model.params) if scan_layers else unstack_layers(model.params)
    config = dataclasses.replace(model.config, scan_layers=scan_layers)
    changed = build_model(config, params)
    return model.replace(apply=changed.apply, params=params, blocks=changed.blocks, config=config)


def take_layers(model: Model, indices: Iterable[int]) -> Model:
    """The model that keeps these blocks, in this order; the config says so too.

    Args:
      model: a loaded model, or any model with `blocks`, stacked or not.
      indices: blocks to keep; negative ones count from the end.

    Raises:
      InputError: no index, one out of range, or a model without blocks.
    """
    chosen = tuple(int(i) for i in indices)
    if model.config is None:
        if model.blocks is None:
            raise InputError("take_layers: the model has neither a config nor blocks")
        walk = model.blocks.of(model.params)
        taken = [walk[i] for i in _checked(chosen, len(walk))]
        params = model.blocks.put(model.params, taken)
        return model.replace(apply=model.blocks.run, params=params)
    kept = _checked(chosen, model.config.num_layers)
    config = model.config.take_layers(kept)
    layers = unstack_layers(model.params)[LAYERS]
    taken = [layers[str(i)] for i in kept]
    stacked = is_stacked(model.params)
    params = {
        **model.params,
        LAYERS: _stack(taken) if stacked else {str(i): b for i, b in enumerate(taken)},
    }
    cut = build_model(config, params)
    return model.replace(apply=cut.apply, params=params, blocks=cut.blocks, config=config)


def _checked(indices: tuple[int, ...], total: int) -> tuple[int, ...]:
    if not indices:
        raise InputError("take_layers: at least one layer must stay")
    for index in indices:
        if not -total <= index < total:
            raise InputError(f"take_layers: layer {index} of a model with {total} layers")
    return tuple(index % total for index in indices)


def _stack(blocks: list[Any]) -> Any:
    try:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    except (ValueError, TypeError) as error:
        raise InputError(
            "layers differ in shape or format and cannot be stacked; use scan_layers=False"
        ) from error
