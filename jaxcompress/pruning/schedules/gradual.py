"""Cubic gradual pruning while a network trains."""

from __future__ import annotations

import optax

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError
from jaxcompress.pruning.patterns import Scope, check_sparsity, parse_block
from jaxcompress.pruning.schedules.masked import Moment, every, lowest_removed, masked
from jaxcompress.pruning.schedules.targets import Matrices, Targets
from jaxcompress.pruning.scores import magnitude


def cubic(initial: float, final: float, times: int) -> list[float]:
    """Sparsities at the pruning times 0, ..., `times`.

    s = final + (initial - final) (1 - i / times)^3: equation 1 of Zhu and Gupta, arXiv:1710.01878.
    """
    if times < 1:
        return [final]
    # At the ends exactly what is asked.
    between = [final + (initial - final) * (1 - i / times) ** 3 for i in range(1, times)]
    return [initial, *between, final]


def gradual(
    inner: optax.GradientTransformation,
    where: Targets,
    *,
    sparsity: float,
    begin: int,
    end: int,
    interval: int,
    initial_sparsity: float = 0.0,
    pattern: str = "unstructured",
    scope: Scope = "layer",
) -> optax.GradientTransformation:
    """The optimizer, and every `interval` steps the lowest magnitudes go, ever fewer at a time.

    Source: Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878, section 3.

    Args:
      inner: the optimizer.
      where: what is pruned.
      sparsity: s_f, reached at the last pruning.
      begin: t_0, the step (counted from 0) after which the first pruning is.
      end: no pruning is after a later step; the first and the last one are a whole number of
        intervals apart.
      interval: steps between two prunings.
      initial_sparsity: s_i, of the first pruning.
      pattern: "unstructured" or `block:RxC`.
      scope: what has the sparsity: every "layer", every "row", or "global".

    Raises:
      InputError: a number out of range.
    """
    check_sparsity(sparsity)
    check_sparsity(initial_sparsity)
    check_unstructured(pattern)
    if initial_sparsity > sparsity:
        raise InputError(f"initial_sparsity {initial_sparsity}: more than the final {sparsity}")
    if interval < 1 or not 0 <= begin < end:
        raise InputError(
            f"begin {begin}, end {end}, interval {interval}: prunings need 0 <= begin < end, and "
            "an interval of 1 step or more"
        )
    times = (end - begin) // interval
    sparsities = cubic(initial_sparsity, sparsity, times)

    def rule(now: Moment) -> Matrices:
        scores = {path: magnitude(weight) for path, weight in now.weights.items()}
        index: Array = (now.step - begin) // interval
        found = lowest_removed(scores, sparsities, index, pattern=pattern, scope=scope)
        return {path: mask & now.masks[path] for path, mask in found.items()}

    return masked(inner, where, rule, every(begin, begin + times * interval, interval))


def check_unstructured(pattern: str) -> None:
    """Raise `InputError` for a pattern of which a schedule cannot remove ever more."""
    if pattern != "unstructured" and parse_block(pattern) is None:
        raise InputError(f"pattern {pattern!r}: use unstructured or block:RxC here")
