"""Refit: a mask, and the weights that it keeps fitted anew to what the dense model gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array, CompressedArray, dense
from jaxcompress.core.arrays.sparsify import Store
from jaxcompress.core.arrays.sparsify import store as kept
from jaxcompress.layerwise import refit as least_squares
from jaxcompress.layerwise import solve
from jaxcompress.layerwise.batch import over_lead
from jaxcompress.pruning.patterns import (
    check_sparsity,
    keep_n_of_m,
    keep_per_layer,
    keep_per_row,
    parse_n_m,
)

Mask = Literal["sparsegpt", "wanda", "magnitude"]


def refit(
    weight: Array | CompressedArray,
    second_moment: Array,
    *,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    mask: Mask = "sparsegpt",
    iterations: int = 16,
    damp: float = 0.01,
    store: Store = "zeros",
) -> Array | CompressedArray:
    """Prune, then fit the kept weights anew by least squares, aiming at the dense outputs.

    The outputs' squared error is a quadratic in the kept weights of a row; conjugate gradients
    take it to its minimum, where SparseGPT (arXiv:2301.00774) stops after one greedy pass. By
    default a matrix aims at the dense model's outputs from the inputs that the model pruned so far
    gives, matrix after matrix (`sequential="matrix"`, `dense_target`), as GPTAQ
    (arXiv:2504.02692) does for quantization.

    Args:
      weight: `[*lead, N, K]`.
      second_moment: X'X `[*lead, K, K]` of the inputs.
      sparsity: fraction removed; n:m ignores it.
      pattern: "unstructured", or n:m such as 2:4 (keep 2 of every 4 contracted columns).
      mask: what chooses the entries: "sparsegpt" (whose weights are also the start), "wanda" (per
        row, arXiv:2306.11695) or "magnitude" (per layer).
      iterations: steps of conjugate gradients, at most.
      damp: of SparseGPT, as a share of the mean diagonal of X'X.
      store: "zeros" in a dense array, "masked" (to train on), or a sparse array: see `docs`.

    Returns:
      The pruned matrix in the dims `[N, K]`.

    Raises:
      InputError: a sparsity outside of [0, 1), or a pattern that does not divide K.
    """
    check_sparsity(sparsity)
    each = Refitted(sparsity, parse_n_m(pattern), mask, iterations, damp)
    found, keep = over_lead(each, dense(weight), second_moment)
    return kept(found.astype(weight.dtype), keep, store, pattern)


@dataclass(frozen=True)
class Refitted:
    """A mask and the refit under it, for one matrix and its second moment."""

    sparsity: float
    n_m: tuple[int, int] | None
    mask: str
    iterations: int
    damp: float

    def __call__(self, weight: Array, second_moment: Array) -> tuple[Array, Array]:
        """Weights and mask."""
        start, keep = self.start(weight, second_moment)
        fitted = least_squares(weight, start, keep, second_moment, iterations=self.iterations)
        return fitted.weight, keep

    def start(self, weight: Array, second_moment: Array) -> tuple[Array, Array]:
        """First weights and the mask."""
        if self.mask == "sparsegpt":
            sparsity = 0.0 if self.n_m else self.sparsity
            found = solve(weight, second_moment, n_m=self.n_m, sparsity=sparsity, damp=self.damp)
            if found.mask is None:
                return weight, jnp.ones(weight.shape, bool)
            return found.weight, found.mask
        scores = jnp.abs(weight)
        if self.mask == "wanda":
            scores = scores * jnp.sqrt(jnp.diagonal(second_moment))
        if self.n_m:
            return weight, keep_n_of_m(scores, *self.n_m)
        per = keep_per_row if self.mask == "wanda" else keep_per_layer
        return weight, per(scores, self.sparsity)
