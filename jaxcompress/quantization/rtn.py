"""Round to nearest: the grid from the weights alone, every weight to its nearest point."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.affine import (
    Affine,
    check_bits,
    encode_affine,
    from_codes,
    groups_of,
    minmax_range,
    nearest_codes,
)
from jaxcompress.core.arrays.base import Array, CompressedArray, dense
from jaxcompress.core.errors import InputError

SHRINK_STEPS = 20
SMALLEST_SHRINK = 0.5


def rtn(
    weight: Array | CompressedArray,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    range: Literal["minmax", "mse"] = "minmax",  # noqa: A002 (the field's word)
    granularity: Literal["group", "channel", "tensor"] = "group",
) -> Affine:
    """Round to nearest on an integer grid.

    Source: the baseline of Frantar et al., "GPTQ", arXiv:2210.17323, section 4; the searched
    range as in Banner et al., arXiv:1810.05723, section 3, by a grid instead of a formula.

    Args:
      weight: float `[*lead, N, K]`, N rows by K contracted columns; a compressed one is rounded
        anew from its dense values.
      bits: bits of a weight, 1 to 8.
      group_size: contracted columns that share a scale; must divide K; -1: one scale per row.
      symmetric: fixed zero in the middle of the codes; otherwise a zero point per group.
      range: "minmax" covers every value; "mse" shrinks each range to the least squared error.
      granularity: "group", "channel" (one scale per row) or "tensor" (one scale per matrix).

    Returns:
      The quantized matrix, in the dims `[N, K]` with the dtype of `weight`. Exact zeros stay zero.

    Raises:
      InputError: bits outside of 1..8, or a group size that does not divide K.
    """
    check_bits(bits)
    if granularity == "tensor" and range == "mse":
        raise InputError("range mse: works per group or per channel, not with granularity tensor")
    groups = groups_of(weight.shape[-1], group_size) if granularity == "group" else 1
    return _rtn(dense(weight), bits, groups, symmetric, range == "mse", granularity == "tensor")


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _rtn(
    weight: Array, bits: int, groups: int, symmetric: bool, search: bool, per_tensor: bool
) -> Affine:
    scale, zero = minmax_range(
        weight, bits=bits, groups=groups, symmetric=symmetric, per_tensor=per_tensor
    )
    if search:
        scale, zero = _least_squares_range(weight, scale, zero, bits)
    stored = (("n", -1), ("k", -1))
    return encode_affine(weight, scale, zero, bits=bits, dims=stored)


def _least_squares_range(
    weight: Array, scale: Array, zero: Array | None, bits: int
) -> tuple[Array, Array | None]:
    """Per group, the shrunk min-max range with the least squared error (float32 sums).

    The zero point stays, so that both ends of an asymmetric range shrink towards zero alike.
    """
    groups = scale.shape[-1]

    def loss_of(candidate: Array) -> Array:
        u = nearest_codes(weight, candidate, zero, bits)
        error = from_codes(u, candidate, zero, bits).astype(jnp.float32) - weight
        return jnp.square(error).reshape(*error.shape[:-1], groups, -1).sum(-1)

    def step(best: tuple[Array, Array], shrink: Array) -> tuple[tuple[Array, Array], None]:
        candidate = (scale * shrink).astype(scale.dtype)
        loss = loss_of(candidate)
        better = loss < best[0]
        return (jnp.where(better, loss, best[0]), jnp.where(better, candidate, best[1])), None

    shrinks = jnp.linspace(1.0, SMALLEST_SHRINK, SHRINK_STEPS + 1)[1:]
    (_, best), _ = jax.lax.scan(step, (loss_of(scale), scale), shrinks)
    return best, zero
