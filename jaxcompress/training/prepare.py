"""A training before it begins: what trains, where everything lies, and the step.

All of it follows from shapes, so that a training can be planned and compiled for devices that are
not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.partition import split
from jaxcompress.core.selection import Patterns
from jaxcompress.models import name_map_of
from jaxcompress.training.mesh import RULES, param_shardings
from jaxcompress.training.objective import Objective
from jaxcompress.training.step import (
    TrainState,
    init_state,
    jit_step,
    make_step,
    pmap_step,
    state_shardings,
)


@dataclass(frozen=True)
class Parts:
    """The parameters of a training, arrays or shapes, and where its state lies.

    Attributes:
      trainable: what trains, None in the places of the rest.
      frozen: the rest, None in the places of what trains.
      init: the state before the first step, of what trains.
      state_at: shardings of that state.
      frozen_at: shardings of what is frozen.
    """

    trainable: Any
    frozen: Any
    init: Callable[[Any], TrainState]
    state_at: TrainState
    frozen_at: Any

    @property
    def state(self) -> TrainState:
        """Shapes of the state before the first step."""
        return jax.eval_shape(self.init, self.trainable)


@dataclass(frozen=True)
class Prepared:
    """A training that may begin.

    Attributes:
      parts: its parameters.
      constants_at: shardings of the objective's constants.
      step: `step(state, frozen, constants, batch) -> (state, metrics)`, compiled when first called.
    """

    parts: Parts
    constants_at: Any
    step: Any


def parts_of(
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    *,
    rules: Mapping[str, str | None] = RULES,
    train: str | tuple[str, ...] = "all",
    include: Patterns = None,
    exclude: Patterns = None,
    parallel: str = "jit",
    seed: int = 0,
) -> Parts:
    """What trains of a model and what does not, see `fit` for the arguments.

    Raises:
      InputError: nothing to train.
    """
    params = arrays_of(model.params)
    trainable, frozen = split(params, train, include=include, exclude=_untrained(model, exclude))
    if parallel == "pmap":
        whole = jax.tree.map(lambda _: NamedSharding(mesh, P()), params)
    else:
        whole = param_shardings(model.replace(params=params), mesh, rules)
    init = partial(init_state, optimizer=optimizer, seed=seed)
    state = jax.eval_shape(init, trainable)
    state_at = state_shardings(state, optimizer, _like(trainable, whole), mesh)
    return Parts(trainable, frozen, init, state_at, _like(frozen, whole))


def prepare(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    accumulate: int = 1,
    parallel: str = "jit",
    **options: Any,
) -> Prepared:
    """A training made ready, see `fit` for the arguments.

    Args:
      model: its parameters may be shapes, and so may the objective's constants.
      objective: constants that lie on the mesh stay where they are, others go everywhere.
      optimizer: from `make_optimizer`.
      mesh: of devices.
      accumulate: micro-batches of a step.
      parallel: "jit" or "pmap".
      **options: `rules`, `train`, `include`, `exclude`, `seed`.

    Raises:
      InputError: nothing to train, or a mesh that does not fit.
    """
    if parallel not in ("jit", "pmap"):
        raise InputError(f"parallel {parallel!r}: use jit or pmap")
    if parallel == "pmap" and (
        jax.process_count() > 1 or mesh.shape["data"] != jax.local_device_count()
    ):
        raise InputError(
            "parallel 'pmap': plain data parallelism over the devices of one process; "
            "use parallel='jit' for other meshes"
        )
    parts = parts_of(model, optimizer, mesh, parallel=parallel, **options)
    constants_at = jax.tree.map(lambda x: _place_of(x, mesh), objective.constants)
    objective = _of_masters(objective, model.params)
    if parallel == "pmap":
        step = make_step(objective, optimizer, accumulate=accumulate, axis_name="data")
        return Prepared(parts, constants_at, pmap_step(step))
    step = make_step(objective, optimizer, accumulate=accumulate)
    return Prepared(
        parts, constants_at, jit_step(step, (parts.state_at, parts.frozen_at, constants_at), mesh)
    )


def arrays_of(params: Any) -> Any:
    """`params` with None wherever there is no array."""
    return jax.tree.map(lambda x: x if hasattr(x, "dtype") else None, params)


def as_given(params: Any, masters: Any) -> Any:
    """`masters` in the dtypes of `params`, with those leaves of `params` that are no arrays."""
    return jax.tree.map(
        lambda given, master: given if master is None else master.astype(given.dtype),
        params,
        masters,
    )


def _untrained(model: Model, exclude: Patterns) -> tuple[str, ...]:
    """`exclude`, and the running statistics of batch norms: no gradient should move those."""
    given = (exclude,) if isinstance(exclude, str) else tuple(exclude or ())
    if model.config is None:
        return given
    return given + tuple(row.path for row in name_map_of(model.config).of_kind("statistic"))


def _of_masters(objective: Objective, params: Any) -> Objective:
    """An objective of float32 master weights: the function sees what `params` are made of."""
    # Dtypes and non-arrays only: the function shall not hold the caller's arrays.
    like = jax.tree.map(lambda x: np.empty(0, x.dtype) if hasattr(x, "dtype") else x, params)

    def function(masters: Any, batch: dict[str, Any], key: Any, constants: Any) -> Any:
        return objective.function(as_given(like, masters), batch, key, constants)

    return Objective(function, objective.constants)


def _like(part: Any, whole: Any) -> Any:
    """`whole` with None wherever `part` has None."""
    return jax.tree.map(
        lambda p, w: None if p is None else w, part, whole, is_leaf=lambda x: x is None
    )


def _place_of(x: Any, mesh: Mesh) -> NamedSharding:
    """Where a constant lies: as its maker put it on the mesh, otherwise everywhere."""
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh == mesh:
        return sharding
    return NamedSharding(mesh, P())
