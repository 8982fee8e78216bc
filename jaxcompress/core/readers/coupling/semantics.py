"""How primitives treat values, index by index: what pass 2 knows about them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from .program import Record


def names(text: str) -> frozenset[str]:
    """A set of names, written as one text."""
    return frozenset(text.split())


JOINS = frozenset({"carry_in", "carry_out", "branches"})  # the result is one of the operands
SUMS = frozenset({"add", "sub", "add_any", "complex"})
COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "eq_to", "lt_to", "le_to"})
EXTREMA = frozenset({"max", "min"})
SUM_REDUCTIONS = frozenset({"reduce_sum", "psum"})
PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})
# Linear in their one operand.
_PASSING = names(
    """neg copy copy_p stop_gradient reduce_precision sharding_constraint real imag conj name
    pvary"""
)

# Of the operations that are not index by index: linear in what passes through them, or only
# ordered by it. Everything else is neither.
LINEAR_THROUGH = PRODUCTS | names(
    """broadcast_in_dim concatenate cumsum device_put dynamic_slice dynamic_update_slice fft gather
    optimization_barrier pad psum reduce_sum reduce_window_sum reshape rev scan_slice scan_stack
    scatter scatter-add scatter-sub slice split squeeze stack tile transpose unstack"""
)
ORDERED_THROUGH = names(
    """approx_top_k argmax argmin cummax cummin pmax pmin reduce_max reduce_min reduce_window_max
    reduce_window_min scatter-max scatter-min sort top_k"""
)
# Results that hold positions and not values.
POSITIONS = frozenset({("argmax", 0), ("argmin", 0), ("top_k", 1), ("approx_top_k", 1)})

# f(0) = 0 for one operand.
ZERO_TO_ZERO = _PASSING | names(
    """abs asin asinh atan atanh bessel_i1e cbrt ceil convert_element_type erf erf_inv expm1 floor
    log1p round sign sin sinh sqrt square tan tanh"""
)


def passes(record: Record) -> bool:
    """An operation on one operand that is linear up to rounding."""
    if record.primitive == "convert_element_type":
        return is_wide_float(record.params["new_dtype"])
    return record.primitive in _PASSING


def is_wide_float(dtype: Any) -> bool:
    """A float in which scaling by a constant loses nothing but rounding (8-bit floats saturate)."""
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize >= 2


def pads_other_axes(record: Record, axes: set[int]) -> bool:
    """A `pad` that writes its padding value next to values, along none of `axes`."""
    config = record.params["padding_config"]
    return any(c != (0, 0, 0) for k, c in enumerate(map(tuple, config)) if k not in axes)
