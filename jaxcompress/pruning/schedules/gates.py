"""What learned masks have in common: weights that the loss sees through gates.

A leaf that is learned about trains as `Gated`: the weight, its gates, and what a schedule sets.
The objective sees plain arrays in its place, which `open_leaf` makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.core.arrays.base import (
    CONTRACTED,
    KERNEL,
    ROWS,
    Array,
    CompressedArray,
    Dims,
    from_matrix,
    register,
    to_matrix,
)
from jaxcompress.core.paths import leaves_with_paths, map_with_paths, path_str
from jaxcompress.pruning.schedules.targets import Targets
from jaxcompress.training.objective import Objective

# A stored matrix as it trains, and a random key, to the matrix that the loss sees.
Open = Callable[[Any, Array], Array]


@register
class Gated(CompressedArray):
    """A weight, and what is being learned about which of its entries stay.

    Attributes:
      weight: float `[*lead, N, K]`.
      gates: float32, `[*lead, N or 1, some number per run of columns, or 1]`; trains.
      state: float32, likewise, or None; a schedule sets it.
      unit: columns that share gates.
    """

    roles = {
        "weight": (ROWS, CONTRACTED),
        "gates": (ROWS, CONTRACTED),
        "state": (ROWS, CONTRACTED),
    }
    trains = {"weight": "dense", "gates": "gates", "state": "gates"}

    weight: Array
    gates: Array
    state: Array | None = None
    unit: int = 1
    dims: Dims = KERNEL
    casts: tuple[str, ...] = ("float32",)

    @property
    def contracted(self) -> int:
        """K, the contracted columns."""
        return self.weight.shape[-1]

    @property
    def column_unit(self) -> int:
        """Columns that share gates stay together."""
        return self.unit

    def decode(self) -> Array:
        """The weight, whatever its gates say, `[*lead, N, K]`."""
        return self.weight


def with_gates(params: Any, where: Targets, gates: Callable[[str, Array], dict[str, Any]]) -> Any:
    """`params` with `Gated` leaves; `gates(path, matrix)` gives their other fields."""

    def begun(path: str, leaf: Any) -> Any:
        if path not in where:
            return leaf
        matrix = to_matrix(leaf, where[path])
        fields = gates(path, matrix)
        return Gated(matrix, dims=where[path], casts=(str(leaf.dtype),), **fields)

    return map_with_paths(begun, params)


def without_gates(params: Any, final: Callable[[Gated], Array]) -> Any:
    """`params` with the dense array of `final(leaf)`, a matrix, in the place of each `Gated`."""

    def ended(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Gated):
            return leaf
        return from_matrix(final(leaf).astype(leaf.dtype), leaf.dims)

    return map_with_paths(ended, params)


def seen_through(
    where: Targets, open_leaf: Open, penalty: Callable[[list[Gated]], Array] | None = None
) -> Callable[[Objective], Objective]:
    """An objective that sees `open_leaf(leaf, key)` in the place of each of these leaves.

    Args:
      where: the paths.
      open_leaf: of a `Gated`, or of the matrix of a plain leaf.
      penalty: of all `Gated` leaves, added to the mean loss.
    """

    def change(objective: Objective) -> Objective:
        def function(params: Any, batch: dict[str, Array], key: Array, constants: Any) -> Any:
            key, own = jax.random.split(key)
            numbers = {path: number for number, path in enumerate(sorted(where))}

            def opened(path: str, leaf: Any) -> Any:
                if path not in where:
                    return leaf
                key = jax.random.fold_in(own, numbers[path])
                matrix = leaf if isinstance(leaf, Gated) else to_matrix(leaf, where[path])
                return from_matrix(open_leaf(matrix, key).astype(leaf.dtype), where[path])

            sums = objective.function(map_with_paths(opened, params), batch, key, constants)
            if penalty is None:
                return sums
            # Times the count of each part of a batch: over all of it, the mean has it once.
            gated = [leaf for _, leaf in leaves_with_paths(params) if isinstance(leaf, Gated)]
            total, count = sums["loss"]
            extra = count * penalty(gated)
            return {**sums, "loss": (total + extra, count), "penalty": (extra, count)}

        return Objective(function, objective.constants)

    return change


class GatedState(NamedTuple):
    """State of `gated`: steps taken, and those of the two optimizers."""

    step: Array
    inner: Any


def gated(
    inner: optax.GradientTransformation,
    gate_optimizer: optax.GradientTransformation,
    state: Callable[[str, Array, Array], Array] | None = None,
) -> optax.GradientTransformation:
    """Weights move by one optimizer, gates by another, and what a schedule sets is set.

    Args:
      inner: of everything but gates.
      gate_optimizer: of the gates.
      state: `state(path, gates, step)`, what `Gated.state` is after the step (counted from 0).
    """

    def labels(params: Any) -> Any:
        def label(leaf: Any) -> Any:
            return leaf.replace(**{n: n for n in leaf.buffers}) if _is_gated(leaf) else "weight"

        return jax.tree.map(label, params, is_leaf=_is_gated)

    both = optax.partition(
        {"weight": inner, "gates": gate_optimizer, "state": optax.set_to_zero()}, labels
    )

    def init(params: Any) -> GatedState:
        return GatedState(jnp.int32(0), both.init(params))

    def update(gradients: Any, now: GatedState, params: Any = None) -> tuple[Any, GatedState]:
        updates, moments = both.update(gradients, now.inner, params)

        def with_state(path: Any, leaf: Any, old: Any) -> Any:
            if not _is_gated(leaf) or state is None or leaf.gates is None:
                return leaf
            gates = old.gates + leaf.gates
            return leaf.replace(state=state(path_str(path), gates, now.step) - old.state)

        updates = jax.tree_util.tree_map_with_path(with_state, updates, params, is_leaf=_is_gated)
        return updates, GatedState(now.step + 1, moments)

    return optax.GradientTransformation(init, update)


def _is_gated(x: Any) -> bool:
    return isinstance(x, Gated)
