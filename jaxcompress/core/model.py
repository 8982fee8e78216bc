"""`Model` and `Blocks`: what turns a function and its parameters into a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Blocks:
    """The walk from block to block that calibrated methods take.

    `embed(params, *inputs) -> hidden`, then `block(block_params, hidden) -> hidden` for every
    block, then `head(params, hidden) -> outputs`. The parameters of the blocks stand under the
    path `where`: stacked along a leading axis, or one child per block in order.
    """

    embed: Callable[..., Any]
    block: Callable[..., Any]
    head: Callable[..., Any]
    where: str = "layers"


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
