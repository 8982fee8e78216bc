"""Parameters split in two: what trains, and what stays as it is.

    trainable, frozen = split(params, "scales")
    gradients = jax.grad(lambda trainable: loss(merge(trainable, frozen)))(trainable)

Both have the structure of `params`, with None wherever the other has the array. Codes, positions
and masks are integers of a format: they are always frozen, never see `jax.grad` or an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.selection import Patterns, select

KINDS = {
    "scales": "the scales of quantized arrays",
    "factors": "the factors of low rank arrays",
    "values": "the values that sparse arrays keep",
    "weights": "the full weights of masked and fake quantized arrays",
    "dense": "float arrays that are not compressed",
    "gates": "what decides which weights stay, where that is learned",
}


def split(
    params: Any,
    what: str | Iterable[str] = "all",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[Any, Any]:
    """`(trainable, frozen)`, each with the structure of `params` and None in the other's places.

    Args:
      params: parameters; leaves may be compressed.
      what: a kind or several: "scales", "factors", "values", "weights", "dense", "gates";
        "all": all of them.
      include: patterns of the paths to train; None: all paths.
      exclude: patterns of paths to leave out.

    Raises:
      InputError: a kind is unknown, a pattern matches nothing, or nothing is left to train.
    """
    kinds = {what} if isinstance(what, str) else set(what)
    for kind in kinds - {*KINDS, "all"}:
        raise InputError(f"split: {kind!r} is none of {', '.join(KINDS)}, all")
    if "all" in kinds:
        kinds = set(KINDS)
    leaves = leaves_with_paths(params)
    chosen = set(select([path for path, _ in leaves], include, exclude))
    wanted = jax.tree.leaves(
        [_trains(leaf, kinds if path in chosen else set()) for path, leaf in leaves]
    )
    buffers, tree = jax.tree.flatten(params)
    if not any(wanted):
        raise InputError(
            f"split: nothing to train is one of {', '.join(sorted(kinds))}; the parameters have "
            f"{', '.join(_present(leaves)) or 'nothing that trains'}"
        )
    trainable = [x if w else None for x, w in zip(buffers, wanted, strict=True)]
    frozen = [None if w else x for x, w in zip(buffers, wanted, strict=True)]
    return jax.tree.unflatten(tree, trainable), jax.tree.unflatten(tree, frozen)


def merge(trainable: Any, frozen: Any) -> Any:
    """The parameters that `split` took apart."""
    return jax.tree.map(
        lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None
    )


def _trains(leaf: Any, kinds: set[str], kind: str | None = "dense") -> Any:
    """`leaf` with True in the place of each buffer that is to train, False in the others'."""
    if not is_compressed(leaf):
        is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
        return kind in kinds and is_float
    return leaf.replace(
        **{
            name: _trains(value, kinds, leaf.trains.get(name))
            for name, value in leaf.buffers.items()
        }
    )


def _present(leaves: list[tuple[str, Any]]) -> list[str]:
    return [kind for kind in KINDS if any(jax.tree.leaves([_trains(x, {kind}) for _, x in leaves]))]
