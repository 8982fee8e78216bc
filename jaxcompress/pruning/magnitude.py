"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.affine import Affine, encode_affine
from jaxcompress.core.arrays.base import STORED, Array, CompressedArray, dense
from jaxcompress.core.arrays.sparse import NMSparse, UnstructuredSparse
from jaxcompress.core.arrays.training import Masked
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Matrices
from jaxcompress.pruning import patterns


def magnitude(
    weight: Array | Affine,
    *,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    scope: Literal["layer", "row", "global"] = "layer",
    rounding: Literal["floor", "nearest"] = "floor",
    store: Literal["zeros", "sparse", "masked"] = "zeros",
) -> Array | CompressedArray:
    """Magnitude pruning: the entries with the smallest absolute value go.

    Source: Han et al., "Learning both Weights and Connections", arXiv:1506.02626, section 3; the
    n:m pattern: Mishra et al., arXiv:2104.08378, section 2.

    Args:
      weight: `[*lead, N, K]`, float or affine.
      sparsity: fraction removed, exactly floor(sparsity * n) of each unit; n:m ignores it.
      pattern: "unstructured", or n:m such as 2:4 (keep 2 of every 4 contracted columns).
      scope: the unit in which the fraction is exact: every layer, every row, or all together (the
        matrices that `compress` selects; called by itself, those of `weight`).
      rounding: "floor", or "nearest" as `torch.nn.utils.prune` rounds.
      store: "zeros" in a dense array, "sparse" (values and positions) or "masked" (to train on).

    Returns:
      The pruned matrix in the dims `[N, K]`. An affine matrix stays affine on its own grid, which
      holds zero exactly.
    """
    mask = _local_mask(dense(weight), sparsity, pattern, scope, rounding)
    return _store(weight, mask, store, pattern)


def survey_global(
    matrices: Matrices,
    *,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    scope: str = "layer",
    rounding: str = "floor",
    store: str = "zeros",
) -> list[Callable[[Array], Array | CompressedArray]] | None:
    """For scope "global": what to do with each matrix, by one threshold over all of them."""
    if scope != "global" or patterns.parse_n_m(pattern) is not None:
        return None

    def scores() -> Iterator[np.ndarray]:
        return (np.abs(np.asarray(dense(matrix), np.float32)) for matrix, _ in matrices())

    thresholds = patterns.global_thresholds(scores, sparsity, rounding)

    def pruned(threshold: patterns.Threshold, weight: Array) -> Array | CompressedArray:
        mask = patterns.keep_above(jnp.abs(dense(weight)), threshold)
        return _store(weight, mask, store, pattern)

    return [partial(pruned, threshold) for threshold in thresholds]


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _local_mask(weight: Array, sparsity: float, pattern: str, scope: str, rounding: str) -> Array:
    scores = jnp.abs(weight)
    n_m = patterns.parse_n_m(pattern)
    if n_m:
        return patterns.keep_n_of_m(scores, *n_m)
    if scope == "global":
        flat = scores.reshape(1, -1)
        return patterns.keep_per_row(flat, sparsity, rounding).reshape(scores.shape)
    keep = patterns.keep_per_row if scope == "row" else patterns.keep_per_layer
    return keep(scores, sparsity, rounding)


def _store(
    weight: Array | Affine, mask: Array, store: str, pattern: str
) -> Array | CompressedArray:
    pruned = jnp.where(mask, dense(weight), 0).astype(weight.dtype)
    if isinstance(weight, Affine):
        if store != "zeros":
            raise InputError(f"store {store}: a quantized matrix keeps its format; prune it first")
        return encode_affine(
            pruned.astype(weight.scale.dtype),
            weight.scale,
            weight.zero_point,
            bits=weight.bits,
            dims=STORED,
            casts=weight.casts,
        )
    if store == "masked":
        return Masked(weight, mask, dims=STORED, casts=(str(weight.dtype),))
    if store == "sparse":
        n_m = patterns.parse_n_m(pattern)
        if n_m:
            return NMSparse.from_mask(pruned, mask, *n_m, dims=STORED)
        # Traced, the largest count of a row is unknown: room for every column then.
        cap = mask.shape[-1] if isinstance(mask, jax.core.Tracer) else None
        return UnstructuredSparse.from_mask(pruned, mask, cap=cap, dims=STORED)
    return pruned
