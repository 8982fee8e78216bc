"""The weight-only quantized product as a Mosaic GPU kernel for Hopper: few rows of x.

Decoding is bound by the weight's bytes, so the kernel is built to stream them:

  - operands are swapped, y^T = W @ x^T: a warpgroup's 64 rows of W are the tall side that wgmma
    wants, and go from registers, where they were decoded, straight into it; x^T, the narrow side,
    comes from shared memory.
  - codes are XORed into signed ones eight at a time and converted to bfloat16 exactly; a group's
    product is scaled after the multiplication, in float32.
  - the contracted axis is split over blocks until they fill the GPU; the partial sums are added
    outside, where XLA fuses that with what follows. So is the zero points' share, which is a
    product of x's sums over groups.

A block is two computing warpgroups, 128 rows of W, and one that copies.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.wna16_reference import Spec

MOST_ROWS = 128  # of x; above it a product is bound by arithmetic, and decoding once is better
WARPGROUP_ROWS = 64  # of W, what one wgmma takes
COMPUTING_WARPGROUPS = 2
BLOCK_ROWS = WARPGROUP_ROWS * COMPUTING_WARPGROUPS
MULTIPROCESSORS = 132  # of an H100 or H200
PIPELINE_STAGES = 6  # at most
SHARED_MEMORY = 220 * 1024  # bytes of a block, of 227 KiB: barriers and alignment take some
_NEEDS_INDEX = jax.__version_info__ < (0, 11)  # of plgpu.load; and refs have no transpose


class Steps(NamedTuple):
    """How the contracted axis is walked."""

    depth: int  # columns of W in a step
    per_group: int  # steps in a group
    every: int  # steps in K
    per_block: int  # steps that one block takes; the last block's may reach beyond K
    splits: int  # blocks that share a row of W


def product(
    x: jax.Array, scale: jax.Array, codes: jax.Array, *zero: jax.Array, spec: Spec
) -> jax.Array:
    """Returns ``wna16_reference.product`` of bfloat16 operands; sums are float32.

    Raises:
      NotImplementedError: anything but one product of at most 128 rows of bfloat16 with 4- or 8-bit
        codes in the canonical layout, N in whole blocks, groups of 64 or of multiples of 128.
    """
    steps = _checked_steps(x, scale, codes, spec)
    x, scale, codes = x[0], scale[0], codes[0]
    m, k = x.shape
    signed = {4: jnp.int4, 8: jnp.int8}[spec.bits]
    # The barrier: of constant words, XLA (jaxlib 0.10) folds this bitcast to wrong values.
    codes = lax.bitcast_convert_type(lax.optimization_barrier(codes), signed).reshape(
        scale.shape[0], k
    )
    # wgmma takes multiples of eight rows; steps beyond K multiply by zeros.
    beyond = steps.per_block * steps.splits * steps.depth - k
    rows = jnp.pad(x, ((0, -m % 8), (0, beyond)))
    y = jnp.sum(_call(rows, scale.T, codes, steps), axis=0).T[:m]
    if zero:
        offset = (zero[0][0].astype(jnp.float32) - 2 ** (spec.bits - 1)) * scale
        x_sums = jnp.sum(x.reshape(m, scale.shape[1], -1), axis=-1, dtype=jnp.float32)
        y -= lax.dot(x_sums, offset.T, precision=lax.Precision.HIGHEST)
    return y[None].astype(spec.out_dtype)


def _checked_steps(x: jax.Array, scale: jax.Array, codes: jax.Array, spec: Spec) -> Steps:
    batch, m, _ = x.shape
    _, n, groups = scale.shape
    if spec.bits not in (4, 8) or spec.layout == "tpu" or spec.transpose or spec.interpret:
        raise NotImplementedError(
            "mosaic_gpu multiplies by W^T, of 4- or 8-bit codes in a GPU's layout, on a GPU"
        )
    if x.dtype != jnp.bfloat16 or spec.compute_dtype(x, scale) != jnp.bfloat16:
        raise NotImplementedError(f"mosaic_gpu takes bfloat16, not {x.dtype.name}")
    if batch > 1 or not 0 < m <= MOST_ROWS:
        raise NotImplementedError(f"mosaic_gpu takes one product of 1 to {MOST_ROWS} rows of x")
    group_size = spec.k // groups
    depth = 64 if group_size == 64 else 128
    if n % BLOCK_ROWS or spec.k % depth or group_size % depth:
        raise NotImplementedError(
            f"mosaic_gpu: W [{n}, {spec.k}] in groups of {group_size} is not in whole blocks of "
            f"[{BLOCK_ROWS}, {depth}]"
        )
    every = spec.k // depth
    # One wave of blocks: registers leave room for one on a multiprocessor.
    splits = max(1, min(every, MULTIPROCESSORS // (n // BLOCK_ROWS)))
    per_block = -(-every // splits)
    return Steps(depth, group_size // depth, every, per_block, -(-every // per_block))


def _call(x: jax.Array, scale: jax.Array, codes: jax.Array, steps: Steps) -> jax.Array:
    """Returns partial sums [splits, N, M] of codes [N, K] times x [M, >= K], scaled by [G, N]."""
    m, n = x.shape[0], codes.shape[0]
    kernel = plgpu.kernel(
        functools.partial(_kernel, m=m, steps=steps),
        out_type=jax.ShapeDtypeStruct(
            (steps.splits, n, m), jnp.float32, manual_axis_type=jax.typeof(x).manual_axis_type
        ),
        scratch_types={"y_smem": plgpu.SMEM((BLOCK_ROWS, m), jnp.float32)},
        grid=(n // BLOCK_ROWS, steps.splits),
        grid_names=("rows", "split"),
        num_threads=COMPUTING_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return kernel(x, scale, codes)


def _kernel(
    x_gmem: Any, scale_gmem: Any, codes_gmem: Any, y_gmem: Any, y_smem: Any, *, m: int, steps: Steps
) -> None:
    block, split = lax.axis_index("rows"), lax.axis_index("split")
    first = lax.axis_index("warpgroup") * WARPGROUP_ROWS
    rows = pl.ds(first, WARPGROUP_ROWS)  # of the block, this warpgroup's

    def step(_: Any, x_smem: Any, scale_smem: Any, codes_smem: Any, total: jax.Array) -> Any:
        bits = _bits(codes_smem.dtype)
        w = _load(codes_smem.at[rows], _PACKED_LAYOUTS[bits])
        w ^= jnp.full_like(w, -(2 ** (bits - 1)))  # unsigned code to u - 2**(bits-1)
        w = plgpu.layout_cast(w, plgpu.Layout.WGMMA).astype(x_smem.dtype)

        def multiply(sum_ref: Any) -> jax.Array:
            plgpu.wgmma(sum_ref, w, _transposed(x_smem))
            plgpu.wgmma_wait(0)
            return sum_ref[...]

        part = pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, m), jnp.float32))
        scale = _load(scale_smem.at[0, rows], plgpu.Layout.WGMMA.reduce(1)).astype(jnp.float32)
        return total + part * lax.broadcast_in_dim(scale, part.shape, (0,))

    def whole(pipeline: Any) -> None:
        zeros = jnp.zeros((WARPGROUP_ROWS, m), jnp.float32)
        y_smem[rows] = pipeline(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))
        plgpu.commit_smem()
        target = y_gmem.at[split, pl.ds(block * BLOCK_ROWS + first, WARPGROUP_ROWS)]
        plgpu.copy_smem_to_gmem(y_smem.at[rows], target)
        plgpu.wait_smem_to_gmem(0)

    start = split * steps.per_block

    def inside(i: Any) -> Any:
        return jnp.minimum(start + i, steps.every - 1)

    bytes_of_stage = sum(
        rows * depth * _bits(ref.dtype) // 8
        for ref, rows, depth in (
            (x_gmem, m, steps.depth),
            (codes_gmem, BLOCK_ROWS, steps.depth),
            (scale_gmem, BLOCK_ROWS, 1),
        )
    )
    stages = min(PIPELINE_STAGES, (SHARED_MEMORY - 4 * BLOCK_ROWS * m) // bytes_of_stage)
    pipeline = plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps.per_block,),
        in_specs=[
            _block((m, steps.depth), x_gmem.dtype, lambda i: (0, start + i)),
            plgpu.BlockSpec(
                (1, BLOCK_ROWS),
                lambda i: (lax.div(inside(i), jnp.int32(steps.per_group)), block),
                memory_space=plgpu.SMEM,
            ),
            _block((BLOCK_ROWS, steps.depth), codes_gmem.dtype, lambda i: (block, inside(i))),
        ],
        memory_registers=40,
        wg_axis="warpgroup",
        num_compute_wgs=COMPUTING_WARPGROUPS,
        max_concurrent_steps=min(stages, steps.per_block),
        compute_context=whole,
    )
    pipeline(x_gmem, scale_gmem, codes_gmem)


_PACKED_LAYOUTS = {4: plgpu.Layout.WGMMA_UPCAST_4X, 8: plgpu.Layout.WGMMA_UPCAST_2X}


def _block(shape: tuple[int, int], dtype: Any, index: Any) -> plgpu.BlockSpec:
    """A block in shared memory, tiled and swizzled as wgmma and wide loads want it."""
    bits = _bits(dtype)
    swizzle = plgpu.find_swizzle(shape[1] * bits)
    transforms = (
        plgpu.TilingTransform((8, swizzle * 8 // bits)),
        plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.BlockSpec(shape, index, transforms=transforms, memory_space=plgpu.SMEM)


def _load(ref: Any, layout: Any) -> jax.Array:
    if _NEEDS_INDEX:
        return plgpu.load(ref, (), layout=layout)
    return plgpu.load(ref, layout=layout)  # type: ignore[call-arg]


def _transposed(ref: Any) -> Any:
    return plgpu.transpose_ref(ref, (1, 0)) if _NEEDS_INDEX else ref.T


def _bits(dtype: Any) -> int:
    return 4 if dtype == jnp.int4 else 8 * jnp.dtype(dtype).itemsize
