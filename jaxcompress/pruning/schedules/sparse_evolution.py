"""SET: sparse from the start, by links that come at random and go where they are small."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.pruning.allocation import erdos_renyi, uniform
from jaxcompress.pruning.patterns import keep_highest
from jaxcompress.pruning.schedules.masked import Moment, every, masked, starting_masks
from jaxcompress.pruning.schedules.targets import (
    Matrices,
    Targets,
    matrices_of,
    with_matrices,
)

LARGEST = jnp.finfo(jnp.float32).max


def sparse_evolution(
    inner: optax.GradientTransformation,
    where: Targets,
    *,
    fraction: float = 0.3,
    interval: int,
    end: int,
    seed: int = 0,
) -> optax.GradientTransformation:
    """The optimizer; now and then the weights nearest to 0 go, and as many come at random.

    Of the positive weights and of the negative ones the same fraction goes. New weights begin at 0.

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science", arXiv:1707.04780, algorithm 1.

    Args:
      inner: the optimizer.
      where: what is sparse; begin with `sparse_start`.
      fraction: zeta.
      interval: steps between two changes (the paper: an epoch).
      end: no change is after a later step.
      seed: of the draw.

    Raises:
      InputError: a number out of range.
    """
    check_evolution(fraction, interval)

    def rule(now: Moment) -> Matrices:
        masks = {}
        for number, (path, mask) in enumerate(now.masks.items()):
            drawn = jax.random.uniform(jax.random.fold_in(now.key, number), mask.shape)
            masks[path] = _evolved(mask, now.weights[path], drawn, fraction)
        return masks

    return masked(inner, where, rule, every(interval, end, interval), seed=seed)


def _evolved(mask: Array, weight: Array, drawn: Array, fraction: float) -> Array:
    """The mask after one change, with as many entries as before."""
    shape, flat = mask.shape, (*mask.shape[:-2], -1)
    mask, weight, drawn = mask.reshape(flat), weight.reshape(flat), drawn.reshape(flat)
    positive, negative = mask & (weight > 0), mask & (weight < 0)
    stays = mask & _without_smallest(positive, weight, fraction)
    stays &= _without_smallest(negative, -weight, fraction)
    return regrown(mask, stays, drawn).reshape(shape)


def _without_smallest(among: Array, size: Array, fraction: float) -> Array:
    """True but for the given fraction of the entries in `among`, those of the smallest size."""
    count = jnp.floor(fraction * among.sum(-1)).astype(jnp.int32)
    return keep_highest(jnp.where(among, size, LARGEST), count)


def regrown(mask: Array, stays: Array, scores: Array) -> Array:
    """What stays and, of all other entries `[*lead, n]`, the highest scores: as many as before."""
    missing = mask.shape[-1] - mask.sum(-1)
    return keep_highest(jnp.where(stays, LARGEST, scores), missing)


def check_evolution(fraction: float, interval: int) -> None:
    """Raise `InputError` where a number is out of range."""
    if not 0 < fraction <= 1:
        raise InputError(f"fraction {fraction}: must be above 0 and at most 1")
    if interval < 1:
        raise InputError(f"interval {interval}: must be 1 step or more")


def sparse_start(
    params: Any, where: Targets, *, sparsity: float, distribution: str = "erk", seed: int = 0
) -> Any:
    """`params` with zeros drawn at random; matrices that are pruned already keep their own.

    Args:
      params: dense parameters.
      where: what becomes sparse.
      sparsity: of all together.
      distribution: "erk" (smaller matrices keep more, arXiv:1911.11134) or "uniform".
      seed: of the draw.

    Raises:
      InputError: a sparsity out of range, or an unknown distribution.
    """
    if distribution not in ("erk", "uniform"):
        raise InputError(f"distribution {distribution!r}: use erk or uniform")
    matrices = matrices_of(params, where)
    begun = matrices_of(starting_masks(params, where), where)
    pruned = {path: _is_known(m) and not bool(m.all()) for path, m in begun.items()}
    units = [(path, m) for path, m in matrices.items() if not pruned[path]]
    if not units:
        return params
    windows = {path: _window(leaf, where[path]) for path, leaf in leaves_with_paths(params)
               if path in matrices}  # fmt: skip
    shapes, sizes = [], []
    for path, m in units:
        *lead, n, k = m.shape
        shape = (n, k // int(np.prod(windows[path], initial=1)), *windows[path])
        shapes += [shape] * int(np.prod(lead, initial=1))
        sizes += [n * k] * int(np.prod(lead, initial=1))
    counts = erdos_renyi(shapes, sparsity) if distribution == "erk" else uniform(sizes, sparsity)
    out, at = {}, 0
    for number, (path, m) in enumerate(units):
        *lead, _, _ = m.shape
        own = counts[at : at + int(np.prod(lead, initial=1))].reshape(lead)
        at += own.size
        drawn = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), number), m.shape)
        mask = keep_highest(drawn.reshape(*lead, -1), jnp.asarray(own, jnp.int32))
        out[path] = jnp.where(mask.reshape(m.shape), m, 0)
    return with_matrices(params, where, out)


def _is_known(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def _window(leaf: Any, dims: Any) -> tuple[int, ...]:
    """Sizes of a convolution's window; () of any other matrix."""
    tail = leaf.shape[leaf.ndim - len(dims) :]
    contracted = [size for (kind, _), size in zip(dims, tail, strict=True) if kind == "k"]
    return tuple(contracted[:-1]) if len(contracted) > 2 else ()
