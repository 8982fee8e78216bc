"""The weight-only quantized product as a Pallas kernel for TPUs: 4- and 8-bit codes.

The kernel reads the layout "tpu": int32 [words, N], signed codes, consecutive ones of the
contracted axis in one word. ``pltpu.bitcast`` turns a block of it into an int4 or int8 tile
[k, n] for nothing, in the orientation that the matrix unit wants; unpacking by shifts would cost
twice the instructions. Codes in the canonical layout are reordered first, in every call: place a
weight with ``to_tpu_layout`` once.

Few rows of x: each group's product is scaled after the multiplication, where a scale meets M
numbers and not a whole group of them. Many rows: the tile is scaled before.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import wna16_reference as reference
from pallas_kernels.wna16_reference import Spec

SCALE_AFTER_BELOW = 128  # rows of x
ROWS = 256  # of x in a block, at most
TILE = 2**20  # codes in a block; half of that where the tile is scaled before the product
IDEAL_DEPTH = 2048  # of a block, along the contracted axis
SINGLE_PASS = (None, "default", "bfloat16", "fastest", lax.Precision.DEFAULT)


class Blocks(NamedTuple):
    """Sizes of a grid step's blocks: rows of x, rows and contracted columns of the weight."""

    m: int
    n: int
    k: int


def product(
    x: jax.Array, scale: jax.Array, codes: jax.Array, *zero: jax.Array, spec: Spec
) -> jax.Array:
    """Returns ``wna16_reference.product``; factors are rounded to bfloat16, sums are float32.

    Raises:
      NotImplementedError: codes of other than 4 or 8 bits, dtypes or a precision that ask for more
        than bfloat16 factors, or groups that fit no block.
    """
    n = scale.shape[1]
    group_size, stored = _checked_group(x, scale, codes, spec)
    if spec.layout == "canonical":
        codes = reference.to_tpu_layout(codes, bits=spec.bits)
    if spec.interpret:  # of constant words, XLA (jaxlib 0.10) folds the bitcast to wrong values
        codes = lax.optimization_barrier(codes)
    quantities = [reference.scale_to_kernel_layout(scale, n).astype(jnp.float32)]
    if zero:
        z = reference.scale_to_kernel_layout(zero[0], n).astype(jnp.float32)
        quantities.append(z - 2 ** (spec.bits - 1))
    x = x.astype(jnp.bfloat16)
    if not spec.transpose:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, stored - spec.k)))
    y = _call(x, codes, quantities, stored, group_size, spec)
    return y[..., : spec.k] if spec.transpose else y


def _checked_group(x: jax.Array, scale: jax.Array, codes: jax.Array, spec: Spec) -> tuple[int, int]:
    """Returns the group size and the stored length of the contracted axis."""
    if spec.bits not in (4, 8):
        raise NotImplementedError(f"mosaic_tpu takes codes of 4 and 8 bits, not {spec.bits}")
    compute = spec.compute_dtype(x, scale)
    if compute not in (jnp.bfloat16, jnp.float32) or spec.precision not in SINGLE_PASS:
        raise NotImplementedError(
            f"mosaic_tpu multiplies in bfloat16, not in {compute.name} at {spec.precision}"
        )
    words = codes.shape[-2 if spec.layout == "tpu" else -1]
    stored = words * 32 // spec.bits
    groups = scale.shape[-1]
    if groups == 1:
        return stored, stored
    group_size = spec.k // groups
    if stored != spec.k or group_size % 32:
        raise NotImplementedError(f"mosaic_tpu takes groups of multiples of 32, not {group_size}")
    return group_size, stored


def _blocks(m: int, n: int, k: int, group_size: int, spec: Spec) -> Blocks:
    """Blocks of whole groups, or inside one group, as near as can be to the ideal depth."""
    depths = [
        d
        for d in (k, *range(128, 4 * IDEAL_DEPTH + 1, 128))
        if k % d == 0 and d <= 4 * IDEAL_DEPTH and (d % group_size == 0 or group_size % d == 0)
    ]
    if not depths:
        raise NotImplementedError(f"mosaic_tpu: no block of K = {k} fits groups of {group_size}")
    depth = min(depths, key=lambda d: abs(math.log(d / IDEAL_DEPTH)))
    tile = TILE if m < SCALE_AFTER_BELOW and not spec.transpose else TILE // 2
    return Blocks(m=min(m, ROWS), n=min(n, max(128, tile // depth // 128 * 128)), k=depth)


def _call(
    x: jax.Array,
    codes: jax.Array,
    quantities: list[jax.Array],
    k: int,
    group_size: int,
    spec: Spec,
) -> jax.Array:
    batch, m, _ = x.shape
    n = codes.shape[-1]
    blocks = _blocks(m, n, k, group_size, spec)
    groups = max(1, blocks.k // group_size)  # in a block
    blocks_per_group = max(1, group_size // blocks.k)

    def block(
        shape: tuple[int, ...], at: Callable[[Any, Any, Any], tuple[Any, ...]]
    ) -> pl.BlockSpec:
        """A block of ``shape`` where ``at`` says, from the indices of the blocks of m, n and k."""
        if spec.transpose:
            return pl.BlockSpec((None, *shape), lambda b, i, o, s: (b, *at(i, s, o)))
        return pl.BlockSpec((None, *shape), lambda b, i, o, s: (b, *at(i, o, s)))

    along_k = block((blocks.m, blocks.k), lambda i, j, l: (i, l))
    along_n = block((blocks.m, blocks.n), lambda i, j, l: (i, j))
    per_group = block(
        (groups, 1, blocks.n), lambda i, j, l: (lax.div(l, jnp.int32(blocks_per_group)), 0, j)
    )
    packed = block((blocks.k * spec.bits // 32, blocks.n), lambda i, j, l: (l, j))
    steps_n, steps_k = pl.cdiv(n, blocks.n), k // blocks.k
    if spec.transpose:
        kernel = functools.partial(_transposed_kernel, bits=spec.bits, n=n)
        x_spec, out_spec, out_size, steps = along_n, along_k, k, (steps_k, steps_n)
    else:
        after = m < SCALE_AFTER_BELOW
        kernel = functools.partial(_kernel, bits=spec.bits, scale_after=after)
        x_spec, out_spec, out_size, steps = along_k, along_n, n, (steps_n, steps_k)
    accumulator = (blocks.m, blocks.k if spec.transpose else blocks.n)
    call = pl.pallas_call(
        kernel,
        out_shape=_typed_as(x, (batch, m, out_size), spec.out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(batch, pl.cdiv(m, blocks.m), *steps),
            in_specs=[x_spec, packed, *(per_group for _ in quantities)],
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM(accumulator, jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=spec.interpret,
        name="wna16_transposed" if spec.transpose else "wna16",
    )
    return call(x, codes, *quantities)


def _kernel(
    x_ref: Any,
    codes_ref: Any,
    scale_ref: Any,
    *refs: Any,  # zero point, if any; result [m, n]; accumulator
    bits: int,
    scale_after: bool,
) -> None:
    """One step of x [m, k] times codes [k, n]; the last axis of the grid runs over k."""
    *zero, out_ref, sum_ref = refs
    _start_sum(sum_ref)
    if scale_after:
        codes = pltpu.bitcast(codes_ref[...], _signed(bits))
        size = codes.shape[0] // scale_ref.shape[0]
        total = sum_ref[...]
        for g in range(scale_ref.shape[0]):
            x = x_ref[:, g * size : (g + 1) * size]
            w = codes[g * size : (g + 1) * size].astype(jnp.bfloat16)
            part = jnp.dot(x, w, preferred_element_type=jnp.float32)
            if zero:
                row_sums = jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)
                part -= row_sums * zero[0][g]
            total += part * scale_ref[g]
        sum_ref[...] = total
    else:
        w = _scaled(codes_ref[...], scale_ref[...], zero, bits)
        sum_ref[...] += jnp.dot(x_ref[...], w, preferred_element_type=jnp.float32)
    _write_sum(sum_ref, out_ref)


def _transposed_kernel(
    x_ref: Any,
    codes_ref: Any,
    scale_ref: Any,
    *refs: Any,  # zero point, if any; result [m, k]; accumulator
    bits: int,
    n: int,
) -> None:
    """One step of x [m, n] times codes [k, n] transposed; the last axis of the grid runs over n."""
    *zero, out_ref, sum_ref = refs
    _start_sum(sum_ref)
    x, scale = x_ref[...], scale_ref[...]
    if n % x.shape[1]:  # the last block reaches beyond the arrays, where anything may lie
        first = pl.program_id(3) * x.shape[1]
        x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) < n - first, x, 0)
        inside = lax.broadcasted_iota(jnp.int32, scale.shape, 2) < n - first
        scale = jnp.where(inside, scale, 0)
        zero = [jnp.where(inside, z[...], 0) for z in zero]
    w = _scaled(codes_ref[...], scale, zero, bits)
    sum_ref[...] += lax.dot_general(
        x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    _write_sum(sum_ref, out_ref)


def _scaled(codes: jax.Array, scale: jax.Array, zero: list[Any], bits: int) -> jax.Array:
    """Returns the weight tile [k, n] of packed codes and scales [groups, 1, n], in bfloat16."""
    w = pltpu.bitcast(codes, _signed(bits)).astype(jnp.float32)
    shape = w.shape
    w = w.reshape(scale.shape[0], -1, shape[1])
    if zero:
        w -= zero[0][...]
    return (w * scale).reshape(shape).astype(jnp.bfloat16)


def _signed(bits: int) -> Any:
    return {4: jnp.int4, 8: jnp.int8}[bits]


def _start_sum(sum_ref: Any) -> None:
    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)


def _write_sum(sum_ref: Any, out_ref: Any) -> None:
    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _() -> None:
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _typed_as(x: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    """A result that varies over the same axes of a mesh as x does."""
    return jax.ShapeDtypeStruct(
        shape, jnp.dtype(dtype), manual_axis_type=jax.typeof(x).manual_axis_type
    )
