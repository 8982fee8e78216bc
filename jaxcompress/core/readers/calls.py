"""Calls that compressed arrays enter: jit, remat, shard_map, custom_vmap."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jaxcompress.core.arrays import parallel
from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.readers import unofficial
from jaxcompress.core.readers.observations import Observations
from jaxcompress.core.readers.origins import Origins, Tag
from jaxcompress.core.readers.recorder import ShardMap
from jaxcompress.core.readers.tracing import dense_aval
from jaxcompress.core.readers.unofficial import Body
from jaxcompress.core.readers.walk import Frame


def jit(frame: Frame, eqn: JaxprEqn, operands: list[Any], origins: list[Origins]) -> list[Any]:
    """A nested `jax.jit` stays one: a lifted body per (jaxpr, tree structure, avals)."""
    p = eqn.params
    inner = frame.inner(origins)
    arrivals = unofficial.given_shardings(p["in_shardings"])
    departures = unofficial.given_shardings(p["out_shardings"])
    lifted = frame.walk.jitted(
        Body.of(p["jaxpr"]),
        p["name"],
        inner,
        # The mask of tokens comes first.
        donate_argnums=tuple(i + 1 for i, donated in enumerate(p["donated_invars"]) if donated),
        keep_unused=p["keep_unused"],
        inline=p["inline"],
        compiler_options=p["compiler_options_kvs"],
    )
    outputs, seen = lifted(frame.mask, *map(_placed, operands, arrivals))
    frame.absorb_call(seen, operands, origins)
    return list(map(_placed, outputs, departures))


def _placed(value: Any, sharding: Any) -> Any:
    """`value` under a sharding that a jit was given; a hint that may not fit the buffers."""
    if sharding is None:
        return value
    if not is_compressed(value):
        return lax.with_sharding_constraint(value, sharding)
    placed = parallel.constrain(value, sharding)
    return value if placed is None else placed


def call(frame: Frame, eqn: JaxprEqn, operands: list[Any], origins: list[Origins]) -> list[Any]:
    """A call without properties of its own: evaluated in place."""
    body = Body.of(eqn.params.get("call_jaxpr") or eqn.params["jaxpr"])
    outputs, seen = frame.run(body, operands, frame.inner(origins), defer=True)
    frame.absorb_call(seen, operands, origins)
    return outputs


def remat(frame: Frame, eqn: JaxprEqn, operands: list[Any], origins: list[Origins]) -> list[Any]:
    """`jax.checkpoint`, bound again with every parameter."""
    body, inner = Body.of(eqn.params["jaxpr"]), frame.inner(origins)

    def lifted(*args: Any) -> tuple[list[Any], Observations]:
        return frame.run(body, args, inner, defer=True)

    closed, out = jax.make_jaxpr(lifted, return_shape=True)(*operands)
    flat = unofficial.remat(eqn, closed, jax.tree.leaves(operands))
    outputs, seen = jax.tree.unflatten(jax.tree.structure(out), flat)
    frame.absorb_call(seen, operands, origins)
    return outputs


def shard_map(
    frame: Frame, eqn: JaxprEqn, operands: list[Any], origins: list[Origins]
) -> list[Any]:
    """`jax.shard_map`; a compressed array enters with a spec per buffer.

    What is observed leaves with a leading axis over the mesh, and is summed outside.
    """
    p, walk = eqn.params, frame.walk
    mesh, manual = p["mesh"], p["newly_manual_axes"]
    args, in_specs = [], []
    for value, spec in zip(operands, p["in_specs"], strict=True):
        by_buffer = parallel.buffer_specs(value, spec, mesh) if is_compressed(value) else spec
        if by_buffer is None:
            value = walk.densify(value, eqn, "a shard_map spec that cuts through a group or a word")
            by_buffer = spec
        args.append(without_partition(value))
        in_specs.append(without_partition(by_buffer))
    names = tuple(name for name in mesh.axis_names if name in manual)
    body = Body.of(p["jaxpr"])
    inputs_over = frozenset(n for spec in p["in_specs"] for entry in spec for n in _names(entry))
    inner = frame.inner(origins)
    if inner is not None:
        inner = [
            Tag(tuple(map(_names, (*spec, *[None] * (value.ndim - len(spec)))))) if tag else tag
            for tag, spec, value in zip(inner, p["in_specs"], args, strict=True)
        ]

    def vary(x: Any) -> Any:
        if not p["check_vma"]:
            return x
        varying = jax.typeof(x).manual_axis_type.varying
        return lax.pcast(x, tuple(name for name in names if name not in varying), to="varying")

    def lifted(*local: Any) -> Any:
        before, walk.shard_map = walk.shard_map, ShardMap(p["check_vma"], inputs_over)
        outputs, seen = walk.run(body, local, inner, _local_mask(frame.mask, operands, local))
        walk.shard_map = before
        outputs = [walk.densify(out, eqn, "an output of shard_map") for out in outputs]
        return outputs, jax.tree.map(lambda x: vary(x)[None], seen)

    outputs, seen = jax.shard_map(
        lifted,
        mesh=mesh,
        in_specs=tuple(in_specs),
        out_specs=(list(p["out_specs"]), jax.P(names)),
        check_vma=p["check_vma"],
        axis_names=manual,
    )(*args)
    if walk.settings is not None:
        sizes = {name: mesh.shape[name] for name in names}
        reduced = [
            walk.settings.over_mesh(statistic, sizes, entry.rows_over)
            for entry, statistic in zip(seen.entries, seen.statistics, strict=True)
        ]
        frame.absorb(seen.with_statistics(reduced), operands, origins)
    return outputs


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def _local_mask(mask: Any, operands: list[Any], local: tuple[Any, ...]) -> Any:
    """The token mask inside shard_map: only where the inputs that it belongs to are not split."""
    if mask is None:
        return None
    for value, part in zip(operands, local, strict=True):
        if not is_compressed(value) and value.shape[: mask.ndim] == mask.shape:
            if part.shape[: mask.ndim] == mask.shape:
                return mask
            break
    raise InputError(
        "token_mask: fn splits its inputs by a shard_map, through which the mask does not go; put "
        "capture inside the shard_map, with the device's own part of the mask"
    )


def without_partition(leaf: Any) -> Any:
    """Inside shard_map every device has its own part: products are local."""
    if not is_compressed(leaf) or getattr(leaf, "partition", None) is None:
        return leaf
    return replace(leaf, partition=None)


def custom_vmap(
    frame: Frame, eqn: JaxprEqn, operands: list[Any], origins: list[Origins]
) -> list[Any]:
    """`jax.custom_batching.custom_vmap`: the user's batching rule is lifted too."""
    p, walk, inner = eqn.params, frame.walk, frame.inner(origins)
    lifted = jax.custom_batching.custom_vmap(
        lambda *args: frame.run(Body.of(p["call"]), args, inner, defer=True)
    )

    @lifted.def_vmap
    def rule(size: int, batched: Any, *args: Any) -> Any:
        flags = [any(jax.tree.leaves(flag)) for flag in batched]
        out_batched: list[Any] = []

        def dense(*args: Any) -> Any:
            given = jax.tree.unflatten(p["in_tree"], args)
            out, axes = p["rule"](size, jax.tree.unflatten(p["in_tree"], flags), *given)
            out_batched[:] = jax.tree.leaves(axes)
            return jax.tree.leaves(out)

        args = tuple(_batched(x, flag, size) for x, flag in zip(args, batched, strict=True))
        closed = jax.make_jaxpr(dense)(*map(dense_aval, args))
        outputs, _ = walk.run(Body.of(closed), args, None, None)
        outputs = [walk.densify(out, eqn, "an output of a batching rule") for out in outputs]
        return (outputs, Observations()), (out_batched, Observations())

    outputs, seen = lifted(*operands)
    frame.absorb_call(seen, operands, origins)
    return outputs


def _batched(value: Any, flags: Any, size: int) -> Any:
    """A compressed array with the batch axis on every buffer, if any buffer has it."""
    if not is_compressed(value) or not any(jax.tree.leaves(flags)):
        return value
    leaves, tree = jax.tree.flatten(value)
    return jax.tree.unflatten(
        tree,
        [
            leaf if flag else jnp.broadcast_to(leaf, (size, *leaf.shape))
            for leaf, flag in zip(leaves, jax.tree.leaves(flags), strict=True)
        ],
    )
