"""HQQ: zero points that leave small errors to the many weights and large ones to the outliers."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.affine import (
    Affine,
    check_bits,
    encode_affine,
    groups_of,
    minmax_range,
)
from jaxcompress.core.arrays.base import STORED, Array, CompressedArray, dense
from jaxcompress.core.errors import InputError

NORM = 0.7  # p, of |error|^p
ROUNDED_START = (4,)  # bits at which the authors' package begins with a whole zero point
BETA, KAPPA = 10.0, 1.01  # the weight of the half-quadratic term, and its growth


def hqq(
    weight: Array | CompressedArray,
    *,
    bits: int = 4,
    group_size: int = 64,
    zero: Literal["float", "integer"] = "float",
    steps: int = 20,
) -> Affine:
    """Half-quadratic quantization: zero points of the least |error|^0.7, without data.

    With the scale s of the range fixed, the error E and the zero point z are found in turns:
    E = shrink(W - (q - z) s, beta), sign(x) max(|x| - |x|^(p-1) / beta, 0) for each entry, and
    z = mean(q - (W - E) / s) over the group, q = round(W / s + z); beta grows by kappa. Of all
    turns a group keeps the zero point with the least sum |W - (q - z) s|^p. Source: Badri and
    Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", mobiusml.github.io/
    hqq_blog, 2023 (p = 0.7, beta = 10, kappa = 1.01, 20 turns).

    Args:
      weight: float `[*lead, N, K]`.
      bits: 1 to 8.
      group_size: contracted columns that share a scale and a zero point; must divide K; -1: one
        of each per row.
      zero: "float", as the paper: in the dtype of `weight`, and 0 need not be a value of the grid;
        "integer": the same with zero points rounded, which every format of checkpoints can hold
        and which keeps exact zeros.
      steps: turns.

    Returns:
      The quantized matrix, in the dims `[N, K]` with the dtype of `weight`.

    Raises:
      InputError: bits outside of 1..8, negative steps, or a group size that does not divide K.
    """
    check_bits(bits)
    if bits > 8:
        raise InputError(f"bits {bits}: 1 to 8 for hqq")
    if steps < 0:
        raise InputError(f"steps {steps}: must be 0 or more")
    groups = groups_of(weight.shape[-1], group_size)
    return _hqq(dense(weight), bits, groups, zero == "integer", steps)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _hqq(weight: Array, bits: int, groups: int, whole: bool, steps: int) -> Affine:
    grouped = weight.reshape(*weight.shape[:-1], groups, -1).astype(jnp.float32)
    levels = 2**bits - 1
    if whole:
        scale, start = minmax_range(weight, bits=bits, groups=groups, symmetric=False)
        start = start.astype(jnp.float32)
    else:
        low, high = grouped.min(-1), grouped.max(-1)
        scale = ((high - low) / levels).astype(weight.dtype)
        scale = jnp.where(scale == 0, jnp.finfo(weight.dtype).eps, scale)
        start = -low / scale.astype(jnp.float32)
        start = jnp.round(start) if bits in ROUNDED_START else start
    in_steps = grouped / scale.astype(jnp.float32)[..., None]

    def stored(zero: Array) -> Array:
        """A zero point as the array will hold it."""
        if whole:
            return jnp.clip(jnp.round(zero), 0, levels)
        return zero.astype(weight.dtype).astype(jnp.float32)

    def codes(zero: Array) -> Array:
        return jnp.clip(jnp.round(in_steps + zero[..., None]), 0, levels)

    def error(zero: Array) -> Array:
        return (codes(zero) - zero[..., None]) * scale[..., None].astype(jnp.float32) - grouped

    def loss(zero: Array) -> Array:
        return (jnp.abs(error(zero)) ** NORM).sum(-1)

    def turn(state: tuple[Array, Array, Array], beta: Array) -> tuple[tuple[Array, ...], None]:
        zero, best, least = state
        apart = _shrunk(-error(zero), beta)
        near = in_steps - apart / scale[..., None].astype(jnp.float32)
        zero = (codes(zero) - near).mean(-1)
        found = loss(stored(zero))
        better = found < least
        return (zero, jnp.where(better, stored(zero), best), jnp.where(better, found, least)), None

    first = stored(start)
    betas = BETA * KAPPA ** jnp.arange(steps, dtype=jnp.float32)
    (_, zero, _), _ = jax.lax.scan(turn, (start, first, loss(first)), betas)
    zero = zero.astype(jnp.uint8 if whole else weight.dtype)
    return encode_affine(weight, scale, zero, bits=bits, dims=STORED)


def _shrunk(x: Array, beta: Array) -> Array:
    """The entries moved towards 0: the proximal step of |x|^p / beta, generalized (p < 1)."""
    size = jnp.abs(x)
    power = jnp.where(size > 0, size, 1) ** (NORM - 1)
    return jnp.sign(x) * jnp.maximum(size - power / beta, 0)
