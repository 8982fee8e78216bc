"""`Model` and `Blocks`: what turns a function and its parameters into a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import is_compressed


@dataclass(frozen=True)
class Blocks:
    """The walk from block to block that calibrated methods take.

    `embed(params, *inputs) -> hidden`, then `block(block_params, hidden) -> hidden` for every
    block, then `head(params, hidden) -> outputs`. The parameters of the blocks stand under the
    path `where`: stacked along a leading axis, or one child per block in order.
    `trunk(params, *inputs) -> hidden`, where given, is everything before the head in one piece
    (a scan over stacked blocks, rematerialized): what training runs instead of the walk.
    """

    embed: Callable[..., Any]
    block: Callable[..., Any]
    head: Callable[..., Any]
    where: str = "layers"
    trunk: Callable[..., Any] | None = None

    def of(self, params: Any) -> list[Any]:
        """Parameters of each block in order, from stacked ones or from one child per block."""
        stored = params
        for key in self.where.split("/"):
            stored = stored[key]
        if isinstance(stored, (list, tuple)):
            return list(stored)
        if isinstance(stored, Mapping) and stored and all(str(k).isdigit() for k in stored):
            return [stored[k] for k in sorted(stored, key=int)]
        length = len(jax.tree.leaves(stored, is_leaf=is_compressed)[0])
        return [
            jax.tree.map(lambda leaf, i=i: leaf[i], stored, is_leaf=is_compressed)
            for i in range(length)
        ]

    def put(self, params: Any, blocks: Sequence[Any]) -> Any:
        """`params` with these blocks, stored the way that `params` stores its own."""
        *outer, last = self.where.split("/")

        def rebuilt(tree: Any, keys: list[str]) -> Any:
            if keys:
                return {**tree, keys[0]: rebuilt(tree[keys[0]], keys[1:])}
            stored = tree[last]
            if isinstance(stored, (list, tuple)):
                return {**tree, last: type(stored)(blocks)}
            if isinstance(stored, Mapping) and all(str(k).isdigit() for k in stored):
                return {**tree, last: {str(i): block for i, block in enumerate(blocks)}}
            return {**tree, last: jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}

        return rebuilt(params, outer)

    def hidden(self, params: Any, *inputs: Any) -> Any:
        """What the head is given: hidden states, `[batch, seq, d]` in language models."""
        if self.trunk is not None:
            return self.trunk(params, *inputs)
        hidden = self.embed(params, *inputs)
        for block in self.of(params):
            hidden = self.block(block, hidden)
        return hidden

    def run(self, params: Any, *inputs: Any) -> Any:
        """Outputs of the whole walk; equals `apply(params, *inputs)` of the model."""
        return self.head(params, self.hidden(params, *inputs))


@dataclass(frozen=True)
class Model:
    """A pure function of a parameter pytree, and what is known about it.

    Attributes:
      apply: `apply(params, *inputs) -> outputs`; language models: `[batch, seq]` token ids to
        `[batch, seq, vocab]` logits.
      params: any pytree; leaves may be compressed arrays, `jaxcompress.lift(apply)` runs them.
      blocks: the walk from block to block, where there is one.
      config: the architecture (one of the frozen dataclasses of `jaxcompress.models`), or None.
      tokenizer: an object with `encode(text) -> ids` and `decode(ids) -> text`, or None.
      source: the checkpoint directory it was loaded from, or None: where the files that travel
        along with the weights (tokenizer, generation config) are.
    """

    apply: Callable[..., Any]
    params: Any
    blocks: Blocks | None = None
    config: Any = None
    tokenizer: Any = None
    source: str | None = None
    notes: tuple[str, ...] = field(default=())

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Outputs of the model, compressed leaves included."""
        from jaxcompress.core.readers.lift import lift

        return lift(self.apply)(self.params, *inputs, **kwargs)

    def replace(self, **changes: Any) -> Model:
        """A copy with other parameters, config, ..."""
        return replace(self, **changes)


def of_arrays(model: Model) -> tuple[Model, Callable[[Model], Model]]:
    """The model without what is no array among its parameters, and the way back.

    Trees of modules (Equinox) hold activation functions, sizes and names besides arrays. They move
    into the functions of the first result, where None stands for them in the parameters.

    Args:
      model: any; one whose parameters are all arrays comes back as it is.

    Returns:
      The model of arrays; and what takes a model that was made of it, under the same function or
      another, to one for which the parameters are complete, where it still is the same function.
    """
    if all(_is_array(leaf) for leaf in jax.tree.leaves(model.params, is_leaf=is_compressed)):
        return model, lambda made: made
    others = jax.tree.map(
        lambda leaf: None if _is_array(leaf) else leaf, model.params, is_leaf=is_compressed
    )
    params = jax.tree.map(
        lambda leaf: leaf if _is_array(leaf) else None, model.params, is_leaf=is_compressed
    )

    def whole(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *args, **kwargs: function(_joined(params, others), *args, **kwargs)

    walk = model.blocks
    if walk is not None:
        of_block = walk.of(others)[0]  # as equal in all blocks as their function is
        one = walk.block
        walk = Blocks(
            whole(walk.embed),
            lambda params, hidden: one(_joined(params, of_block), hidden),
            whole(walk.head),
            walk.where,
            None if walk.trunk is None else whole(walk.trunk),
        )
    bare = model.replace(apply=whole(model.apply), params=params, blocks=walk)

    def restored(made: Model) -> Model:
        if made.apply is not bare.apply:
            return made
        blocks = model.blocks if made.blocks is bare.blocks else None
        complete = _joined(made.params, others)
        return made.replace(apply=model.apply, params=complete, blocks=blocks)

    return bare, restored


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def _joined(params: Any, others: Any) -> Any:
    return jax.tree.map(
        lambda leaf, other: other if leaf is None else leaf,
        params,
        others,
        is_leaf=lambda leaf: leaf is None or is_compressed(leaf),
    )
