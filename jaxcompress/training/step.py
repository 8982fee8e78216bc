"""One step: gradients of a whole batch in micro-batches, and the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress.core.partition import merge
from jaxcompress.training.mesh import BATCH
from jaxcompress.training.objective import Objective

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32, steps taken.
      trainable: float32 master weights, None in the places of what is frozen (`core.partition`).
      optimizer: state of the optimizer.
      key: uint32 data of the random key; the key of a step is folded out of it.
      diverged: int32, the first step (counted from 0) whose loss, gradient or update was not
        finite, -1 while there is none. That step and all later ones change no weight.
    """

    step: Array
    trainable: Any
    optimizer: Any
    key: Array
    diverged: Array


def init_state(
    trainable: Any, optimizer: optax.GradientTransformation, seed: int = 0
) -> TrainState:
    """The state before the first step; half precision gets float32 master weights."""
    trainable = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), trainable)
    return TrainState(
        step=jnp.int32(0),
        trainable=trainable,
        optimizer=optimizer.init(trainable),
        key=jax.random.key_data(jax.random.key(seed)),
        diverged=jnp.int32(-1),
    )


def state_shardings(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    trainable: Any,
    mesh: Mesh | AbstractMesh,
) -> TrainState:
    """Shardings of a state: moments lie where their parameters lie, the rest everywhere.

    Args:
      state: arrays or shapes.
      optimizer: that made `state.optimizer`.
      trainable: a tree like `state.trainable` with shardings.
      mesh: for what has no parameter's shape.
    """
    everywhere = NamedSharding(mesh, P())

    def is_left_out(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    def of_moment(moment: Any, param: Any, sharding: NamedSharding) -> Any:
        if is_left_out(moment):
            return moment
        # Factored moments (adafactor) have a parameter's place, but not its shape.
        return sharding if moment.shape == param.shape else everywhere

    moments = optax.tree_map_params(
        optimizer,
        of_moment,
        state.optimizer,
        state.trainable,
        trainable,
        transform_non_params=lambda _: everywhere,
        is_leaf=is_left_out,
    )
    rest: Any = everywhere
    return TrainState(rest, trainable, moments, rest, rest)


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> Callable[[TrainState, Any, Any, dict[str, Array]], tuple[TrainState, Metrics]]:
    """`step(state, frozen, constants, batch) -> (state, metrics)`, to be jitted or pmapped.

    Gradients and metrics are summed in float32 over the micro-batches and then divided by the
    number of what was counted, so they are those of the whole batch. A batch in which nothing
    counts has the gradient 0.

    Args:
      objective: its `constants` are passed to each step, not read here.
      optimizer: from `make_optimizer`.
      accumulate: micro-batches, one after the other.
      axis_name: under `jax.pmap`: the axis to sum over.
    """

    def step(
        state: TrainState, frozen: Any, constants: Any, batch: dict[str, Array]
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

        def loss(trainable: Any, rows: dict[str, Array], key: Array) -> tuple[Array, Any]:
            sums = objective.function(merge(trainable, frozen), rows, key, constants)
            return sums["loss"][0], sums

        slope = jax.grad(loss, has_aux=True)

        def add(total: Any, part: tuple[dict[str, Array], Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, slope(state.trainable, *part)), None

        if accumulate == 1:
            total = slope(state.trainable, batch, key)
        else:
            parts = (_micro_batches(batch, accumulate), jax.random.split(key, accumulate))
            first = jax.tree.map(lambda x: x[0], parts)
            like = jax.eval_shape(slope, state.trainable, *first)
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
            total, _ = jax.lax.scan(add, zeros, parts)
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        gradients, sums = total
        gradients = jax.tree.map(lambda g: _mean(g, sums["loss"][1]), gradients)
        metrics = {name: _mean(*pair) for name, pair in sums.items()}
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        return _advanced(state, gradients, metrics, optimizer), metrics

    return step


def _mean(total: Array, count: Array) -> Array:
    return total / jnp.where(count == 0, 1, count).astype(total.dtype)


def _micro_batches(batch: dict[str, Any], accumulate: int) -> dict[str, Any]:
    """`[batch, ...]` to `[accumulate, batch / accumulate, ...]`; no row leaves its device."""

    def split(rows: Array) -> Array:
        rows = rows.reshape(rows.shape[0] // accumulate, accumulate, *rows.shape[1:])
        return jnp.moveaxis(rows, 1, 0)

    return jax.tree.map(split, batch)


def _advanced(
    state: TrainState,
    gradients: Any,
    metrics: Metrics,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The state after a step; the old weights where the step, or one before, diverged."""
    updates, moments = optimizer.update(gradients, state.optimizer, state.trainable)
    size = metrics["loss"] + metrics["gradient_norm"] + optax.tree.norm(updates)
    diverged = jnp.where((state.diverged < 0) & ~jnp.isfinite(size), state.step, state.diverged)
    trainable = optax.apply_updates(state.trainable, updates)

    def sound(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(diverged < 0, n, o), new, old)

    return TrainState(
        step=state.step + 1,
        trainable=sound(trainable, state.trainable),
        optimizer=sound(moments, state.optimizer),
        key=state.key,
        diverged=diverged,
    )


def jit_step(
    step: Callable[..., Any], shardings: tuple[TrainState, Any, Any], mesh: Mesh
) -> Callable[..., Any]:
    """The step compiled for a mesh; the old state's memory becomes the new one's.

    Args:
      step: from `make_step`.
      shardings: of the state, the frozen parameters and the objective's constants.
      mesh: over which batches are split.
    """

    def on_mesh(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    return jax.jit(
        on_mesh,
        in_shardings=(*shardings, NamedSharding(mesh, BATCH)),
        out_shardings=(shardings[0], NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def pmap_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step over all local devices by `jax.pmap`: everything copied, the batch split.

    Args:
      step: from `make_step(..., axis_name="data")`.
    """
    over = jax.pmap(step, axis_name="data", in_axes=(None, None, None, 0), out_axes=None)
    devices = jax.local_device_count()

    def run(state: TrainState, frozen: Any, constants: Any, batch: dict[str, Any]) -> Any:
        split = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        return over(state, frozen, constants, split)

    return run


def steps_ahead() -> int:
    """Steps that the host may be ahead of the devices."""
    # Several programs with collectives at a time can lock up the threads of a CPU's devices.
    return 0 if jax.default_backend() == "cpu" else 2
