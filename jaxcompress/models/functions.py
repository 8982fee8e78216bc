"""What an architecture is made of once its config is fixed: pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxcompress.core.model import Blocks


@dataclass(frozen=True, eq=False)
class Functions:
    """Pure functions of one architecture.

    Attributes:
      apply: `apply(params, *inputs) -> outputs`.
      init: `init(key) -> params`, freshly drawn.
      blocks: the walk from block to block, where there is one.
      apply_cached: `apply_cached(params, ids, cache, index) -> (logits, cache)` for ids that
        stand at position `index` and after; None where the architecture has no cache.
      init_cache: `init_cache(batch, length) -> cache`.
    """

    apply: Callable[..., Any]
    init: Callable[..., Any]
    blocks: Blocks | None = None
    apply_cached: Callable[..., Any] | None = None
    init_cache: Callable[[int, int], Any] | None = None
