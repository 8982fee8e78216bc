"""Grids of a fixed table of values times the largest magnitude of a group: NF4 and FP4."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from jaxcompress.core.arrays.base import STORED, Array
from jaxcompress.core.arrays.codebook import Codebook, encode_codebook
from jaxcompress.core.arrays.tables import TABLES
from jaxcompress.core.errors import InputError
from jaxcompress.layerwise.grid.base import Granularity, Range, Scaled


@dataclass(frozen=True)
class TableGrid(Scaled):
    """The values of a table times a scale, float32 as of bitsandbytes. Parameters are the scale.

    Attributes:
      table: a name of `core.arrays.tables.TABLES`.
      group_size: contracted columns that share a scale; None: one scale per row.
      static: see `Grid`.
    """

    table: str = "nf4"
    group_size: int | None = 64
    static: bool = True
    granularity: Granularity = "group"
    range: Range = "minmax"
    scale_bits: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity == "block":
            raise InputError(f"granularity block: {self.table} has scales of columns of a row")

    @property
    def values(self) -> Array:
        """The table, float32, ascending."""
        return jnp.asarray(TABLES[self.table], jnp.float32)

    def cover(self, low: Array, high: Array, share: None = None) -> Array:
        """The largest magnitude of ranges `[R]`."""
        absmax = jnp.maximum(jnp.abs(low), jnp.abs(high)).astype(jnp.float32)
        return self.kept_scale(absmax)

    def scaled_by(self, parameters: Array, factor: Array) -> Array:
        """See `Scaled`; scales are positive."""
        return super().scaled_by(parameters, jnp.abs(factor))

    def snap(self, weight: Array, parameters: Array) -> Array:
        """The nearest values of the grid for one column `[N]`; the lower of two as near."""
        tiny = jnp.finfo(jnp.float32).tiny
        at = weight.astype(jnp.float32) * (1 / jnp.maximum(parameters, tiny))
        values = self.values
        above = at[:, None] > (values[1:] + values[:-1]) / 2
        return values[above.sum(-1)] * parameters

    def encode(self, weight: Array, parameters: Array, share: None = None) -> Codebook:
        """A matrix that lies on this grid as codes; see `Grid`."""
        values = self.values
        return encode_codebook(
            weight,
            jnp.broadcast_to(values, (*weight.shape[:-2], 1, values.size)),
            self.stored_scale(parameters),
            bits=4,
            dims=STORED,
            fixed=self.table,
        )
