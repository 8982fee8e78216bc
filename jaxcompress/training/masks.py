"""Zeros that stay: dense arrays with removed entries, held at zero while they train."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import dims_of, from_matrix, is_compressed, register, to_matrix
from jaxcompress.core.arrays.training import Masked
from jaxcompress.core.paths import leaves_with_paths, map_with_paths

# Trained weights are hardly ever exactly 0; an embedding may hold a row of zeros for padding.
LEAST_SPARSITY = 0.05


@register
class HeldZeros(Masked):
    """`Masked` that stands for a dense array, and trains where dense arrays train."""

    trains = {"weight": "dense"}


def hold_zeros(params: Any, *, spared: Iterable[str] = ()) -> tuple[Any, tuple[str, ...]]:
    """`params` with every pruned dense matrix as `HeldZeros`, and the paths of those.

    Args:
      params: arrays with two axes or more of which at least 5 % are exactly 0 count as pruned,
        but for those that hold nothing else: so begin biases that are stacked. Compressed leaves
        keep their own form.
      spared: paths that stay as they are.
    """
    others = set(spared)
    held = tuple(
        path for path, leaf in leaves_with_paths(params) if path not in others and is_pruned(leaf)
    )

    def mask(path: str, leaf: Any) -> Any:
        if path not in held:
            return leaf
        dims = dims_of(leaf.shape[-2:], (0,))
        weight = to_matrix(leaf, dims)
        return HeldZeros(weight, weight != 0, dims=dims, casts=(str(leaf.dtype),))

    return map_with_paths(mask, params), held


def release(params: Any, held: tuple[str, ...]) -> Any:
    """The dense arrays of what `hold_zeros` masked."""

    def plain(path: str, leaf: Any) -> Any:
        return from_matrix(leaf.decode(), leaf.dims) if path in held else leaf

    return map_with_paths(plain, params)


def is_pruned(leaf: Any) -> bool:
    """Whether `hold_zeros` takes a leaf for a pruned matrix."""
    if is_compressed(leaf) or not hasattr(leaf, "ndim") or leaf.ndim < 2:
        return False
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.size:
        return False
    share, is_zero = _zeros(leaf)
    return bool(share >= LEAST_SPARSITY and not is_zero)


@jax.jit
def _zeros(x: Any) -> tuple[Any, Any]:
    """The share of zeros, and whether there is nothing else."""
    return jnp.mean(x == 0, dtype=jnp.float32), jnp.all(x == 0)
