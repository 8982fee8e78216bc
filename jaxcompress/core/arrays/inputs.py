"""Weights that say how their *input* is rounded: W8A8, W4A8, FP8 W8A8 and their kin.

What a model multiplies by such a weight is rounded first, with scales found anew for every row
(token) or matrix, or with a scale found beforehand from calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxcompress.core.arrays import minifloat
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import (
    CONTRACTED,
    INNER,
    KERNEL,
    ROWS,
    STORED,
    Array,
    CompressedArray,
    Dims,
    is_compressed,
    register,
)
from jaxcompress.core.arrays.minifloat import FORMATS
from jaxcompress.core.arrays.rounding import covering, divide, from_codes, nearest_codes
from jaxcompress.core.arrays.training import FakeQuantized
from jaxcompress.core.errors import InputError

FLOATS = {"fp8": "e4m3fn", "fp8_e5m2": "e5m2"}
INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}
LONGEST_INTEGER_SUM = 2**17 - 1  # products of two int8 that an int32 surely holds


def check_input_dtype(name: str) -> None:
    """Raise `InputError` unless inputs can be rounded to the format of this name."""
    if name not in INTEGERS and name not in FLOATS:
        raise InputError(f"activations {name!r}: use one of {', '.join((*INTEGERS, *FLOATS))}")


@register
class QuantizedInput(CompressedArray):
    """A weight whose input is rounded before the product.

    The array stands for the weight alone: where a model does something other than multiply by it
    (gathers its rows, adds it to something), nothing is rounded. Nor is what the *rows* are
    contracted with, as in the gradient of the input.

    Rounding is bit for bit that of compressed-tensors. Gradients pass straight through it; those
    of a static scale are the ones of learned step sizes (LSQ: Esser et al. 2020, arXiv:1902.08153,
    eq. 3), and then nothing passes where an input is clipped.

    Integers times a symmetric integer weight of one scale per row (or per matrix) are multiplied
    and summed as integers, exactly, and scaled after. Everything else is multiplied as floats.

    Attributes:
      weight: `[*lead, N, K]`: an array, or a compressed array of which only the matrix counts.
      input_scale: float `[*lead, 1, 1]`; None: found anew for every input, from its extremes.
      input_zero_point: uint8, shape of `input_scale`; None: symmetric, or found anew.
      input_dtype: "int2" .. "int8", "fp8" (e4m3fn), "fp8_e5m2".
      symmetric: integers without a zero point.
      granularity: of scales found anew: "token", one for each row of the input (each sample of a
        convolution's); "group", one for each `group_size` columns of a row; "tensor", one for all.
      normalized: whether the gradient of a static scale is divided by sqrt(K * largest code)
        (section 2.2 of the paper).
      group_size: columns that share a scale where granularity is "group", else None.
    """

    roles = {
        "weight": (ROWS, CONTRACTED),
        "input_scale": (INNER, INNER),
        "input_zero_point": (INNER, INNER),
    }
    trains = {"weight": "weights", "input_scale": "scales"}

    weight: Any
    input_scale: Array | None = None
    input_zero_point: Array | None = None
    input_dtype: str = "int8"
    symmetric: bool = True
    granularity: str = "token"
    normalized: bool = True
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)
    group_size: int | None = None

    @classmethod
    def of(cls, weight: Any, **fields: Any) -> QuantizedInput:
        """A weight whose input is rounded.

        Args:
          weight: a compressed array, whose dims and dtype are taken over, or `[*lead, N, K]`.
          **fields: of the class.

        Raises:
          InputError: an unknown format or granularity, or groups that do not divide the columns.
        """
        dims = weight.dims if is_compressed(weight) else STORED
        made = cls(weight, **{"dims": dims, "casts": (str(weight.dtype),), **fields})
        check_input_dtype(made.input_dtype)
        if made.granularity not in ("token", "tensor", "group"):
            raise InputError(f"granularity {made.granularity!r}: use token, group or tensor")
        if (made.granularity == "group") != (made.group_size is not None):
            raise InputError("granularity group: goes with a group_size")
        if made.contracted % (made.group_size or 1):
            raise InputError(
                f"inputs in groups of {made.group_size}: do not divide {made.contracted} columns"
            )
        return made

    @property
    def rows(self) -> int:
        """N, the rows of the stored matrix."""
        return self.weight.rows if is_compressed(self.weight) else self.weight.shape[-2]

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return self.weight.contracted if is_compressed(self.weight) else self.weight.shape[-1]

    @property
    def column_unit(self) -> int:
        """That of the weight, and whole groups of the input."""
        unit = self.weight.column_unit if is_compressed(self.weight) else 1
        return math.lcm(unit, self.group_size or 1)

    @property
    def static(self) -> bool:
        """Whether the scale of the input was found beforehand."""
        return self.input_scale is not None

    def decode(self) -> Array:
        """The matrix of the weight, `[*lead, N, K]`."""
        return self.weight.matrix() if is_compressed(self.weight) else self.weight

    def bare(self) -> Any:
        """The weight alone with the dims and dtype of this array: compressed, or as an array."""
        if not is_compressed(self.weight):
            return self.dense()
        casts = (*self.weight.casts, *self.casts)
        return self.weight.replace(dims=self.dims, casts=casts)

    def product(
        self, x: Array, over: str, *, precision: Any = None, preferred_element_type: Any = None
    ) -> Array:
        """Rounded `x` times the matrix; over="n": `x` as it is.

        Args:
          x: over="k": `[*lead, M, K]`; over="n": `[*lead, M, N]`.
          over: which axis of the matrix is summed over, "k" or "n".
          precision: as in `jax.lax.dot_general`.
          preferred_element_type: as in `jax.lax.dot_general`.

        Returns:
          `[*lead, M, N]` over "k", `[*lead, M, K]` over "n".
        """
        dtype = jnp.dtype(preferred_element_type or jnp.result_type(x.dtype, self.dtype))
        if over == "n":
            return _times(self, x, over, precision, dtype)
        if self._multiplies_integers():
            return _integer_product(self, x, precision, dtype)
        return _rounded_product(self, x, precision, dtype)

    def _multiplies_integers(self) -> bool:
        weight = self.weight
        return (
            self.input_dtype in INTEGERS
            and isinstance(weight, (Affine, FakeQuantized))
            and weight.bits <= 8
            and weight.symmetric
            and weight.groups == 1
            and weight.contracted <= LONGEST_INTEGER_SUM
            and self.group_size is None
        )

    def rounded(self, x: Array, axes: Sequence[int]) -> Array:
        """`x` rounded, in its own dtype.

        Args:
          x: an input, of which `axes` are those that share a scale per token (or sample); a static
            scale broadcasts against it.
          axes: the last axis of `x` among them.

        Raises:
          InputError: scales of groups, where more than the last axis is contracted.
        """
        if self.group_size is not None:
            if len(axes) > 1:
                raise InputError("inputs in groups: only of matrix products; use token or tensor")
            grouped = x.reshape(*x.shape[:-1], -1, self.group_size)
            per_group = self.replace(granularity="token", group_size=None)
            return per_group.rounded(grouped, (-1,)).reshape(x.shape)
        scale, zero = self.scales(x, axes)
        spec = (self.input_dtype, self.static, self.normalized)
        return fake_quantize_input(x, scale, zero, spec).astype(x.dtype)

    def scales(self, x: Array, axes: Sequence[int]) -> tuple[Array, Array | None]:
        """Scale and zero point for `x`; see `rounded`. The last axis of both has size 1."""
        if self.input_scale is not None:
            return self.input_scale, self.input_zero_point
        lead = len(self.lead)
        over = tuple(axes) if self.granularity == "token" else tuple(range(lead, x.ndim))
        x = lax.stop_gradient(x)
        low, high = x.min(over, keepdims=True), x.max(over, keepdims=True)
        return scale_of_range(low, high, self.input_dtype, self.symmetric)


def scale_of_range(
    low: Array, high: Array, input_dtype: str, symmetric: bool = True
) -> tuple[Array, Array | None]:
    """Scale, and zero point where asymmetric, with which a format just covers low .. high.

    As compressed-tensors finds them: of FP8 absmax / 448 (57,344 for e5m2), of integers see
    `rounding.covering`.

    Args:
      low: float of any shape.
      high: likewise.
      input_dtype: as of `QuantizedInput`.
      symmetric: of integers; FP8 always is.
    """
    if input_dtype in INTEGERS:
        return covering(low, high, bits=INTEGERS[input_dtype], symmetric=symmetric)
    largest = FORMATS[FLOATS[input_dtype]].largest
    scale = divide(jnp.maximum(jnp.abs(low), jnp.abs(high)), jnp.asarray(largest, low.dtype))
    return jnp.where(scale == 0, jnp.finfo(low.dtype).eps, scale), None


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def fake_quantize_input(
    x: Array, scale: Array, zero_point: Array | None, spec: tuple[str, bool, bool]
) -> Array:
    """The values of the grid that are nearest to `x`.

    Args:
      x: float `[..., K]`.
      scale: broadcasts to `x`; its last axis has size 1.
      zero_point: of its shape, or None.
      spec: (format, whether the scale is static, whether its gradient is normalized); see
        `QuantizedInput`.

    Returns:
      In the dtype of `scale`.
    """
    name = spec[0]
    if name in INTEGERS:
        u = nearest_codes(x, scale, zero_point, INTEGERS[name])
        return from_codes(u, scale, zero_point, INTEGERS[name])
    return _nearest_float(divide(x, scale), FLOATS[name]).astype(scale.dtype) * scale


@fake_quantize_input.defjvp
def _fake_quantize_input_jvp(
    spec: tuple[str, bool, bool], primals: Any, tangents: Any
) -> tuple[Array, Array]:
    x, scale, zero_point = primals
    d_x, d_scale, _ = tangents
    name, static, normalized = spec
    out = fake_quantize_input(x, scale, zero_point, spec)
    d_x = d_x.astype(out.dtype)
    if not static:
        return out, d_x
    if name in INTEGERS:
        bits = INTEGERS[name]
        zero: Any = 2 ** (bits - 1) if zero_point is None else zero_point.astype(scale.dtype)
        low, high = -zero, 2**bits - 1 - zero  # -Q_N and Q_P of the paper
    else:
        high = FORMATS[FLOATS[name]].largest
        low = -high
    steps = divide(x, scale).astype(scale.dtype)
    inside = (low < steps) & (steps < high)
    if name in INTEGERS:
        nearest = jnp.round(steps)
    else:
        nearest = _nearest_float(steps, FLOATS[name]).astype(steps.dtype)
    slope = jnp.where(inside, nearest - steps, jnp.clip(steps, low, high))
    if normalized:
        slope = slope / math.sqrt(x.shape[-1] * _largest_code(name, zero_point))
    return out, jnp.where(inside, d_x, 0) + slope * d_scale


def _nearest_float(x: Array, name: str) -> Array:
    return minifloat.from_codes(minifloat.to_codes(x, name), name)


def _largest_code(name: str, zero_point: Array | None) -> float:
    if name in FLOATS:
        return FORMATS[FLOATS[name]].largest
    return 2 ** (INTEGERS[name] - (zero_point is None)) - 1


def _times(leaf: QuantizedInput, x: Array, over: str, precision: Any, dtype: Any) -> Array:
    """`x` times the weight of `leaf`."""
    weight = leaf.bare()
    options = {"precision": precision, "preferred_element_type": dtype}
    if is_compressed(weight):
        return weight.product(x, over, **options)
    batch = tuple(range(x.ndim - 2))
    contract = ((x.ndim - 1,), (x.ndim - (1 if over == "k" else 2),))
    return lax.dot_general(x, leaf.matrix(), (contract, (batch, batch)), **options)


def _rounded_product(leaf: QuantizedInput, x: Array, precision: Any, dtype: Any) -> Array:
    """The product of the rounded input as floats."""
    return _times(leaf, leaf.rounded(x, (-1,)), "k", precision, dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _integer_product(leaf: QuantizedInput, x: Array, precision: Any, dtype: Any) -> Array:
    """The product of integers, scaled after: s_x s_w (q_x - z) q_w."""
    bits = INTEGERS[leaf.input_dtype]
    weight = (
        leaf.weight.with_layout("canonical") if isinstance(leaf.weight, Affine) else leaf.weight
    )
    scale, zero = leaf.scales(x, (-1,))
    middle = 2 ** (bits - 1)
    q_x = (nearest_codes(x, scale, zero, bits) - middle).astype(jnp.int8)
    q_w = (weight.integers().astype(jnp.int16) - 2 ** (weight.bits - 1)).astype(jnp.int8)
    batch = tuple(range(x.ndim - 2))
    total = lax.dot_general(
        q_x,
        q_w,
        (((x.ndim - 1,), (x.ndim - 1,)), (batch, batch)),
        preferred_element_type=jnp.int32,
    )
    if zero is not None:
        sums = q_w.astype(jnp.int32).sum(-1)[..., None, :]  # [*lead, 1, N]
        total = total - (zero.astype(jnp.int32) - middle) * sums
    rows, _ = weight.quantities()
    scales = scale.astype(jnp.float32) * jnp.swapaxes(rows, -1, -2).astype(jnp.float32)
    return (total.astype(jnp.float32) * scales).astype(dtype)


@partial(_integer_product.defjvp, symbolic_zeros=True)
def _integer_product_jvp(
    precision: Any, dtype: Any, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    """The derivative is that of the product of floats, which has the same value."""
    values, tree = jax.tree.flatten(primals)
    moves = jax.tree.leaves(tangents, is_leaf=_is_zero)
    at = [i for i, move in enumerate(moves) if not _is_zero(move)]

    def product(moved: list[Array]) -> Array:
        every = list(values)
        for i, value in zip(at, moved, strict=True):
            every[i] = value
        leaf, x = jax.tree.unflatten(tree, every)
        return _rounded_product(leaf, x, precision, dtype)

    out = _integer_product(*primals, precision, dtype)
    _, tangent = jax.jvp(product, ([values[i] for i in at],), ([moves[i] for i in at],))
    return out, tangent


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)
