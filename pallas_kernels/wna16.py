"""Weight-only group-quantized matrix product: x @ W^T with W stored in 1 to 8 bits (W4A16...).

The public face; what it computes is in ``wna16_reference``, how in ``wna16_xla``, ``wna16_tpu``
and ``wna16_gpu``, and how one is chosen in ``wna16_primitive``.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import packing, wna16_primitive
from pallas_kernels.wna16_reference import (
    Spec,
    from_tpu_layout,
    scale_from_kernel_layout,
    scale_to_kernel_layout,
    to_tpu_layout,
)

__all__ = [
    "from_tpu_layout",
    "scale_from_kernel_layout",
    "scale_to_kernel_layout",
    "to_tpu_layout",
    "wna16_matmul",
]


LAYOUTS = ("canonical", "tpu", "gpu")


def wna16_matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    bits: int,
    contracted: int | None = None,
    transpose: bool = False,
    casts: tuple[str, ...] = (),
    layout: str = "canonical",
    implementation: str | None = None,
    partitioned: bool | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies by a weight W [N, K] = (u - zero_point) * scale, u packed in ``bits`` bits.

    Differentiable any number of times in ``x`` and ``scale``, under every JAX transformation; what
    is kept for the reverse pass are x, the scale and the codes. Batched weights: use ``jax.vmap``.

    Args:
      x: [..., K], or [..., N] where ``transpose``.
      codes: int32 [N, words], unsigned codes packed along K by :func:`packing.pack`; in the layout
        "tpu", what :func:`to_tpu_layout` returns of them.
      scale: [N, G], [N, 1] or [1, 1]: one number per row and group of K / G consecutive columns. In
        the layouts "tpu" and "gpu", what :func:`scale_to_kernel_layout` returns: [G, 1, N].
      zero_point: uint8, shaped as ``scale``; None: 2**(bits-1).
      bits: width of a code, 1 to 8.
      contracted: K; None: x's last axis, or where ``transpose`` all that the words hold.
      transpose: False: y[..., N] = x @ W^T. True: y[..., K] = x @ W.
      casts: dtypes that W goes through, in order, after decoding in the scale's dtype. The product
        equals decoding, casting and ``jnp.matmul``.
      layout: "canonical", or what a platform's kernel reads without reordering it in every call:
        "tpu"; or "gpu", of which only the scales and zero points differ, as in "tpu".
      implementation: "reference", "xla", "mosaic_tpu" or "mosaic_gpu"; None: the best that the
        platform has and the operands allow, chosen when the program is lowered.
      partitioned: True says that XLA will partition the operation over devices, which it cannot do
        to a kernel, so that the default is "xla". None finds that out from the program: several
        devices, and not under a ``shard_map`` over all axes of the mesh.
      precision: as of ``jnp.matmul``.
      preferred_element_type: dtype of the result; None: that of x and W promoted.
      interpret: run Pallas kernels in interpret mode, for tests.

    Raises:
      ValueError: shapes or options that do not fit together.
      NotImplementedError: the named implementation does not support the operands.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"wna16_matmul: codes have 1 to 8 bits, not {bits}")
    if layout not in LAYOUTS:
        raise ValueError(f"wna16_matmul: layout {layout!r} is none of {', '.join(LAYOUTS)}")
    if implementation not in (None, *wna16_primitive.IMPLEMENTATIONS):
        known = ", ".join(wna16_primitive.IMPLEMENTATIONS)
        raise ValueError(f"wna16_matmul: implementation {implementation!r} is none of {known}")
    x, codes, scale = jnp.asarray(x), jnp.asarray(codes), jnp.asarray(scale)
    if codes.ndim != 2:
        raise ValueError(f"wna16_matmul: codes {codes.shape} are not 2-D: use jax.vmap for batches")
    quantities = [scale] if zero_point is None else [scale, jnp.asarray(zero_point)]
    n, words = reversed(codes.shape) if layout == "tpu" else codes.shape
    if layout != "canonical":
        quantities = [scale_from_kernel_layout(v) for v in quantities]
    stored = packing.codes_in(words, bits)
    k = contracted if contracted is not None else stored if transpose else x.shape[-1]
    quantities = [_per_row(v, n, k) for v in quantities]
    if len({v.shape for v in quantities}) > 1:
        raise ValueError("wna16_matmul: zero_point and scale differ in their number of groups")
    if not stored - packing.PACKING_MULTIPLE < k <= stored:
        raise ValueError(f"wna16_matmul: {words} words of {bits}-bit codes do not hold {k} columns")
    if x.shape[-1] != (n if transpose else k):
        raise ValueError(
            f"wna16_matmul: x {x.shape} does not fit W [{n}, {k}] with transpose={transpose}"
        )
    spec = Spec(
        bits=bits,
        k=k,
        layout=layout,
        casts=tuple(jnp.dtype(dtype).name for dtype in casts),
        transpose=transpose,
        out_dtype="",
        precision=_default_precision() if precision is None else precision,
        implementation=implementation,
        partitioned=partitioned,
        interpret=interpret,
    )
    out_dtype = preferred_element_type or spec.compute_dtype(x, scale)
    spec = dataclasses.replace(spec, out_dtype=jnp.dtype(out_dtype).name)
    rows = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
    operands = (rows, quantities[0][None], codes[None], *(z[None] for z in quantities[1:]))
    y = wna16_primitive.product_p.bind(*_vary_alike(operands), spec=spec)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _default_precision() -> str | None:
    return getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009  (not in its stubs)


def _per_row(values: jax.Array, n: int, k: int) -> jax.Array:
    """Returns scales or zero points [N or 1, G] as [N, G], checked against the weight [N, K]."""
    if values.ndim != 2 or values.shape[0] not in (1, n) or k % values.shape[1]:
        raise ValueError(
            f"wna16_matmul: scale or zero_point {values.shape} does not fit W [{n}, {k}]: give "
            "[N, G], G a divisor of K, or [N, 1] or [1, 1]"
        )
    return jnp.broadcast_to(values, (n, values.shape[1]))


def _vary_alike(operands: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Under ``shard_map``, marks all operands as varying over the axes over which any varies.

    What varies less would otherwise get a gradient that lacks the sum over devices.
    """
    varying = [jax.typeof(v).manual_axis_type.varying for v in operands]
    every: frozenset[str] = frozenset().union(*varying)
    return tuple(
        lax.pcast(v, tuple(sorted(every - own)), to="varying") if every - own else v
        for v, own in zip(operands, varying, strict=True)
    )
