"""Sums of compressed arrays: a low rank part plus an int4 residual, outliers plus the rest."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from jaxcompress.core.arrays.base import (
    CONTRACTED,
    KERNEL,
    ROWS,
    Array,
    CompressedArray,
    Dims,
    register,
)
from jaxcompress.core.errors import InputError


@register
class Sum(CompressedArray):
    """The sum of two compressed arrays of the same matrix; more than two nest.

    Attributes:
      first: a compressed array `[*lead, N, K]`; only its matrix counts, not its dims.
      second: likewise.
    """

    roles = {"first": (ROWS, CONTRACTED), "second": (ROWS, CONTRACTED)}

    first: CompressedArray
    second: CompressedArray
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)

    @classmethod
    def of(cls, *parts: CompressedArray) -> Sum:
        """The sum of two or more parts, with the dims and the dtype of the first.

        Raises:
          InputError: fewer than two parts, or parts of different shapes or dims.
        """
        if len(parts) < 2:
            raise InputError(f"Sum.of: {len(parts)} part; two or more make a sum")
        total = parts[0]
        for part in parts[1:]:
            if (part.dims, part.shape) != (total.dims, total.shape):
                raise InputError(
                    f"Sum.of: a part of shape {part.shape} and dims {part.dims} cannot be added "
                    f"to one of shape {total.shape} and dims {total.dims}"
                )
            total = cls(total, part, total.dims, (str(total.dtype),))
        assert isinstance(total, cls)
        return total

    @property
    def parts(self) -> tuple[CompressedArray, CompressedArray]:
        """Both parts."""
        return self.first, self.second

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return self.first.contracted

    @property
    def column_unit(self) -> int:
        """A K shard must be one for both parts."""
        units = [part.column_unit for part in self.parts]
        return 0 if 0 in units else math.lcm(*units)

    def decode(self) -> Array:
        """`[*lead, N, K]`: the parts' matrices, added in their common dtype."""
        return jnp.add(self.first.matrix(), self.second.matrix())

    def product(
        self,
        x: Array,
        over: str,
        *,
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> Array:
        """`x` times the matrix: the sum of the parts' own products.

        Args:
          x: over="k": `[*lead, M, K]`; over="n": `[*lead, M, N]`.
          over: which axis of the matrix is summed over, "k" or "n".
          precision: as in `jax.lax.dot_general`.
          preferred_element_type: as in `jax.lax.dot_general`.

        Returns:
          `[*lead, M, N]` over "k", `[*lead, M, K]` over "n".
        """
        first, second = (
            part.replace(casts=(*part.casts, str(self.dtype))).product(
                x, over, precision=precision, preferred_element_type=preferred_element_type
            )
            for part in self.parts
        )
        return first + second
