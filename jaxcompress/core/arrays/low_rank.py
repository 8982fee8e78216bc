"""Low rank: W = A B, and a product with it is two products."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays.base import (
    CONTRACTED,
    INNER,
    KERNEL,
    ROWS,
    Array,
    CompressedArray,
    Dims,
    register,
)


@register
class LowRank(CompressedArray):
    """The product of two thin matrices.

    Attributes:
      a: `[*lead, N, r]`.
      b: `[*lead, r, K]`.
    """

    roles = {"a": (ROWS, INNER), "b": (INNER, CONTRACTED)}
    trains = {"a": "factors", "b": "factors"}

    a: Array
    b: Array
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return self.b.shape[-1]

    @property
    def rank(self) -> int:
        """r, the inner size."""
        return self.a.shape[-1]

    def decode(self) -> Array:
        """`a @ b` `[*lead, N, K]` in full precision."""
        return jnp.matmul(self.a, self.b, precision=lax.Precision.HIGHEST)

    def product(
        self,
        x: Array,
        over: str,
        *,
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> Array:
        """`x` times the matrix: r (N + K) products for each row of x instead of N K.

        Args:
          x: over="k": `[*lead, M, K]`; over="n": `[*lead, M, N]`.
          over: which axis of the matrix is summed over, "k" or "n".
          precision: as in `jax.lax.dot_general`.
          preferred_element_type: as in `jax.lax.dot_general`, of both products.

        Returns:
          `[*lead, M, N]` over "k", `[*lead, M, K]` over "n".
        """
        a, b = self.a.astype(self.dtype), self.b.astype(self.dtype)
        if over == "k":
            first, second = jnp.swapaxes(b, -1, -2), jnp.swapaxes(a, -1, -2)
        else:
            first, second = a, b
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        return jnp.matmul(jnp.matmul(x, first, **options), second, **options)
