"""The forms in which sparse and quantized weights are trained.

They hold the full weight beside what will be made of it, so that sparse training and
quantization-aware training are ordinary training of a model with such leaves.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jaxcompress.core.arrays import minifloat
from jaxcompress.core.arrays.affine import Affine, encode_affine, plain
from jaxcompress.core.arrays.base import (
    CONTRACTED,
    KERNEL,
    ROWS,
    Array,
    CompressedArray,
    Dims,
    is_compressed,
    register,
)
from jaxcompress.core.arrays.codebook import Codebook, nearest_entries, scaled_down
from jaxcompress.core.arrays.floats import Float, encode_float
from jaxcompress.core.arrays.rounding import (
    divide,
    from_codes,
    in_groups,
    nearest_codes,
    out_of_groups,
)
from jaxcompress.core.arrays.shared_rows import SharedRows
from pallas_kernels.packing import pack


@register
class Masked(CompressedArray):
    """A weight of which some entries count as zero.

    Removed entries get the gradient 0, and whatever an optimizer does to them (momentum, weight
    decay), the array that the model sees has zeros there.

    Attributes:
      weight: float `[*lead, N, K]`.
      mask: bool `[*lead, N, K]`, True = kept.
    """

    roles = {"weight": (ROWS, CONTRACTED), "mask": (ROWS, CONTRACTED)}
    trains = {"weight": "weights"}

    weight: Array
    mask: Array
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return self.weight.shape[-1]

    def decode(self) -> Array:
        """The weight where the mask keeps it, else 0, `[*lead, N, K]`."""
        return jnp.where(self.mask, self.weight, jnp.zeros_like(self.weight))


@register
class FakeQuantized(CompressedArray):
    """A weight rounded to the grid of `Affine` on its way into the model.

    The gradient of the weight passes straight through the rounding where it is not clipped; that
    of the scale is the one of learned step sizes (LSQ: Esser et al. 2020, arXiv:1902.08153,
    eq. 3 and 5). What the model sees is, bit for bit, what `to_affine` stores.

    Attributes:
      weight: float `[*lead, N, K]`, or a compressed array of which only the matrix counts, such as
        `Masked`: what it removes stays 0 where 0 is on the grid.
      scale: float `[*lead, N, K / group]`; per channel `[*lead, N, 1]`; per tensor `[*lead, 1, 1]`;
        or compressed, see `Affine`. It must stay away from 0 in training.
      zero_point: integers or floats, shape of `scale`, or None (symmetric). It is not trained.
      bits: 1 to 8, or 16.
      normalized: whether the gradient of each scale is divided by sqrt(weights that share it *
        largest code) (section 2.2 of the paper), which makes its updates about as large,
        relatively, as those of the weights.
      width: columns of a group where the last one may have fewer; None: all have K / groups.
    """

    roles = {
        "weight": (ROWS, CONTRACTED),
        "scale": (ROWS, CONTRACTED),
        "zero_point": (ROWS, CONTRACTED),
    }
    trains = {"weight": "weights", "scale": "scales"}

    weight: Any
    scale: Any
    zero_point: Any = None
    bits: int = 4
    normalized: bool = True
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)
    width: int | None = None

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return _columns(self.weight)

    @property
    def groups(self) -> int:
        """Scales of each row (1: per channel or per tensor)."""
        return self.scale.shape[-1]

    @property
    def group_size(self) -> int:
        """Columns that share a scale (K itself: per channel or per tensor)."""
        return self.width or self.contracted // max(self.groups, 1)

    @property
    def column_unit(self) -> int:
        """Whole groups, where there are several."""
        if self.groups > 1 and self.contracted % self.group_size:
            return 0
        return self.group_size if self.groups > 1 else 1

    @property
    def symmetric(self) -> bool:
        """Whether the zero is fixed at 2^(bits-1)."""
        return self.zero_point is None

    def quantities(self) -> tuple[Array, Array | None]:
        """Scale and zero point as arrays, in the dtypes of `Affine.quantities`."""
        scale, zero = plain(self.scale), self.zero_point
        wide = jnp.promote_types(scale.dtype, self.casts[0])
        return scale.astype(wide), None if zero is None else plain(zero)

    def integers(self) -> Array:
        """Codes that `to_affine` stores, int32 `[*lead, N, K]`."""
        return nearest_codes(_matrix(self.weight), *self.quantities(), self.bits, self.width)

    def decode(self) -> Array:
        """The nearest points of the grid, `[*lead, N, K]` in the dtype of `quantities`."""
        divisor = 1.0
        if self.normalized:
            largest = max(2 ** (self.bits - self.symmetric) - 1, 1)
            divisor = math.sqrt(_sharing(self.weight, self.scale) * largest)
        spec = (self.bits, divisor, self.width)
        return fake_quantize(_matrix(self.weight), *self.quantities(), spec)

    def to_affine(self) -> Affine:
        """The array that is stored once training is over; decodes to the same bits."""
        return encode_affine(
            _matrix(self.weight),
            self.scale,
            self.zero_point,
            bits=self.bits,
            dims=self.dims,
            casts=self.casts,
            width=self.width,
        )


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def fake_quantize(
    weight: Array,
    scale: Array,
    zero_point: Array | None,
    spec: tuple[int, float, int | None],
) -> Array:
    """(clip(round(w / scale) + zero, 0, 2^bits - 1) - zero) * scale, with the derivatives of LSQ.

    Args:
      weight: float `[*lead, N, K]`.
      scale: float `[*lead, N or 1, groups]`.
      zero_point: of its shape, or None.
      spec: (bits, what the derivative by the scale is divided by, width of a group or None).

    Returns:
      `[*lead, N, K]` in the dtype of `scale`.
    """
    bits, _, width = spec
    u = nearest_codes(weight, scale, zero_point, bits, width)
    return from_codes(u, scale, zero_point, bits, width)


@fake_quantize.defjvp
def _fake_quantize_jvp(
    spec: tuple[int, float, int | None], primals: Any, tangents: Any
) -> tuple[Array, Array]:
    weight, scale, zero_point = primals
    d_weight, d_scale, _ = tangents
    bits, divisor, width = spec
    codes = nearest_codes(weight, scale, zero_point, bits, width)
    out = from_codes(codes, scale, zero_point, bits, width)
    groups = scale.shape[-1]
    zero: Any = 2 ** (bits - 1)
    if zero_point is not None:
        zero = zero_point.astype(scale.dtype)[..., None]
    low, high = -zero, 2**bits - 1 - zero  # -Q_N and Q_P of the paper
    steps = divide(in_groups(weight, groups, width).astype(scale.dtype), scale[..., None])
    inside = (low < steps) & (steps < high)
    nearest = in_groups(codes, groups, width).astype(scale.dtype) - zero
    slope = (nearest - jnp.where(inside, steps, 0)) / divisor
    through = jnp.where(inside, in_groups(d_weight, groups, width).astype(scale.dtype), 0)
    tangent = through + slope * d_scale[..., None]
    return out, out_of_groups(tangent, weight.shape).astype(out.dtype)


@register
class FixedTable(Codebook):
    """A `Codebook` whose table belongs to its format (NF4): scales train, values do not."""

    trains = {"scale": "scales"}


@register
class FakeEncoded(CompressedArray):
    """A weight rounded to narrow floats, or to the values of a table, on its way into the model.

    Scales and tables are those of `form` all the time. Gradients pass straight through where the
    weight is not clipped; those of scales that are floats are the ones of learned step sizes, as
    in `FakeQuantized`, those of a table's values the sums over the weights that have them (Han et
    al. 2016, arXiv:1510.00149, section 3). What the model sees is, bit for bit, what `to_stored`
    stores.

    Attributes:
      weight: as of `FakeQuantized`.
      form: `Float`, `Codebook` or `FixedTable` `[*lead, N, K]`; its codes are those of the
        beginning.
      normalized: as of `FakeQuantized`.
    """

    roles = {"weight": (ROWS, CONTRACTED), "form": (ROWS, CONTRACTED)}
    trains = {"weight": "weights"}

    weight: Any
    form: Any
    normalized: bool = True
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return _columns(self.weight)

    @property
    def column_unit(self) -> int:
        """That of the form."""
        return self.form.column_unit

    def decode(self) -> Array:
        """The nearest values, `[*lead, N, K]`."""
        stored, weight = self.to_stored(), _matrix(self.weight)
        surrogate = _float_surrogate if isinstance(stored, Float) else _table_surrogate
        moves = surrogate(stored, weight, self.normalized)
        return _with_derivative(stop_gradient(stored.decode()), moves)

    def to_stored(self) -> Any:
        """The array that is stored once training is over; decodes to the same bits."""
        form, matrix = self.form, stop_gradient(_matrix(self.weight))
        if isinstance(form, Float):
            return encode_float(
                matrix,
                form.scale,
                form.global_scale,
                element=form.element,
                scale_format=form.scale_format,
                dims=self.dims,
                casts=self.casts,
                width=form.width,
            )
        table = jnp.sort(form.table)  # training may have changed the order
        offset = 0 if form.offset is None else form.offset
        codes = nearest_entries(scaled_down(matrix - offset, form.scale), table)
        return Codebook(
            codes.astype(jnp.uint8) if form.unpacked else pack(codes, form.bits),
            table,
            form.scale,
            form.bits,
            form.pad,
            self.dims,
            self.casts,
            form.offset,
            form.fixed,
        )


def _float_surrogate(stored: Float, weight: Array, normalized: bool) -> Array:
    """What has the derivatives of rounding to `stored`: (value + w / scale) * scale."""
    scale, element = stored.scales(), stored.element
    largest = minifloat.FORMATS[element].largest
    if normalized:
        scale = _slowed(scale, math.sqrt(_sharing(weight, stored.scale) * largest))
    values = minifloat.from_codes(stored.integers(), element).astype(scale.dtype)
    steps = divide(
        in_groups(weight.astype(scale.dtype), scale.shape[-1], stored.width), scale[..., None]
    )
    values = in_groups(values, scale.shape[-1], stored.width) + _moving(steps, -largest, largest)
    return out_of_groups(values * scale[..., None], weight.shape)


def _table_surrogate(stored: Codebook, weight: Array, normalized: bool) -> Array:
    """What has the derivatives of rounding to `stored`: (table[code] + w / scale) * scale."""
    table, scale = stored.table, stored.scale
    if scale is not None:
        scale = plain(scale)
        scale = _slowed(scale, math.sqrt(_sharing(weight, scale))) if normalized else scale
    low, high = table[..., :1], table[..., -1:]
    values = stored.replace(scale=None, offset=None).decode()
    values = values + _moving(scaled_down(weight, scale).astype(values.dtype), low, high)
    if scale is not None:
        grouped = in_groups(values, scale.shape[-1]) * scale[..., None]
        values = out_of_groups(grouped, weight.shape)
    return values if stored.offset is None else values + stored.offset


def _moving(steps: Array, low: Any, high: Any) -> Array:
    """Zeros with the derivative of `steps`, but none where they are clipped."""
    return jnp.where((low <= steps) & (steps <= high), steps - stop_gradient(steps), 0)


def _slowed(x: Array, by: float) -> Array:
    """x with its derivative divided."""
    return x / by + stop_gradient(x - x / by)


@jax.custom_jvp
def _with_derivative(value: Array, moves: Array) -> Array:
    """`value`, with the derivatives of `moves`."""
    return value


@_with_derivative.defjvp
def _with_derivative_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return primals[0], tangents[1].astype(primals[0].dtype)


def _matrix(weight: Any) -> Array:
    return weight.matrix() if is_compressed(weight) else weight


def _columns(weight: Any) -> int:
    return weight.contracted if is_compressed(weight) else weight.shape[-1]


def _sharing(weight: Any, scale: Any) -> int:
    """Weights that share a scale."""
    held = scale.values if isinstance(scale, SharedRows) else scale
    return max(weight.size // max(held.size, 1), 1)
