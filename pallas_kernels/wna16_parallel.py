"""The weight-only quantized product over a mesh: Megatron's column- and row-parallel layers.

A weight W [N, K] split along its rows N gives each device columns of y = x @ W^T, with no
communication; split along K it takes columns of x, and the partial sums are added in float32
(arXiv:1909.08053, section 3). Codes, scales and zero points are split alongside, never gathered.
Kernels cannot be partitioned automatically, which is why this is a ``shard_map``.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import packing
from pallas_kernels.wna16 import wna16_matmul

BatchAxes = Sequence[str | tuple[str, ...] | None]


def column_parallel(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    mesh: Mesh,
    axis: str,
    batch_axes: BatchAxes = (),
    **options: Any,
) -> jax.Array:
    """Returns x @ W^T, with W's rows and the result's last axis split over ``axis``.

    Args:
      x: [..., K], its last axis whole on every device.
      codes: as of ``wna16_matmul``, split along N.
      scale: as of ``wna16_matmul``; [1, 1] is replicated.
      zero_point: as of ``wna16_matmul``.
      mesh: the mesh.
      axis: its axis that splits N.
      batch_axes: mesh axes that split x's leading axes, in order; None: not split.
      **options: of ``wna16_matmul``.

    Raises:
      ValueError: N is not a multiple of the axis's size.
    """
    layout = options.get("layout", "canonical")
    n = codes.shape[-1 if layout == "tpu" else -2]
    if n % mesh.shape[axis]:
        raise ValueError(f"column_parallel: N = {n} does not split over {mesh.shape[axis]} devices")
    return _parallel(
        functools.partial(wna16_matmul, **options),
        x,
        (codes, scale, zero_point),
        mesh=mesh,
        weight_axes=(axis, None),
        in_axis=None,
        out_axis=axis,
        batch_axes=batch_axes,
        layout=layout,
    )


def row_parallel(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    mesh: Mesh,
    axis: str,
    batch_axes: BatchAxes = (),
    bits: int,
    contracted: int | None = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> jax.Array:
    """Returns x @ W^T, with W's columns K and x's last axis split over ``axis``.

    Args:
      x: [..., K], its last axis split over ``axis``.
      codes: as of ``wna16_matmul``, split along K.
      scale: as of ``wna16_matmul``, split along its groups; a single group is replicated.
      zero_point: as of ``wna16_matmul``.
      mesh: the mesh.
      axis: its axis that splits K; the result is summed over it, in float32.
      batch_axes: mesh axes that split x's leading axes, in order; None: not split.
      bits: width of a code.
      contracted: K; None: x's last axis.
      preferred_element_type: dtype of the result, as of ``wna16_matmul``.
      **options: further ones of ``wna16_matmul``; no ``transpose``.

    Raises:
      ValueError: a device's part of K does not hold whole words or whole groups.
    """
    layout = options.get("layout", "canonical")
    k = x.shape[-1] if contracted is None else contracted
    groups = scale.shape[-1 if layout == "canonical" else -3]
    parts = mesh.shape[axis]
    unit = packing.PACKING_MULTIPLE
    if groups > 1:
        unit = math.lcm(unit, k // groups)
    if k % (parts * unit):
        raise ValueError(
            f"row_parallel: K = {k} in groups of {k // groups} does not split over {parts} "
            f"devices: a part must be a multiple of {unit}; group_size "
            f"{math.gcd(k // parts, k // groups)} would divide it"
        )
    weight_dtype = jnp.dtype(options["casts"][-1]) if options.get("casts") else scale.dtype
    out_dtype = preferred_element_type or jnp.promote_types(x.dtype, weight_dtype)

    def summed(
        x: jax.Array, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None
    ) -> jax.Array:
        partial_sum = wna16_matmul(
            x,
            codes,
            scale,
            zero_point,
            bits=bits,
            contracted=k // parts,
            preferred_element_type=jnp.promote_types(out_dtype, jnp.float32),
            **options,
        )
        return lax.psum(partial_sum, axis).astype(out_dtype)

    return _parallel(
        summed,
        x,
        (codes, scale, zero_point),
        mesh=mesh,
        weight_axes=(None, axis),
        in_axis=axis,
        out_axis=None,
        batch_axes=batch_axes,
        layout=layout,
    )


def weight_specs(
    operands: tuple[jax.Array | None, ...], n_axis: Any, k_axis: Any, *, layout: str = "canonical"
) -> tuple[PartitionSpec | None, ...]:
    """Returns the specs of (codes, scale, zero_point) of a weight [N, K] split over two axes.

    Args:
      operands: codes, scale, zero_point or None; only their shapes are read.
      n_axis: mesh axis, or axes, of N; None: not split.
      k_axis: the same of K.
      layout: as of ``wna16_matmul``.
    """
    quantities = operands[1:]
    specs: list[PartitionSpec | None] = []
    if layout == "tpu":
        specs.append(PartitionSpec(k_axis, n_axis))
    else:
        specs.append(PartitionSpec(n_axis, k_axis))
    for v in quantities:
        if v is None:
            specs.append(None)
            continue
        # One row or one group serves all, and is on every device.
        n, groups = v.shape if layout == "canonical" else (v.shape[-1], v.shape[-3])
        rows, columns = (n_axis if n > 1 else None), (k_axis if groups > 1 else None)
        if layout == "canonical":
            specs.append(PartitionSpec(rows, columns))
        else:
            specs.append(PartitionSpec(columns, None, rows))
    return tuple(specs)


def _parallel(
    function: Any,
    x: jax.Array,
    operands: tuple[jax.Array | None, ...],
    *,
    mesh: Mesh,
    weight_axes: tuple[str | None, str | None],
    in_axis: str | None,
    out_axis: str | None,
    batch_axes: BatchAxes,
    layout: str,
) -> jax.Array:
    lead = (*batch_axes, *(None for _ in range(x.ndim - 1 - len(batch_axes))))
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(
            PartitionSpec(*lead, in_axis),
            *weight_specs(operands, *weight_axes, layout=layout),
        ),
        out_specs=PartitionSpec(*lead, out_axis),
    )
    return mapped(x, *operands)
