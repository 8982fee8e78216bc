"""SparseGPT: entries go column after column, and the columns that follow make up for them."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array, CompressedArray, dense
from jaxcompress.core.arrays.sparsify import Store
from jaxcompress.core.arrays.sparsify import store as kept
from jaxcompress.layerwise import Grid, Solution, grid_of, solve
from jaxcompress.layerwise.batch import over_lead
from jaxcompress.layerwise.grid import stored
from jaxcompress.pruning.patterns import check_sparsity, parse_n_m


def sparsegpt(
    weight: Array | CompressedArray,
    second_moment: Array,
    *,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    bits: int | None = None,
    group_size: int = 128,
    symmetric: bool = True,
    act_order: bool | None = None,
    damp: float = 0.01,
    store: Store = "zeros",
) -> Array | CompressedArray:
    """SparseGPT: prune column by column, the columns that follow make up for it.

    Source: Frantar and Alistarh, arXiv:2301.00774, algorithm 1; with `bits`, pruning and
    quantization in one pass, section 3.5.

    Args:
      weight: `[*lead, N, K]`.
      second_moment: X'X `[*lead, K, K]` of the inputs.
      sparsity: fraction removed, exactly floor(sparsity * N * K); n:m ignores it.
      pattern: "unstructured", or n:m such as 2:4 (keep 2 of every 4 contracted columns).
      bits: round what is kept to an integer grid in the same pass.
      group_size: of the grid: contracted columns that share a scale; -1: one scale per row.
      symmetric: of the grid: fixed zero in the middle of the codes.
      act_order: go through the columns by falling activation, runs of n:m as wholes; by default
        where both n:m and `bits` are asked for.
      damp: added to X'X, as a share of its mean diagonal.
      store: "zeros" in a dense array, "masked" (to train on), or a sparse array: see `docs`.

    Returns:
      The pruned matrix in the dims `[N, K]`.

    Raises:
      InputError: a sparsity outside of [0, 1), or a pattern or group size that does not divide K.
    """
    check_sparsity(sparsity)
    grid = None
    if bits is not None:
        grid = grid_of(bits=bits, group_size=group_size, symmetric=symmetric)
    n_m = parse_n_m(pattern)
    order = bool(n_m and bits) if act_order is None else act_order
    each = ColumnSolver(sparsity, n_m, grid, damp, order)
    found = over_lead(each, dense(weight), second_moment)
    mask = jnp.ones(found.weight.shape, bool) if found.mask is None else found.mask
    if grid is None:
        return kept(found.weight.astype(weight.dtype), mask, store, pattern)
    rounded = stored(grid, found.weight, found.parameters, found.share, weight.dtype)
    return kept(rounded, mask, store, pattern)


@dataclass(frozen=True)
class ColumnSolver:
    """`layerwise.solve` with its options, for one matrix and its second moment."""

    sparsity: float
    n_m: tuple[int, int] | None
    grid: Grid | None
    damp: float
    act_order: bool = False

    def __call__(self, weight: Array, second_moment: Array) -> Solution:
        """The solver's result."""
        return solve(
            weight,
            second_moment,
            grid=self.grid,
            n_m=self.n_m,
            sparsity=0.0 if self.n_m else self.sparsity,
            act_order=self.act_order,
            damp=self.damp,
        )
