"""The weight-only quantized product in plain JAX: what every implementation must equal.

A weight is W[n, k] = (u[n, k] - z[n, k // g]) * s[n, k // g]: unsigned codes u packed along k, a
scale s and a zero point z per row n and group of g contracted columns k.

All functions of the operation's files take operands with one leading axis B, that of a batch of
independent products:

  x:     [B, M, K], or [B, M, N] where ``spec.transpose``
  scale: [B, N, G]
  codes: int32 [B, N, words], or [B, words, N] in the layout "tpu"
  zero:  nothing, or one uint8 [B, N, G]
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import packing

Unpack = Callable[[jax.Array, int, int | None], jax.Array]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static about a product; hashable, so that a primitive can carry it.

    Attributes:
      bits: width of a code.
      k: length of the contracted axis of the weight, without padding.
      layout: "canonical", "tpu" or "gpu"; here it tells of the codes alone, and only "tpu" differs.
      casts: dtypes that the weight goes through after decoding in the scale's dtype.
      transpose: False for x @ W^T, True for x @ W.
      out_dtype: dtype of the result.
      precision: as of ``lax.dot_general``.
      implementation: name of an implementation; None chooses one when lowered.
      partitioned: whether the auto-partitioner will split the operation; None reads that off the
        program being lowered.
      interpret: run Pallas kernels in interpret mode.
    """

    bits: int
    k: int
    layout: str
    casts: tuple[str, ...]
    transpose: bool
    out_dtype: str
    precision: lax.PrecisionLike
    implementation: str | None
    partitioned: bool | None
    interpret: bool

    def weight_dtype(self, scale: jax.Array) -> jnp.dtype:
        """Dtype of the decoded weight."""
        return jnp.dtype(self.casts[-1]) if self.casts else scale.dtype

    def compute_dtype(self, x: jax.Array, scale: jax.Array) -> jnp.dtype:
        """Dtype to which both operands of the product are promoted."""
        return jnp.promote_types(x.dtype, self.weight_dtype(scale))


def canonical_codes(codes: jax.Array, spec: Spec) -> jax.Array:
    """Returns codes of any layout as [..., N, words]."""
    return from_tpu_layout(codes, bits=spec.bits) if spec.layout == "tpu" else codes


def sign_bits(bits: int) -> jnp.int32:
    """A word with the highest bit of every code set: XOR with it is u - 2**(bits-1) and back."""
    word = sum(1 << (i + bits - 1) for i in range(0, 32, bits))
    return jnp.int32(word - (1 << 32))


def to_tpu_layout(codes: jax.Array, *, bits: int) -> jax.Array:
    """Reorders packed codes into what the TPU kernel reads; done once, when a leaf is placed.

    Args:
      codes: int32 [..., N, words], unsigned codes.
      bits: 4 or 8.

    Returns:
      int32 [..., words, N]: each word holds 32 / bits *signed* codes (u - 2**(bits-1), two's
      complement) consecutive along the contracted axis, the first in the lowest bits.

    Raises:
      NotImplementedError: other widths have no TPU layout.
    """
    if bits not in (4, 8):
        raise NotImplementedError(f"the tpu layout is for codes of 4 and 8 bits, not {bits}")
    return jnp.swapaxes(codes ^ sign_bits(bits), -1, -2)


def from_tpu_layout(codes: jax.Array, *, bits: int) -> jax.Array:
    """The inverse of :func:`to_tpu_layout`."""
    if bits not in (4, 8):
        raise NotImplementedError(f"the tpu layout is for codes of 4 and 8 bits, not {bits}")
    return jnp.swapaxes(codes, -1, -2) ^ sign_bits(bits)


def scale_to_kernel_layout(scale: jax.Array, n: int) -> jax.Array:
    """Reorders scales or zero points [..., N or 1, G] into [..., G, 1, N]."""
    scale = jnp.broadcast_to(scale, (*scale.shape[:-2], n, scale.shape[-1]))
    return jnp.swapaxes(scale, -1, -2)[..., None, :]


def scale_from_kernel_layout(scale: jax.Array) -> jax.Array:
    """The inverse of :func:`scale_to_kernel_layout`: [..., G, 1, N] into [..., N, G]."""
    return jnp.swapaxes(scale[..., 0, :], -1, -2)


def centred(
    spec: Spec,
    codes: jax.Array,
    zero: tuple[jax.Array, ...],
    groups: int,
    dtype: jnp.dtype,
    unpack: Unpack = packing.unpack,
) -> jax.Array:
    """Returns u - z of canonical codes [..., N, words] as [..., N, G, g], exact in ``dtype``."""
    u = unpack(codes, spec.bits, spec.k).astype(dtype)
    u = u.reshape(*u.shape[:-1], groups, spec.k // groups)
    if zero:
        return u - zero[0][..., None].astype(dtype)
    return u - jnp.asarray(2 ** (spec.bits - 1), dtype)


def decode(
    spec: Spec,
    scale: jax.Array,
    codes: jax.Array,
    zero: tuple[jax.Array, ...],
    unpack: Unpack = packing.unpack,
) -> jax.Array:
    """Returns the dense weight [..., N, K] of canonical codes, after the casts."""
    w = centred(spec, codes, zero, scale.shape[-1], scale.dtype, unpack) * scale[..., None]
    w = w.reshape(*w.shape[:-2], spec.k)
    for dtype in spec.casts:
        w = w.astype(dtype)
    return w


def multiply(spec: Spec, x: jax.Array, w: jax.Array, out_dtype: Any = None) -> jax.Array:
    """Returns x @ w^T, or x @ w where ``spec.transpose``; leading axes are batch axes."""
    dtype = jnp.promote_types(x.dtype, w.dtype)
    batch = tuple(range(x.ndim - 2))
    contracted = ((x.ndim - 1,), (w.ndim - 2 if spec.transpose else w.ndim - 1,))
    return lax.dot_general(
        x.astype(dtype),
        w.astype(dtype),
        (contracted, (batch, batch)),
        precision=spec.precision,
        preferred_element_type=jnp.dtype(out_dtype or spec.out_dtype),
    )


def product(
    x: jax.Array, scale: jax.Array, codes: jax.Array, *zero: jax.Array, spec: Spec
) -> jax.Array:
    """Decodes the whole weight, then multiplies: [B, M, N], or [B, M, K] where transposed."""
    return multiply(spec, x, decode(spec, scale, canonical_codes(codes, spec), zero))


def scale_gradient(
    a: jax.Array, b: jax.Array, codes: jax.Array, *zero: jax.Array, spec: Spec, groups: int
) -> jax.Array:
    """The gradient of sum(a * (b @ W^T)) with respect to the scale.

    Args:
      a: [B, M, N].
      b: [B, M, K].
      codes: packed codes in the layout of ``spec``.
      *zero: nothing, or the zero points.
      spec: its ``out_dtype`` is the scale's.
      groups: G.

    Returns:
      [B, N, G]: sum over group G's columns k and over m of a[m, n] * b[m, k] * (u - z)[n, k].
    """
    factor_dtype = jnp.promote_types(a.dtype, b.dtype)
    dtype = accumulator(factor_dtype)
    batch = tuple(range(a.ndim - 2))
    outer = lax.dot_general(
        a.astype(factor_dtype),
        b.astype(factor_dtype),
        (((a.ndim - 2,), (b.ndim - 2,)), (batch, batch)),
        precision=spec.precision,
        preferred_element_type=dtype,
    )
    u = centred(spec, canonical_codes(codes, spec), zero, groups, dtype)
    return jnp.sum(outer.reshape(u.shape) * u, axis=-1).astype(spec.out_dtype)


def accumulator(dtype: jnp.dtype | str) -> jnp.dtype:
    """The dtype in which partial sums of products of ``dtype`` are kept."""
    return jnp.promote_types(dtype, jnp.float32)


def words_hold_one_group(spec: Spec, groups: int) -> bool:
    """Whether codes do not straddle words, nor words groups."""
    return 32 % spec.bits == 0 and spec.k // groups % (32 // spec.bits) == 0
