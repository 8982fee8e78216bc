"""Pruning by the curvature of the loss, as a Kronecker product of two moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array, CompressedArray, dense
from jaxcompress.core.arrays.sparsify import Store
from jaxcompress.core.arrays.sparsify import store as kept
from jaxcompress.layerwise import Grid, grid_of, refine, solve
from jaxcompress.layerwise.batch import over_lead
from jaxcompress.layerwise.descent import search
from jaxcompress.layerwise.grid import parameters_of, stored
from jaxcompress.pruning.patterns import check_sparsity, parse_n_m

ROUNDS = 3  # of codes and scales in turn


def kronecker(
    weight: Array | CompressedArray,
    second_moment: Array,
    output_moment: Array | None = None,
    *,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    bits: int | None = None,
    group_size: int = 128,
    symmetric: bool = True,
    iterations: int = 60,
    damp: float = 0.01,
    output_damp: float = 0.1,
    store: Store = "zeros",
) -> Array | CompressedArray:
    """Prune by the curvature of the loss, mask and weights in turn: the best one-shot pruning here.

    A change D of a matrix costs the loss about tr(G D H D'): H tells what its inputs are, G what
    the loss makes of its outputs (Kronecker-factored curvature, Martens and Grosse,
    arXiv:1503.05671, section 3; to prune by it: van der Ouderaa et al., "The LLM Surgeon",
    arXiv:2312.17244). The mask is found by alternating directions (Meng et al., "ALPS",
    arXiv:2406.07831, algorithm 1, there with G = 1), from SparseGPT's (arXiv:2301.00774), and the
    weights are its least squares. With `bits` they are rounded before the next matrix is looked at,
    as in `coordinate`. As in `refit`, a matrix aims at the dense model's outputs.

    Args:
      weight: `[*lead, N, K]`.
      second_moment: H = X'X `[*lead, K, K]` of the inputs.
      output_moment: G `[*lead, N, N]` of the gradients by the outputs; None: all count alike.
      sparsity: fraction removed, exactly floor(sparsity * N * K); n:m ignores it.
      pattern: "unstructured", or n:m such as 2:4 (keep 2 of every 4 contracted columns).
      bits: round what is kept to an integer grid, by coordinate descent under the mask.
      group_size: of the grid: contracted columns that share a scale; -1: one scale per row.
      symmetric: of the grid: fixed zero in the middle of the codes.
      iterations: of the search for the mask.
      damp: added to H, as a share of its mean diagonal.
      output_damp: added to G, likewise: how much the outputs count alike.
      store: "zeros" in a dense array, "masked" (to train on), or a sparse array: see `docs`.

    Returns:
      The pruned matrix in the dims `[N, K]`.

    Raises:
      InputError: a sparsity outside of [0, 1), or a pattern that does not divide K.
    """
    check_sparsity(sparsity)
    grid = None
    if bits is not None:
        half = 16 if weight.dtype == jnp.float32 else 0
        grid = grid_of(bits=bits, group_size=group_size, symmetric=symmetric, scale_bits=half)
    each = _Alternating(sparsity, parse_n_m(pattern), grid, iterations, damp, output_damp)
    found, keep, known = over_lead(each, dense(weight), second_moment, output_moment)
    if grid is None:
        return kept(found.astype(weight.dtype), keep, store, pattern)
    return kept(stored(grid, found, *known, weight.dtype), keep, store, pattern)


@dataclass(frozen=True)
class _Alternating:
    """The search for one matrix and its moments."""

    sparsity: float
    n_m: tuple[int, int] | None
    grid: Grid | None
    iterations: int
    damp: float
    output_damp: float

    def __call__(
        self, weight: Array, second_moment: Array, output_moment: Array | None
    ) -> tuple[Array, Array, tuple[Any, Any] | None]:
        """Weights, mask, and of the grid what its groups have, and what they share."""
        weight, mask = self.pruned(weight, second_moment, output_moment)
        if self.grid is None:
            return weight, mask, None
        known = parameters_of(self.grid, weight)
        # The weights are the least squares of their mask, so that this is the distance to them.
        found = search(weight, second_moment, known, grid=self.grid, rounds=ROUNDS, damp=self.damp)
        return found.weight, mask, (found.parameters, known[1])

    def pruned(
        self, weight: Array, second_moment: Array, output_moment: Array | None
    ) -> tuple[Array, Array]:
        """Weights and mask, not rounded."""
        sparsity = 0.0 if self.n_m else self.sparsity
        start = solve(weight, second_moment, n_m=self.n_m, sparsity=sparsity, damp=self.damp)
        if start.mask is None:  # nothing goes
            return weight, jnp.ones(weight.shape, bool)
        found = refine(
            weight,
            start.weight,
            start.mask,
            second_moment,
            output_moment,
            n_m=self.n_m,
            iterations=self.iterations,
            damp=self.damp,
            output_damp=self.output_damp,
        )
        return found.weight, found.mask
