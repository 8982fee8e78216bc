"""Paths of leaves in any pytree: keys, attribute names and indices joined by `/`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxcompress.core.arrays.base import is_compressed


def path_str(path: tuple[Any, ...]) -> str:
    """`layers/0/attn/q_proj/kernel` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_paths(tree: Any) -> list[tuple[str, Any]]:
    """Leaves of `tree` with their paths; a compressed array counts as one leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_compressed)
    return [(path_str(path), leaf) for path, leaf in flat]


def map_with_paths(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """`fn(path, leaf)` on every leaf; a compressed array counts as one leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(path_str(path), leaf), tree, is_leaf=is_compressed
    )
