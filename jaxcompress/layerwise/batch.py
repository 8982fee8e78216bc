"""A solver of one matrix over leading axes: layers, experts, a block's matrices of equal shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def over_lead(solve: Callable[..., Any], weight: Any, *statistics: Any) -> Any:
    """`solve(weight [N, K], *statistics)` for every matrix of `weight [*lead, N, K]`.

    One after the other, each with the whole processor; where the leading axis is split over a
    mesh, every device does its own, and nothing travels.

    Args:
      solve: hashable; its results are a pytree of arrays.
      weight: `[*lead, N, K]`.
      *statistics: pytrees of arrays `[*lead, ...]`.
    """
    lead = weight.shape[:-2]
    if not lead:
        return _one(solve, weight, *statistics)
    given = (weight, *statistics)
    flat = jax.tree.map(lambda x: x.reshape(math.prod(lead), *x.shape[len(lead) :]), given)
    sharding = getattr(weight, "sharding", None)
    if len(lead) == 1 and isinstance(sharding, NamedSharding) and sharding.spec[:1] not in (
        (), (None,)
    ):  # fmt: skip
        found = split(solve, sharding.mesh, sharding.spec[0], *flat)
    else:
        found = _all(solve, *flat)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


@partial(jax.jit, static_argnums=0)
def _one(solve: Callable[..., Any], *given: Any) -> Any:
    return solve(*given)


@partial(jax.jit, static_argnums=0)
def _all(solve: Callable[..., Any], *given: Any) -> Any:
    return jax.lax.map(lambda one: solve(*one), given)


@partial(jax.jit, static_argnums=0)
def dealt(mesh: Any, *members: Any) -> Any:
    """Members that lie on every device as one batch `[M, ...]` split over them: nothing travels.

    Args:
      mesh: a mesh; the batch is split over all of its axes.
      *members: pytrees of equal shapes. M is their number, or the next that the devices divide:
        the last one fills up.
    """
    own = -(-len(members) // mesh.size)
    each = [lambda *all_, at=at: all_[at] for at in range(len(members))]

    def of_device(*members: Any) -> Any:
        first = own * jax.lax.axis_index(mesh.axis_names)
        picked = [jax.lax.switch(first + i, each, *members) for i in range(own)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *picked)

    axes = P(mesh.axis_names)
    deal = jax.shard_map(of_device, mesh=mesh, in_specs=P(), out_specs=axes, check_vma=False)
    return deal(*members)


@partial(jax.jit, static_argnums=(0, 1, 2))
def split(solve: Callable[..., Any], mesh: Any, axes: Any, *given: Any) -> Any:
    """`solve` for every matrix of `[M, ...]`, M split over mesh axes: each device does its own."""
    each = jax.shard_map(
        lambda *own: jax.lax.map(lambda one: solve(*one), own),
        mesh=mesh,
        in_specs=P(axes),
        out_specs=P(axes),
        check_vma=False,
    )
    return each(*given)
