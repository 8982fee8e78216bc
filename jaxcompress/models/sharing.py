"""Blocks that share their parameters (ALBERT: Lan et al. 2019, arXiv:1909.11942, section 3.1).

The parameters hold each distinct block once, and a layer map says which of them every layer is:
(0, 0, 1, 1) is a network of four layers with two distinct blocks. The function spreads them out
before it runs, so that their gradients add up, and everything that counts or stores parameters
sees them once. A reference model keeps the map in its config (`layer_map`), any other in its
function. There is no walk from block to block: calibrated methods capture such a model whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Blocks, Model
from jaxcompress.models.functions import Functions
from jaxcompress.models.names import LAYERS, NameMap

LayerMap = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SharedApply:
    """A function of parameters with shared blocks, made of one of all blocks."""

    apply: Callable[..., Any]
    blocks: Blocks
    layer_map: LayerMap

    def __call__(self, params: Any, *inputs: Any, **options: Any) -> Any:
        """`apply` with every layer's block in its place."""
        return self.apply(spread(params, self.blocks, self.layer_map), *inputs, **options)


def spread(params: Any, blocks: Blocks, layer_map: LayerMap) -> Any:
    """Parameters of all layers, from those of the distinct blocks; nothing is copied eagerly."""
    distinct = blocks.of(params)
    return blocks.put(params, [distinct[i] for i in layer_map])


def check_layer_map(layer_map: Sequence[int], layers: int) -> LayerMap:
    """The map as a tuple, renumbered in the order of first use.

    Raises:
      InputError: not one entry for each layer.
    """
    if len(layer_map) != layers:
        raise InputError(f"layer_map: {len(layer_map)} entries for a model of {layers} layers")
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(int(i), len(numbers)) for i in layer_map)


def share_blocks(
    model: Model, layer_map: Sequence[int], *, weights: Literal["mean", "first"] = "mean"
) -> tuple[Any, LayerMap]:
    """Parameters with each distinct block once.

    Args:
      model: with `blocks`, of which those that share must be of one shape.
      layer_map: for every layer a number; equal numbers share.
      weights: of a shared block: the "mean" of its layers', or those of the "first".

    Returns:
      The parameters, and the map renumbered in the order of first use.

    Raises:
      InputError: a map of another length, a model without blocks, or blocks that differ.
    """
    if model.blocks is None:
        raise InputError("share: the model has no Blocks (or shares them already)")
    own = model.blocks.of(model.params)
    checked = check_layer_map(layer_map, len(own))
    groups = [
        [block for block, i in zip(own, checked) if i == number]
        for number in range(max(checked) + 1)
    ]
    shapes = {str(jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), block)) for block in own}
    if len(shapes) > 1:
        raise InputError("share: the blocks differ in shape or format")
    blended = [group[0] if weights == "first" else blend(group) for group in groups]
    return model.blocks.put(model.params, blended), checked


def blend(blocks: Sequence[Any]) -> Any:
    """The mean of the parameters of some blocks, in their own dtypes.

    Raises:
      InputError: compressed parameters, which have no mean of their own format.
    """
    if len(blocks) == 1:
        return blocks[0]
    if any(map(is_compressed, jax.tree.leaves(blocks, is_leaf=is_compressed))):
        raise InputError("share: compressed blocks have no mean; share first, or weights='first'")

    def mean(*leaves: Any) -> Any:
        total = sum(leaf.astype(jnp.float32) for leaf in leaves)
        return (total / len(leaves)).astype(leaves[0].dtype)

    return jax.tree.map(mean, *blocks)


@functools.lru_cache(maxsize=64)
def shared_functions(build: Callable[[Any], Functions], config: Any) -> Functions:
    """The pure functions of a config with a `layer_map`; equal configs give the same objects."""
    layer_map = check_layer_map(config.layer_map, config.num_layers)
    if layer_map != config.layer_map:
        raise InputError(f"layer_map {list(config.layer_map)}: write {list(layer_map)} for it")
    whole = build(dataclasses.replace(config, layer_map=()))
    blocks = whole.blocks or stored_under(LAYERS)
    cached = whole.apply_cached

    def init(key: Any) -> Any:
        params = whole.init(key)
        own = blocks.of(params)
        return blocks.put(params, [own[layer_map.index(i)] for i in range(max(layer_map) + 1)])

    return Functions(
        apply=SharedApply(whole.apply, blocks, layer_map),
        init=init,
        blocks=None,
        apply_cached=None if cached is None else SharedApply(cached, blocks, layer_map),
        init_cache=whole.init_cache,
    )


def shared_name_map(table: NameMap, layer_map: Sequence[int]) -> NameMap:
    """The rows of a table that parameters with shared blocks have: those of as many layers."""
    distinct = len(set(layer_map))
    rows = tuple(row for row in table.parameters if row.layer is None or row.layer < distinct)
    return dataclasses.replace(table, parameters=rows)


def stored_under(where: str) -> Blocks:
    """Where blocks lie, without a walk through them."""

    def none(*_: Any) -> Any:
        raise InputError("these blocks cannot be run one by one")

    return Blocks(none, none, none, where)
