"""HQQ: zero points that leave small errors to the many weights and large ones to the outliers."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.affine import Affine, check_bits, encode_affine, groups_of
from jaxcompress.core.arrays.base import STORED, Array, CompressedArray, dense
from jaxcompress.core.errors import InputError

NORM = 0.7  # p, of |error|^p
BETA, KAPPA = 10.0, 1.01  # the weight of the half-quadratic term, and its growth
WHOLE_START = (4,)  # bits at which the authors' package begins with a whole zero point


def hqq(
    weight: Array | CompressedArray, *, bits: int = 4, group_size: int = 64, steps: int = 20
) -> Affine:
    """Half-quadratic quantization: float zero points of a small |error|^0.7, without data.

    With the scale s of the range fixed, the error E and the zero point z are found in turns:
    E = shrink(W - (q - z) s), shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0), and
    z = mean(q - (W - E) / s) over the group, q = round(W / s + z); beta grows by kappa, until the
    mean |W - (q - z) s| of a row does not fall any more. Source: Badri and Shaji, "Half-Quadratic
    Quantization of Large Machine Learning Models", mobiusml.github.io/hqq_blog, 2023 (p = 0.7,
    beta = 10, kappa = 1.01, 20 turns).

    Args:
      weight: float `[*lead, N, K]`.
      bits: 1 to 8.
      group_size: contracted columns that share a scale and a zero point; must divide K; -1: one
        of each per row.
      steps: turns at most.

    Returns:
      The quantized matrix, in the dims `[N, K]` with the dtype of `weight`; its zero points are in
      that dtype too, so that 0 need not be a value of the grid.

    Raises:
      InputError: bits outside of 1..8, negative steps, or a group size that does not divide K.
    """
    check_bits(bits)
    if bits > 8:
        raise InputError(f"bits {bits}: 1 to 8 for hqq")
    if steps < 0:
        raise InputError(f"steps {steps}: must be 0 or more")
    return _hqq(dense(weight), bits, groups_of(weight.shape[-1], group_size), steps)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _hqq(weight: Array, bits: int, groups: int, steps: int) -> Affine:
    grouped = weight.reshape(*weight.shape[:-1], groups, -1).astype(jnp.float32)
    low, high = grouped.min(-1), grouped.max(-1)
    # Stored as it is used here.
    scale = ((high - low) / (2**bits - 1)).astype(weight.dtype)
    scale = jnp.where(scale == 0, jnp.finfo(weight.dtype).eps, scale)
    wide = scale.astype(jnp.float32)[..., None]
    start = -low / wide[..., 0]
    start = jnp.round(start) if bits in WHOLE_START else start
    in_steps = grouped / wide

    def turn(state: tuple[Array, Array, Array], beta: Array) -> tuple[Any, None]:
        zero, least, going = state
        codes = jnp.clip(jnp.round(in_steps + zero[..., None]), 0, 2**bits - 1)
        error = grouped - (codes - zero[..., None]) * wide
        found = (codes - (grouped - _shrunk(error, beta)) / wide).mean(-1)
        mean = jnp.abs(error).mean((-1, -2))[..., None]
        # The turn that finds it no smaller is the last one that counts.
        return (jnp.where(going, found, zero), mean, going & (mean < least)), None

    rows = (*weight.shape[:-1], 1)
    state = start, jnp.full(rows, jnp.inf), jnp.ones(rows, bool)
    betas = BETA * KAPPA ** jnp.arange(steps, dtype=jnp.float32)
    (zero, _, _), _ = jax.lax.scan(turn, state, betas)
    return encode_affine(weight, scale, zero.astype(weight.dtype), bits=bits, dims=STORED)


def _shrunk(x: Array, beta: Array) -> Array:
    """The entries moved towards 0: the proximal step of |x|^p / beta, generalized (p < 1)."""
    size = jnp.abs(x)
    power = jnp.where(size > 0, size, 1) ** (NORM - 1)
    return jnp.sign(x) * jnp.maximum(size - power / beta, 0)
