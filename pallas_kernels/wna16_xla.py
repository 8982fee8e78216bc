"""The weight-only quantized product in XLA, in the form that each platform runs best.

A program that decodes the whole weight writes it to memory and reads it back, which costs more
than the product itself. The same expression avoids that on one platform and not on another:

  CPU: a loop over chunks of rows keeps the decoded chunk in cache.
  TPU: codes are taken one position of a word at a time, "planes", so that decoding needs no
    interleaving and is fused into the product.
  GPU: the weight is decoded whole, which pays once there are many rows of x; few rows are the
    Mosaic kernel's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import packing
from pallas_kernels import wna16_reference as reference
from pallas_kernels.wna16_reference import Spec

SMALL_WEIGHT = 512 * 512  # elements; a smaller weight is decoded whole, in few operations
CHUNK = 2**20  # elements of a decoded chunk: 4 MB of float32 stay in a CPU's cache


def product(
    x: jax.Array, scale: jax.Array, codes: jax.Array, *zero: jax.Array, spec: Spec, platform: str
) -> jax.Array:
    """Returns ``wna16_reference.product``, computed in the form for ``platform``."""
    small = x.shape[0] * scale.shape[1] * spec.k < SMALL_WEIGHT
    if platform == "tpu" and reference.words_hold_one_group(spec, scale.shape[-1]) and not small:
        return product_by_planes(x, scale, codes, *zero, spec=spec)
    if platform != "cpu":
        return reference.product(x, scale, codes, *zero, spec=spec)
    # XLA's fast 16-bit products on a CPU are those of two rows or more with a float32 result.
    m = x.shape[1]
    if m == 1 and spec.compute_dtype(x, scale).itemsize == 2:
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))
    wide = dataclasses.replace(spec, out_dtype=reference.accumulator(spec.out_dtype).name)
    form = reference.product if small else product_by_chunks
    return form(x, scale, codes, *zero, spec=wide)[:, :m].astype(spec.out_dtype)


def product_by_chunks(
    x: jax.Array, scale: jax.Array, codes: jax.Array, *zero: jax.Array, spec: Spec
) -> jax.Array:
    """The product by a loop over chunks of the weight's rows; no dense weight exists."""
    if x.shape[0] > 1:
        return _map_batch(product_by_chunks, x, scale, codes, *zero, spec=spec)
    x, scale, codes, *zeros = (
        v[0] for v in (x, scale, reference.canonical_codes(codes, spec), *zero)
    )
    weight = (scale, codes, *zeros)
    if not spec.transpose:

        def rows_of_result(weight: tuple[jax.Array, ...]) -> jax.Array:
            scale, codes, *zeros = weight
            return reference.multiply(spec, x, _decode_chunk(spec, scale, codes, zeros))

        chunks, rest = _split_rows(weight, spec.k)
        y = jnp.moveaxis(lax.map(rows_of_result, chunks), 0, 1).reshape(x.shape[0], -1)
        if rest:
            y = jnp.concatenate([y, rows_of_result(rest)], axis=1)
        return y[None]

    total = reference.accumulator(spec.out_dtype)

    def add(y: jax.Array, operands: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x_columns, scale, codes, *zeros = operands
        w = _decode_chunk(spec, scale, codes, zeros)
        return y + reference.multiply(spec, x_columns.T, w, out_dtype=total), None

    chunks, rest = _split_rows((x.T, *weight), spec.k)
    # Zeros made of x, so that they vary over the same axes of a mesh as the sum does.
    y = jnp.zeros((x.shape[0], spec.k), total) + 0 * x[:1, :1].astype(total)
    y, _ = lax.scan(add, y, chunks)
    if rest:
        y, _ = add(y, rest)
    return y.astype(spec.out_dtype)[None]


def product_by_planes(
    x: jax.Array, scale: jax.Array, codes: jax.Array, *zero: jax.Array, spec: Spec
) -> jax.Array:
    """The product with codes held as [codes per word, words]: decoding fuses into the product.

    Contracted column k = per_word * w + j is code j of word w. Giving j an axis of its own, outside
    that of w, leaves nothing of the weight to be interleaved; x is, which is small.
    """
    per_word = 32 // spec.bits
    b, m, _ = x.shape
    is_tpu_layout = spec.layout == "tpu"
    w_axis = -2 if is_tpu_layout else -1
    words = codes.shape[w_axis]
    if is_tpu_layout:
        codes ^= reference.sign_bits(spec.bits)
    shifts = spec.bits * jnp.arange(per_word, dtype=jnp.int32)[:, None, None]
    u = (codes[:, None] >> shifts) & jnp.int32(2**spec.bits - 1)

    def per_group(values: jax.Array) -> jax.Array:
        """[B, N, G] repeated for every word: [B, 1, N, words], or [B, 1, words, N]."""
        values = jnp.repeat(values, spec.k // per_word // values.shape[-1], axis=-1)
        values = jnp.pad(values, ((0, 0), (0, 0), (0, words - values.shape[-1])))
        return (values.swapaxes(-1, -2) if is_tpu_layout else values)[:, None]

    z = per_group(zero[0].astype(scale.dtype)) if zero else 2 ** (spec.bits - 1)
    w = (u.astype(scale.dtype) - z) * per_group(scale)
    for dtype in (*spec.casts, spec.compute_dtype(x, scale)):
        w = w.astype(dtype)
    x = x.astype(w.dtype)
    weight_axes = "bjwn" if is_tpu_layout else "bjnw"
    if spec.transpose:
        axes = f"bmn,{weight_axes}->bmwj"
    else:
        axes = f"bmwj,{weight_axes}->bmn"
        x = jnp.pad(x, ((0, 0), (0, 0), (0, words * per_word - spec.k)))
        x = x.reshape(b, m, words, per_word)
    y = jnp.einsum(
        axes, x, w, precision=spec.precision, preferred_element_type=jnp.dtype(spec.out_dtype)
    )
    return y.reshape(b, m, -1)[..., : spec.k] if spec.transpose else y


def scale_gradient(
    a: jax.Array, b: jax.Array, codes: jax.Array, *zero: jax.Array, spec: Spec, groups: int
) -> jax.Array:
    """Returns ``wna16_reference.scale_gradient``; of a large weight, by chunks of its rows."""
    if a.shape[0] * a.shape[-1] * spec.k < SMALL_WEIGHT:
        return reference.scale_gradient(a, b, codes, *zero, spec=spec, groups=groups)
    if a.shape[0] > 1:
        return _map_batch(scale_gradient, a, b, codes, *zero, spec=spec, groups=groups)
    canonical = dataclasses.replace(spec, layout="canonical")
    codes = reference.canonical_codes(codes, spec)

    def rows_of_gradient(operands: tuple[jax.Array, ...]) -> jax.Array:
        a_columns, codes, *zeros = (v[None] for v in operands)
        return reference.scale_gradient(
            a_columns.swapaxes(1, 2), b, codes, *zeros, spec=canonical, groups=groups
        )[0]

    chunks, rest = _split_rows((a[0].T, codes[0], *(z[0] for z in zero)), spec.k)
    gradient = lax.map(rows_of_gradient, chunks).reshape(-1, groups)
    if rest:
        gradient = jnp.concatenate([gradient, rows_of_gradient(rest)])
    return gradient[None]


def _decode_chunk(spec: Spec, scale: jax.Array, codes: jax.Array, zeros: list) -> jax.Array:
    # The barrier keeps XLA from seeing that the words are constant, where they are.
    codes = lax.optimization_barrier(codes)
    return reference.decode(spec, scale, codes, tuple(zeros), packing.unpack_by_bitcast)


def _map_batch(
    function: Callable[..., jax.Array], *operands: jax.Array, **kwargs: Any
) -> jax.Array:
    """Applies ``function`` to one member of the batch after the other."""
    return lax.map(lambda leaf: function(*(v[None] for v in leaf), **kwargs)[0], operands)


def _split_rows(
    operands: tuple[jax.Array, ...], k: int
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Splits operands [N, ...] into equal chunks [C, rows, ...] and the rows left over, if any."""
    n = operands[0].shape[0]
    most = max(1, min(CHUNK // k, n // 4))
    rows = max(d for d in range(1, most + 1) if n % d == 0)
    if 2 * rows < most:  # no good divisor: one smaller chunk at the end
        rows = most
    whole = n - n % rows
    chunks = tuple(v[:whole].reshape(-1, rows, *v.shape[1:]) for v in operands)
    return chunks, tuple(v[whole:] for v in operands) if whole < n else ()
