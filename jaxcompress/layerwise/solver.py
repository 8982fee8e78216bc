"""One blocked column solver: GPTQ on any grid, SparseGPT, and both at once.

Sources: Frantar et al., "GPTQ", arXiv:2210.17323, algorithm 1; Frantar and Alistarh, "SparseGPT",
arXiv:2301.00774, algorithm 1 and section 3.4 (n:m, and sparse and quantized in one pass).

The papers go through the columns of W `[N, K]` in order: q = what is kept of column i (snapped to
the grid, or zero), e = (w - q) / U_ii, and W -= e U_i for the columns that follow, where U is upper
and inv(H) = U'U. Summed up, E U = W - Q = D. So with R = inv(U) (see `factor`) the weights with
which a panel s of columns starts follow from those before it without ever forming U:

    V_s = W_s + D_<s R_<s,s U_ss

Inside a panel the papers' loop runs, in strips of few columns to keep the updates in the cache.
Arrays inside of the loops are transposed, `[K, N]`: a column of W is then contiguous.
"""

from __future__ import annotations

import math
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError
from jaxcompress.layerwise.columns import SMALL_GROUP, Plan, Problem, State, solve_panel
from jaxcompress.layerwise.factor import factor, without_dead
from jaxcompress.layerwise.grid import Grid, group_width, parameters_of

STRIP = 16  # columns between two updates of the rest of a panel; 8 is alike, 32 is slower


class Solution(NamedTuple):
    """A compressed matrix.

    Attributes:
      weight: float32 `[N, K]`, on the grid, with exact zeros where entries were removed.
      parameters: of the grid, every leaf `[N, groups]`; None without a grid.
      mask: bool `[N, K]`, True = kept; None where nothing was to be removed.
      damp: float32 `[]`: the damping that was used; more than asked for where the second moment
        is singular; the weight is NaN where it is not finite.
      share: of the grid, what its groups have in common; None without a grid.
    """

    weight: Array
    parameters: Any
    mask: Array | None
    damp: Array
    share: Any = None


def solve(
    weight: Array,
    second_moment: Array,
    *,
    grid: Grid | None = None,
    parameters: tuple[Any, Any] | None = None,
    n_m: tuple[int, int] | None = None,
    sparsity: float | Array = 0.0,
    keep: Array | None = None,
    act_order: bool = False,
    damp: float | Array = 0.01,
    block: int = 128,
) -> Solution:
    """Quantizes or prunes a matrix, or both, so that its products change least.

    Minimizes tr((Q - W) H (Q - W)') greedily, column after column, H the second moment of the
    inputs. Of `n_m`, `sparsity` and `keep` at most one; with none of them and no grid the result
    is W. An input that was never active (H_ii = 0) gets the weight 0.

    Compiled once for each shape and set of options; `sparsity` and `damp` do not matter. `vmap`
    makes it a batch of matrices, and `shard_map` of that a batch on a mesh without collectives.

    Args:
      weight: W, float `[N, K]`.
      second_moment: X'X `[K, K]` of the inputs X `[tokens, K]`, in any scale.
      grid: the values that are allowed; None: any.
      parameters: of the grid's groups, each leaf `[N, groups]`, and what they share, as
        `grid.parameters_of` gives them; None: found from the weights.
      n_m: (n, m): keep n of every m consecutive columns of a row.
      sparsity: fraction removed of each `block` columns; exactly floor(sparsity * N * K) in all.
        Or how many entries, an integer array `[]`, which a batch may have one of for each matrix.
      keep: bool `[N, K]`, True where an entry stays.
      act_order: go through the columns by falling activation (GPTQ's `act_order`); with `n_m`,
        whole runs of m by the activation of their columns together.
      damp: fraction of the mean of H's diagonal that is added to it.
      block: columns of a panel; a group size that is found on the way may change it.

    Raises:
      InputError: options that exclude each other, or sizes that do not divide.
    """
    rows, columns = weight.shape
    removed = removed_entries(sparsity, rows * columns)
    if sum((n_m is not None, removed is not None, keep is not None)) > 1:
        raise InputError("solve: give one of n_m, sparsity and keep")
    if act_order and grid is not None and grid.group_size and not grid.static:
        raise InputError("solve: act_order needs a grid whose groups are static")
    if parameters is not None and not (grid is not None and grid.static):
        raise InputError("solve: given parameters need a static grid")
    plan = _plan(columns, grid, n_m, act_order, block)
    return _solve(plan, weight, second_moment, parameters, keep, removed, jnp.float32(damp))


def removed_entries(sparsity: float | Array, entries: int) -> Array | None:
    """How many of `entries` go: exactly floor(sparsity * entries), uint32 `[]`; None: none at all.

    Args:
      sparsity: a fraction, read as a decimal; or the count itself, an integer array.
      entries: of the unit of selection.

    Raises:
      InputError: the fraction lies outside of [0, 1), or there are too many entries to count.
    """
    if hasattr(sparsity, "dtype") and jnp.issubdtype(sparsity.dtype, jnp.integer):
        count: Any = sparsity
    elif not 0 <= sparsity < 1:
        raise InputError(f"sparsity {sparsity}: must be a fraction in [0, 1), such as 0.5")
    elif sparsity == 0:
        return None
    else:
        count = int(Decimal(repr(float(sparsity))) * entries)
    if entries >= 2**32:
        raise InputError(f"sparsity of {entries} entries: too many to count; split the rows")
    return jnp.asarray(count, jnp.uint32)


def _plan(
    columns: int, grid: Grid | None, n_m: tuple[int, int] | None, act_order: bool, block: int
) -> Plan:
    if n_m and not 0 < n_m[0] < n_m[1]:
        raise InputError(f"pattern {n_m}: n of every m are kept, 0 < n < m")
    run = n_m[1] if n_m else 1
    if columns % run:
        raise InputError(f"pattern {n_m}: {run} does not divide the {columns} contracted columns")
    group = group_width(grid, columns) if grid else columns
    strip = run * max(1, STRIP // run)
    panel = strip * max(1, block // strip)
    if grid is not None and grid.group_size and not grid.static:
        if group % run:
            raise InputError(f"pattern {n_m}: {run} does not divide the group size {group}")
        if group <= SMALL_GROUP:
            strip, panel = group, group * max(1, block // group)
        else:
            strip, panel = run * math.gcd(group // run, max(1, STRIP // run)), group
    return Plan(columns, panel, strip, grid, group, n_m, act_order)


@partial(jax.jit, static_argnums=0)
def _solve(
    plan: Plan,
    weight: Array,
    second_moment: Array,
    parameters: tuple[Any, Any] | None,
    keep: Array | None,
    removed: Array | None,
    damp: Array,
) -> Solution:
    with jax.default_matmul_precision("highest"):
        moment, dead = without_dead(second_moment)
        weight = jnp.where(dead, 0, weight.astype(jnp.float32))
        order = _falling(plan, jnp.diagonal(moment)) if plan.act_order else None
        known = parameters or _parameters(plan, weight)
        problem = _prepare(plan, weight, moment, known[1], keep, removed, damp, order)
        start = _start(plan, problem, jax.tree.map(jnp.transpose, known[0]))
        state = lax.fori_loop(0, plan.panels, partial(solve_panel, plan, problem), start)
        result, gone = state.result, state.gone
        if order is not None:
            back = jnp.argsort(order)
            result, gone = jax.tree.map(lambda x: x[back], (result, gone))
        return Solution(
            result[: plan.columns].T,
            jax.tree.map(jnp.transpose, state.parameters),
            None if gone is None else ~gone[: plan.columns].T,
            problem.factor.damp,
            problem.share,
        )


def _falling(plan: Plan, activation: Array) -> Array:
    """The columns by falling activation `[K]`; runs of n:m stay together."""
    run = plan.n_m[1] if plan.n_m else 1
    runs = jnp.argsort(-activation.reshape(-1, run).sum(-1))
    return (run * runs[:, None] + jnp.arange(run)).reshape(-1)


def _prepare(
    plan: Plan,
    weight: Array,
    moment: Array,
    share: Any,
    keep: Array | None,
    removed: Array | None,
    damp: Array,
    order: Array | None,
) -> Problem:
    group = jnp.arange(plan.columns) // plan.group
    if order is not None:
        moment = moment[order][:, order]
        weight, group = weight[:, order], group[order]
        keep = None if keep is None else keep[:, order]

    def padded(x: Array) -> Array:
        return jnp.pad(x.T, ((0, plan.pad), (0, 0)))

    return Problem(
        padded(weight),
        None if keep is None else padded(keep),
        None if removed is None else _quotas(plan, removed),
        jnp.pad(group, (0, plan.pad)),
        factor(moment, damp, plan.panel),
        share,
    )


def _quotas(plan: Plan, removed: Array) -> Array:
    """How many of `removed` entries go in each panel: shares of its columns, the sum exact."""
    ends = jnp.minimum(jnp.arange(plan.panels + 1, dtype=jnp.uint32) * plan.panel, plan.columns)
    each, rest = jnp.divmod(removed, plan.columns)
    until = each * ends + rest * ends // plan.columns  # floor(removed * ends / K), no overflow
    return jnp.diff(until)


def _parameters(plan: Plan, weight: Array) -> tuple[Any, Any]:
    """Of the groups, `[N, groups]`, zeros where the loop finds them; and what they share."""
    if plan.grid is None:
        return None, None
    if not plan.finds_at:
        return parameters_of(plan.grid, weight)
    shapes, _ = jax.eval_shape(partial(parameters_of, plan.grid), weight)
    zeros = jax.tree.map(lambda s: jnp.zeros_like(weight, s.dtype, s.shape), shapes)
    return zeros, plan.grid.share(weight)


def _start(plan: Plan, problem: Problem, parameters: Any) -> State:
    zeros = jnp.zeros_like(problem.weight)
    gone = None
    if plan.n_m or problem.keep is not None or problem.quota is not None:
        gone = jnp.zeros_like(zeros, bool)
    return State(zeros, zeros, gone, parameters)
