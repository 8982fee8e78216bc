"""Where quantized values may lie: the protocol that the column solver asks for, and integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp

from jaxcompress.core.arrays.affine import (
    Affine,
    check_bits,
    encode_affine,
    from_codes,
    minmax_range,
    nearest_codes,
)
from jaxcompress.core.arrays.base import STORED, Array
from jaxcompress.core.errors import InputError


class Grid(Protocol):
    """The values that a quantized weight may take, given the parameters of its group.

    A grid is a static argument of a compiled program: frozen and hashable.

    Attributes:
      group_size: contracted columns that share parameters; None: all of a row.
      static: the parameters of every group come from the weights as given. Otherwise a group's
        come from its weights as the solver has updated them when it gets there.
    """

    @property
    def group_size(self) -> int | None: ...

    @property
    def static(self) -> bool: ...

    def find(self, weight: Array) -> Any:
        """Parameters of one group: a pytree of arrays `[N]`, for float32 weights `[N, G]`."""
        ...

    def snap(self, weight: Array, parameters: Any) -> Array:
        """The grid's values nearest to float32 weights `[N]`, one column; 0 lies on the grid."""
        ...


@dataclass(frozen=True)
class IntegerGrid:
    """Affine integers, (u - zero) * scale: the ranges and the rounding of `core.arrays.affine`.

    Parameters are `(scale, zero_point)`, the latter None where symmetric.

    Attributes:
      bits: 1 to 8.
      group_size: contracted columns that share a scale; None: one scale per row.
      symmetric: fixed zero in the middle of the codes; otherwise a zero point per group.
      static: see `Grid`.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    static: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group_size is not None and self.group_size < 1:
            raise InputError(
                f"group_size {self.group_size}: must be positive, or None: one scale per row"
            )

    def find(self, weight: Array) -> tuple[Array, Array | None]:
        """Scale and zero point that just cover each row of `[N, G]`, each `[N]`."""
        scale, zero = minmax_range(weight, bits=self.bits, groups=1, symmetric=self.symmetric)
        return scale[:, 0], None if zero is None else zero[:, 0]

    def snap(self, weight: Array, parameters: tuple[Array, Array | None]) -> Array:
        """The nearest values of the grid for one column `[N]`; ties to even."""
        scale, zero = parameters
        scale, zero = scale[:, None], None if zero is None else zero[:, None]
        codes = nearest_codes(weight[:, None], scale, zero, self.bits)
        return from_codes(codes, scale, zero, self.bits)[:, 0]

    def encode(self, weight: Array, parameters: tuple[Array, Array | None]) -> Affine:
        """A matrix that lies on this grid as codes; decoding gives it back bit for bit.

        Args:
          weight: float32 `[*lead, N, K]`, a solution's weight.
          parameters: a solution's parameters, each `[*lead, N, groups]`.
        """
        scale, zero = parameters
        return encode_affine(weight.astype(jnp.float32), scale, zero, bits=self.bits, dims=STORED)
