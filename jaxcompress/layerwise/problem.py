"""The 2-D problem that every solver sees: a stored matrix, and statistics of what it multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from jaxcompress.core.arrays.base import (
    STORED,
    CompressedArray,
    Dims,
    dims_of,
    from_matrix,
    is_compressed,
    to_matrix,
)
from jaxcompress.core.arrays.views import with_dims
from jaxcompress.core.errors import InputError


class StoredMatrix:
    """A leaf seen as the stored matrix `[*lead, N, K]`, and the way back."""

    def __init__(self, leaf: Any, dims: Dims) -> None:
        self.leaf, self.dims = leaf, dims

    @classmethod
    def of(cls, path: str, leaf: Any, axes: Mapping[str, tuple[int, ...]] | None) -> StoredMatrix:
        """The matrix of a leaf, by its own dims, the given contracted axes, or as a kernel."""
        if is_compressed(leaf):
            return cls(leaf, leaf.dims)
        if leaf.ndim < 2:
            raise InputError(f"{path}: has shape {leaf.shape}, only matrices can be compressed")
        if axes is not None and path in axes:
            contracted = tuple(axes[path])
            lead = getattr(axes[path], "lead", 0)
        elif axes is not None:
            raise InputError(f"{path}: no product in `axes` reads it; exclude it, or name its axes")
        else:
            contracted, lead = (leaf.ndim - 2,), leaf.ndim - 2
        return cls(leaf, dims_of(leaf.shape[lead:], tuple(a - lead for a in contracted)))

    @property
    def window(self) -> tuple[int, ...]:
        """Sizes of a convolution's window, which is folded into K; () for any other matrix."""
        if is_compressed(self.leaf):
            return ()
        tail = self.leaf.shape[self.leaf.ndim - len(self.dims) :]
        contracted = [size for (kind, _), size in zip(self.dims, tail, strict=True) if kind == "k"]
        return tuple(contracted[:-1]) if len(contracted) > 2 else ()

    def matrix(self) -> Any:
        """`[*lead, N, K]`: an array, or a compressed array with these dims."""
        if is_compressed(self.leaf):
            return with_dims(self.leaf, STORED)
        return to_matrix(jnp.asarray(self.leaf), self.dims)

    def put_back(self, result: Any) -> Any:
        """The leaf that takes the place of this one."""
        if isinstance(result, CompressedArray):
            return with_dims(result, self.dims)
        return from_matrix(result, self.dims)


@dataclass(frozen=True)
class Problem:
    """One matrix to compress.

    Attributes:
      path: of its leaf; a block of stacked ones adds its index, as in `layers/up/kernel[3]`.
      matrix: `[*lead, N, K]`, an array or a compressed array.
      statistics: by name, `[*lead, ...]`; see `layerwise.observe`.
      options: of this matrix alone.
    """

    path: str
    matrix: Any
    statistics: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
