"""Figures of single matrices for the report: errors, damping, saturation; told while they arise.

    with collecting() as told:
        result = solve(problem)     # inside, somebody calls record(damp=...)

What methods compute is the same with and without a collector.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import dense
from jaxcompress.layerwise.refit import squared_error

_collector: ContextVar[dict[str, Any] | None] = ContextVar("figures", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[dict[str, Any]]:
    """The figures that are recorded inside, by name."""
    told: dict[str, Any] = {}
    token = _collector.set(told)
    try:
        yield told
    finally:
        _collector.reset(token)


def record(**figures: Any) -> None:
    """Tell figures of the matrix at hand, arrays of its leading axes; nothing while tracing."""
    told = _collector.get()
    if told is not None and not any(isinstance(x, jax.core.Tracer) for x in figures.values()):
        told |= figures


def or_nearest(
    weight: jax.Array,
    nearest: tuple[jax.Array, Any],
    found: tuple[jax.Array, Any],
    moment: jax.Array,
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """A result of one matrix, or where its second moment is not finite, the nearest values.

    Args:
      weight: `[N, K]`.
      nearest: the rounded weight, and its parameters.
      found: the result and its parameters.
      moment: second moment `[K, K]` of the inputs.

    Returns:
      Weight, parameters, and the figures `fallback` and those of `losses`.
    """
    broken = ~jnp.isfinite(moment).all()
    kept, parameters = jax.tree.map(partial(jnp.where, broken), nearest, found)
    return kept, parameters, {"fallback": broken} | losses(weight, nearest[0], kept, moment)


def losses(
    weight: jax.Array, nearest: jax.Array, result: jax.Array, second_moment: jax.Array
) -> dict[str, jax.Array]:
    """Squared errors of the outputs as shares of their squares: of rounding, and of a result.

    Args:
      weight: `[N, K]`.
      nearest: rounded to nearest.
      result: what a method made of it.
      second_moment: X'X `[K, K]` of the inputs.
    """
    whole = squared_error(weight, jnp.zeros_like(weight), second_moment).sum()
    before, after = (squared_error(weight, x, second_moment).sum() for x in (nearest, result))
    whole = jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)
    return {"loss_nearest": before / whole, "loss": after / whole}


def of_result(leaf: Any) -> dict[str, Any]:
    """What can be seen on a compressed matrix `[*lead, N, K]`, each `[*lead]`.

    Returns:
      Of integers `saturation`, the share of codes at either end, and `bad_scales`, how many scales
      are 0 or not finite; nothing of other leaves.
    """
    return _of_integers(leaf) if isinstance(leaf, Affine) else {}


@jax.jit
def _of_integers(leaf: Affine) -> dict[str, jax.Array]:
    codes = leaf.integers()
    ends = (codes == 0) | (codes == 2**leaf.bits - 1)
    scale = dense(leaf.scale)
    return {
        "saturation": ends.mean((-2, -1), dtype=jnp.float32),
        "bad_scales": (~(jnp.isfinite(scale) & (scale != 0))).sum((-2, -1)),
    }


def plain(told: dict[str, Any], index: int | None = None) -> dict[str, float]:
    """Figures as JSON holds them: of one matrix of a batch, or summed up over leading axes."""
    made = {}
    for name, value in told.items():
        values = np.asarray(value, np.float64)
        values = values if index is None else values[index]
        total: Any = {"bad_scales": np.sum, "damp": np.max, "fallback": np.max}.get(name, np.mean)
        made[name] = float(total(values)) if values.size else 0.0
    return made


def warnings(path: str, told: dict[str, float], *, damp: float | None = None) -> list[str]:
    """What a person ought to know of a matrix, a line each.

    Args:
      path: of the matrix.
      told: its figures.
      damp: what was asked for, where the method takes such a thing.
    """
    lines = []
    if told.get("bad_scales"):
        lines.append(f"{path}: {told['bad_scales']:.0f} scales are 0 or not finite")
    if told.get("fallback"):
        lines.append(f"{path}: its second moment is not finite; rounded to nearest instead")
    elif damp is not None and told.get("damp", damp) > 1.01 * damp:
        lines.append(f"{path}: damp {told['damp']:.3g} was needed instead of {damp:.3g}")
    return lines
