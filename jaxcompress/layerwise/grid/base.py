"""What a grid is, and how the scales of a matrix are shared: groups, rows, blocks, the matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array, CompressedArray
from jaxcompress.core.arrays.rounding import groups_of, rounded
from jaxcompress.core.arrays.shared_rows import share_rows
from jaxcompress.core.errors import InputError

Granularity = Literal["group", "channel", "tensor", "block"]
Range = Literal["minmax", "percentile", "mse"]

SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
MIRRORED = (1.0, 0.9, 0.8, -0.95, -0.85, -0.75)
PERCENTILE = 99.0  # where the range "percentile" ends; it begins as far from the other end
SHRINKS = (0.2, 1.0, 33)  # the range "mse" tries 33 shares of the whole range, 0.2 to 1


class Grid(Protocol):
    """The values that a quantized weight may take, given the parameters of its group.

    A grid is a static argument of a compiled program: frozen and hashable. One of your own
    inherits from this and says `find` and `snap`, and `encode` if it is to be stored.

    Attributes:
      group_size: contracted columns that share parameters; None: all of a row.
      static: the parameters of every group come from the weights as given. Otherwise a group's
        come from its weights as the solver has updated them when it gets there.
      shrinks: factors of the found parameters that a search tries, see `layerwise.descent`; a
        negative one mirrors a grid that is not symmetric around 0.
    """

    group_size: int | None
    static: bool

    @property
    def shrinks(self) -> tuple[float, ...]:
        return (1.0,)

    def rescaled(self, parameters: Any, factor: Array) -> Any:
        """Parameters of values `factor` times as large; as they are where that is no choice.

        Args:
          parameters: each leaf `[N, groups]`.
          factor: float32 `[N, groups]`, not 0.
        """
        return parameters

    def groups(self, columns: int) -> int:
        """How many groups so many contracted columns make.

        Raises:
          InputError: the group size does not divide them.
        """
        return groups_of(columns, self.group_size)

    def share(self, weight: Array) -> Any:
        """What all groups of a matrix `[N, K]` have in common, such as NVFP4's global scale."""
        return None

    @abstractmethod
    def find(self, weight: Array, share: Any) -> Any:
        """Parameters of one group: a pytree of arrays `[N]`, for float weights `[N, G]`."""

    @abstractmethod
    def snap(self, weight: Array, parameters: Any) -> Array:
        """The grid's values nearest to float32 weights `[N]`, one column; 0 lies on the grid."""

    def encode(self, weight: Array, parameters: Any, share: Any) -> CompressedArray:
        """A matrix that lies on the grid, stored; it decodes to the same bits.

        Any other matrix is rounded to the nearest values.

        Args:
          weight: float `[*lead, N, K]`, such as a solution's weight.
          parameters: each `[*lead, N, groups]`.
          share: each `[*lead, ...]`.
        """
        raise InputError(f"{type(self).__name__}: a grid that cannot be stored")


class Scaled(Grid):
    """What grids have in common whose values are multiples of a scale; they are dataclasses.

    Attributes:
      group_size: see `Grid`; of blocks also their height.
      static: see `Grid`.
      granularity: what shares a scale: "group" and "channel", columns of a row; "block", a square
        of `group_size` (the last ones may be smaller); "tensor", the matrix. Groups of rows are
        found one by one; the matrix's parameters are always those of the weights as given.
      range: "minmax" covers all weights; "percentile" all but the lowest and the highest percent;
        "mse" is the share of the whole range that errs least.
      scale_bits: 16: scales are stored as float16; 0: in the dtype of the weights.
    """

    group_size: int | None
    static: bool
    granularity: Granularity
    range: Range
    scale_bits: int

    @property
    def shrinks(self) -> tuple[float, ...]:
        return SHRUNK if self.own_scales else (1.0,)

    @property
    def own_scales(self) -> bool:
        """Whether every group of a row has a scale that it need not share, nor round to a code."""
        return self.granularity in ("group", "channel")

    def rescaled(self, parameters: Any, factor: Array) -> Any:
        """See `Grid`."""
        if not self.own_scales:
            return parameters
        return self.scaled_by(parameters, factor)

    def scaled_by(self, parameters: Any, factor: Array) -> Any:
        """`rescaled` where every group has a scale of its own."""
        return self.kept_scale((parameters * factor).astype(parameters.dtype))

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise InputError(
                f"group_size {self.group_size}: must be positive, or None: one scale per row"
            )
        if self.granularity == "block" and self.group_size is None:
            raise InputError("granularity block: needs a group_size, the side of a block")
        if self.granularity in ("channel", "tensor") and self.group_size is not None:
            raise InputError(f"granularity {self.granularity}: has no group_size; give None")
        if self.scale_bits not in (0, 16):
            raise InputError(f"scale_bits {self.scale_bits}: 16, or 0: as the weights")

    def groups(self, columns: int) -> int:
        """See `Grid`; blocks may cover less than their width at the end."""
        if self.granularity == "block" and self.group_size:
            return -(-columns // self.group_size)
        return groups_of(columns, self.group_size)

    def share(self, weight: Array) -> Any:
        """The parameters of the matrix where it has only one set, else None."""
        if self.granularity != "tensor":
            return None
        return self.fit(weight.reshape(1, -1))

    def find(self, weight: Array, share: Any) -> Any:
        """See `Grid`."""
        rows = weight.shape[0]
        if self.granularity == "tensor":
            return jax.tree.map(lambda p: jnp.broadcast_to(p, (rows,)), share)
        if self.granularity == "block" and self.group_size:
            high = min(self.group_size, rows)
            # Zeros are within every range, and no error.
            whole = jnp.pad(weight, ((0, -rows % high), (0, 0)))
            found = self.fit(whole.reshape(-1, high * weight.shape[1]), share)
            return jax.tree.map(lambda p: jnp.repeat(p, high)[:rows], found)
        return self.fit(weight, share)

    def fit(self, weight: Array, share: Any = None) -> Any:
        """Parameters `[R]` of weights `[R, G]`, a row of which shares them."""
        if self.range == "mse":
            return self._least_squares(weight, share)
        if self.range == "percentile":
            low, high = percentiles(weight, PERCENTILE)
            return self.cover(low, high, share)
        return self.cover(weight.min(-1), weight.max(-1), share)

    def cover(self, low: Array, high: Array, share: Any) -> Any:
        """Parameters for ranges low .. high, each `[R]`; needed unless `fit` is another."""
        raise NotImplementedError(f"{type(self).__name__} must say how it covers a range")

    def kept_scale(self, scale: Array) -> Array:
        """A scale as it will be stored, in its own dtype: rounded to float16 where asked."""
        if not self.scale_bits:
            return scale
        half = jnp.finfo(jnp.float16)
        size = jnp.clip(jnp.abs(scale), float(half.tiny), float(half.max))
        return rounded(jnp.sign(scale) * size, jnp.float16).astype(scale.dtype)

    def stored_scale(self, scale: Array) -> Any:
        """Scales `[*lead, N, groups]` as the buffer of a compressed array."""
        return self.stored(scale.astype(jnp.float16) if self.scale_bits else scale)

    def stored(self, parameter: Array) -> Any:
        """A parameter `[*lead, N, groups]` as a buffer: what rows share is there once."""
        if self.granularity == "tensor":
            return parameter[..., :1, :1]
        if self.granularity == "block" and self.group_size:
            rows, high = parameter.shape[-2], self.group_size
            return share_rows(parameter[..., ::high, :], rows, high)
        return parameter

    def width(self, columns: int) -> int | None:
        """Columns of a group of which the last has fewer; None: it has as many as the others."""
        size = self.group_size
        return size if size and columns > size and columns % size else None

    def _least_squares(self, weight: Array, share: Any) -> Any:
        low, high = weight.min(-1), weight.max(-1)

        def loss_of(parameters: Any) -> Array:
            values = jax.vmap(self.snap, (1, None), 1)(weight, parameters)
            return jnp.square((values - weight).astype(jnp.float32)).sum(-1)

        return least_squares(partial(self._shrunk, low, high, share), loss_of)

    def _shrunk(self, low: Array, high: Array, share: Any, by: Array) -> Any:
        return self.cover((low * by).astype(low.dtype), (high * by).astype(high.dtype), share)


def least_squares(
    candidate: Callable[[Array], Any],
    loss_of: Callable[[Any], Array],
    shares: tuple[float, float, int] = SHRINKS,
) -> Any:
    """Of the parameters `candidate(share)`, each leaf `[R]`, those of the least loss `[R]`.

    Of equal ones the largest share wins.
    """
    least, most, count = shares

    def step(best: tuple[Array, Any], share: Array) -> tuple[tuple[Array, Any], None]:
        made = candidate(share)
        loss = loss_of(made)
        better = loss < best[0]
        kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), made, best[1])
        return (jnp.where(better, loss, best[0]), kept), None

    first = candidate(jnp.float32(most))
    rest = jnp.linspace(most, least, count)[1:]
    (_, best), _ = jax.lax.scan(step, (loss_of(first), first), rest)
    return best


def percentiles(weight: Array, at: float) -> tuple[Array, Array]:
    """Low and high ends `[R]` of the range of `[R, G]` with the tails cut off, at percent."""
    wide = weight.astype(jnp.float32)
    low, high = jnp.percentile(wide, jnp.asarray([100 - at, at]), axis=-1)
    return low.astype(weight.dtype), high.astype(weight.dtype)
