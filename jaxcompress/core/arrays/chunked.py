"""Products with any compressed array, decoded a few rows at a time.

The loop's body is rematerialized, so that neither the forward pass nor its gradient holds the
dense weight: what is kept for the backward pass is the buffers and the other operand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays.base import ROWS, Array, CompressedArray
from jaxcompress.core.arrays.views import row_roles

WHOLE_BELOW = 512 * 512  # entries; a smaller weight is decoded in one piece
CHUNK = 1024 * 1024  # entries decoded at a time of a larger one

L = TypeVar("L", bound=CompressedArray)


def product(
    leaf: CompressedArray,
    x: Array,
    over: str,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """`x @ w.T` (over="k") or `x @ w` (over="n"), w the stored matrix `[*lead, N, K]` of `leaf`.

    Args:
      leaf: any compressed array.
      x: `[*lead, M, K]` or `[*lead, M, N]`.
      over: the axis of the stored matrix that is contracted, "k" or "n".
      precision: as for `lax.dot_general`.
      preferred_element_type: dtype of the result and of each partial sum; None: as promoted.

    Returns:
      `[*lead, M, N]` or `[*lead, M, K]`.
    """
    out_dtype = jnp.dtype(preferred_element_type or jnp.result_type(x.dtype, leaf.dtype))

    def multiply(rows: CompressedArray, x: Array, dtype: Any) -> Array:
        batch = tuple(range(x.ndim - 2))
        contract = ((x.ndim - 1,), (x.ndim - (1 if over == "k" else 2),))
        return lax.dot_general(
            x,
            rows.matrix(),
            (contract, (batch, batch)),
            precision=precision,
            preferred_element_type=dtype,
        )

    size = rows_per_chunk(leaf)
    if size >= leaf.rows:
        return _recomputed(lambda leaf, x: multiply(leaf, x, out_dtype))(leaf, x)
    if over == "k":

        def columns(chunk: CompressedArray, x: Array) -> Array:
            return multiply(chunk, x, out_dtype)

        return map_rows(columns, leaf, size, shared=x, axis=-1)

    # Partial sums of narrow floats are kept in float32, as one long product would keep them.
    sum_dtype = jnp.promote_types(out_dtype, jnp.float32)

    def add(total: Array, chunk: CompressedArray, x: Array) -> Array:
        return total + multiply(chunk, x, sum_dtype)

    zero = vary_like(jnp.zeros((*x.shape[:-1], leaf.contracted), sum_dtype), (leaf, x))
    return sum_rows(add, zero, leaf, size, x).astype(out_dtype)


def rows_per_chunk(leaf: CompressedArray, limit: int = CHUNK) -> int:
    """Rows to decode at a time: all of a small weight, otherwise about `limit` entries.

    A divisor of N where there is one that is not much smaller, so that no odd piece remains.
    """
    if leaf.size < WHOLE_BELOW:
        return leaf.rows
    most = max(1, min(limit // max(leaf.size // leaf.rows, 1), leaf.rows // 2))
    return next((r for r in range(most, most // 2, -1) if leaf.rows % r == 0), most)


def map_rows(
    fn: Callable[[Any, Array], Array], leaf: L, size: int, shared: Array, axis: int
) -> Array:
    """`fn(chunk of rows, shared)` for every chunk, results joined along `axis` (negative)."""
    chunked, rebuild, rest = split_rows(leaf, size)
    body = _recomputed(fn, in_loop=True)
    _, stacked = lax.scan(lambda _, xs: (None, body(rebuild(xs), shared)), None, chunked)
    out = jnp.moveaxis(stacked, 0, axis - 1)
    at = out.ndim + axis - 1
    out = out.reshape(*out.shape[:at], -1, *out.shape[at + 2 :])
    if rest is None:
        return out
    return jnp.concatenate([out, _recomputed(fn)(rest, shared)], axis=axis)


def sum_rows(
    add: Callable[[Array, Any, Array], Array], zero: Array, leaf: L, size: int, x: Array
) -> Array:
    """Fold `add(total, chunk of rows, x of those rows)`; x `[*lead, M, N]` is cut along N."""
    chunked, rebuild, rest = split_rows(leaf, size)
    whole = leaf.rows // size * size
    cut = x[..., :whole].reshape(*x.shape[:-1], -1, size)
    body = _recomputed(add, in_loop=True)
    total, _ = lax.scan(
        lambda total, xs: (body(total, rebuild(xs[0]), xs[1]), None),
        zero,
        (chunked, jnp.moveaxis(cut, -2, 0)),
    )
    return total if rest is None else _recomputed(add)(total, rest, x[..., whole:])


def split_rows(leaf: L, size: int) -> tuple[list[Array], Callable[[list[Array]], L], L | None]:
    """Cut rows for a scan.

    Returns:
      buffers `[chunks, *lead, size, c]` of those that have an entry per row; a function from one
      chunk of them to the array of those rows; the array of the rows that remain, or None.
    """
    buffers, tree = jax.tree.flatten(leaf)
    n = leaf.rows
    cut = [
        role == ROWS and buffer.shape[-2] == n
        for role, buffer in zip(row_roles(leaf), buffers, strict=True)
    ]

    def rebuild(pieces: list[Array]) -> L:
        it = iter(pieces)
        return jax.tree.unflatten(
            tree, [next(it) if c else b for c, b in zip(cut, buffers, strict=True)]
        )

    chunks = n // size
    rows = [b for c, b in zip(cut, buffers, strict=True) if c]
    stacked = [
        jnp.moveaxis(
            b[..., : chunks * size, :].reshape(*b.shape[:-2], chunks, size, b.shape[-1]), -3, 0
        )
        for b in rows
    ]
    rest = rebuild([b[..., chunks * size :, :] for b in rows]) if n % size else None
    return stacked, rebuild, rest


def vary_like(x: Array, others: Any) -> Array:
    """`x`, inside shard_map varying over every mesh axis that any of `others` varies over."""
    every = {name for o in jax.tree.leaves(others) for name in _varying(o)}
    missing = tuple(sorted(every - _varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def _varying(x: Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _recomputed(fn: Callable[..., Array], in_loop: bool = False) -> Callable[..., Array]:
    return jax.checkpoint(
        fn, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=not in_loop
    )
