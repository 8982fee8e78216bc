"""Floats of 4 to 8 bits by arithmetic on integers: codes to values and back.

Formats: OCP 8-bit floating point (OFP8) and microscaling formats (MX) v1.0, sections 5.3 and 5.4.
No table is looked up and no narrow type of the compiler is needed, so that it is the same on every
platform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


@dataclass(frozen=True)
class Minifloat:
    """A format with a sign.

    Attributes:
      exponent: bits of the exponent.
      mantissa: bits of the mantissa.
      largest: the largest finite value; values beyond it become it.
      special: codes of the largest exponent that are no numbers: "ieee" (infinities and NaN), "nan"
        (the very last code only) or "none".
    """

    exponent: int
    mantissa: int
    largest: float
    special: str = "none"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is added to the exponent of a value."""
        return 2 ** (self.exponent - 1) - 1

    @property
    def largest_exponent(self) -> int:
        """floor(log2(largest))."""
        return math.floor(math.log2(self.largest))


FORMATS = {
    "e4m3fn": Minifloat(4, 3, 448.0, "nan"),
    "e5m2": Minifloat(5, 2, 57344.0, "ieee"),
    "e3m2": Minifloat(3, 2, 28.0),
    "e2m3": Minifloat(2, 3, 7.5),
    "e2m1": Minifloat(2, 1, 6.0),
}


def to_codes(x: Array, name: str) -> Array:
    """Codes of the nearest values, ties to even, beyond the largest the largest.

    The sign of zero is kept. NaN has no code.

    Args:
      x: float, of any shape.
      name: of `FORMATS`.

    Returns:
      uint8, sign first: `s e.. m..` in the low bits.
    """
    made = FORMATS[name]
    x = x.astype(jnp.float32)
    raw = lax.bitcast_convert_type(x, jnp.int32)
    size = jnp.minimum(jnp.abs(x), made.largest)
    exponent = ((raw >> 23) & 255) - 127
    exponent = jnp.clip(exponent, 1 - made.bias, made.largest_exponent)
    steps = jnp.round(size * power_of_two(made.mantissa - exponent)).astype(jnp.int32)
    # A mantissa that rounds up to the next power of two carries into the exponent.
    magnitude = ((exponent + made.bias - 1) << made.mantissa) + steps
    sign = (raw < 0).astype(jnp.int32) << (made.bits - 1)
    return (sign + magnitude).astype(jnp.uint8)


def from_codes(codes: Array, name: str) -> Array:
    """The values of codes, float32; the inverse of `to_codes`."""
    made = FORMATS[name]
    codes = codes.astype(jnp.int32)
    magnitude = codes & (2 ** (made.bits - 1) - 1)
    exponent, mantissa = magnitude >> made.mantissa, magnitude & (2**made.mantissa - 1)
    whole = mantissa + jnp.where(exponent > 0, 2**made.mantissa, 0)
    power = jnp.maximum(exponent, 1) - made.bias - made.mantissa
    value = whole.astype(jnp.float32) * power_of_two(power)
    if made.special == "nan":
        value = jnp.where(magnitude == 2 ** (made.bits - 1) - 1, jnp.nan, value)
    if made.special == "ieee":
        last = jnp.where(mantissa == 0, jnp.inf, jnp.nan)
        value = jnp.where(exponent == 2**made.exponent - 1, last, value)
    return jnp.where(codes >> (made.bits - 1) == 1, -value, value)


def power_of_two(exponent: Array) -> Array:
    """2^exponent, float32, for integers -126 to 127."""
    return lax.bitcast_convert_type((exponent.astype(jnp.int32) + 127) << 23, jnp.float32)


def from_e8m0(codes: Array) -> Array:
    """2^(code - 127), float32; 255 is NaN.

    2^-127 is subnormal, which a platform may take for zero: code 0 counts as 2^-126.
    """
    value = power_of_two(jnp.maximum(codes.astype(jnp.int32), 1) - 127)
    return jnp.where(codes == 255, jnp.nan, value)


def e8m0_covering(absmax: Array, name: str) -> Array:
    """The power of two by which values up to `absmax` are divided, as compressed-tensors chooses.

    The exponent of `absmax` less that of the largest value of the format, one more where `absmax`
    would round to beyond it.

    Args:
      absmax: float, of any shape.
      name: of `FORMATS`, the format of the values.

    Returns:
      Codes of E8M0, uint8: 127 + the exponent.
    """
    made = FORMATS[name]
    # The largest e4m3fn is 1.75 * 2^8: its last mantissa is NaN.
    mantissa = 1 if made.special == "nan" else made.mantissa
    raw = lax.bitcast_convert_type(absmax.astype(jnp.float32), jnp.int32)
    exponent = (raw + (1 << (23 - mantissa - 1))) >> 23
    codes = jnp.clip(exponent - made.largest_exponent, 0, 254)
    return jnp.where(jnp.isnan(absmax), 255, codes).astype(jnp.uint8)
