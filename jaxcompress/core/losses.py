"""Losses over long sequences: head and loss for some positions at a time.

Logits `[batch, seq, vocab]` in float32, of teacher and student both, are often the largest arrays
of a training step. Here only those of one chunk exist, and the backward pass makes them anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

CHUNK = 128  # positions


def sum_over_chunks(
    function: Callable[..., Any], params: Any, sequences: Sequence[Array], *, chunk: int = CHUNK
) -> Any:
    """The sum of `function(params, *pieces)` over chunks of the positions.

    The gradient of `params` is accumulated over the chunks in the dtype of `params`: see
    `in_float32`.

    Args:
      function: `function(params, *pieces) -> pytree of sums`; pieces are `[batch, chunk, ...]`.
      params: pytree; leaves may be compressed.
      sequences: arrays `[batch, seq, ...]` that are cut into the pieces.
      chunk: positions at a time; the last chunk may be shorter.
    """
    length = sequences[0].shape[1]
    chunk = min(chunk, length)
    whole = length // chunk
    recomputed = jax.checkpoint(function)
    if whole * chunk == length and whole == 1:
        return recomputed(params, *sequences)

    def stacked(x: Array) -> Array:
        x = x[:, : whole * chunk]
        return jnp.moveaxis(x.reshape(x.shape[0], whole, chunk, *x.shape[2:]), 1, 0)

    def add(total: Any, pieces: tuple[Array, ...]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, recomputed(params, *pieces)), None

    stacks = tuple(stacked(x) for x in sequences)
    like = jax.eval_shape(function, params, *(x[0] for x in stacks))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    total, _ = jax.lax.scan(add, zeros, stacks)
    if whole * chunk < length:
        rest = recomputed(params, *(x[:, whole * chunk :] for x in sequences))
        total = jax.tree.map(jnp.add, total, rest)
    return total


def in_float32(function: Callable[..., Any], params: Any) -> tuple[Callable[..., Any], Any]:
    """`(function, params)` with half precision widened: the same values, but float32 gradients.

    `function(params, *arguments)` is given the dtypes of the `params` here.
    """

    def narrowed(wide: Any, *arguments: Any) -> Any:
        narrow = jax.tree.map(lambda w, x: w.astype(x.dtype), wide, params)
        return function(narrow, *arguments)

    half = (jnp.bfloat16, jnp.float16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype in half else x, params)
    return narrowed, wide
