"""The loop: steps over batches, with metrics, checkpoints, and an answer to what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.partition import merge, split
from jaxcompress.core.selection import Patterns
from jaxcompress.models import name_map_of
from jaxcompress.progress import progress
from jaxcompress.training.checkpoints import TrainCheckpoints
from jaxcompress.training.mesh import (
    RULES,
    check_batch,
    global_batch,
    make_mesh,
    param_shardings,
    spread,
)
from jaxcompress.training.metrics import MetricsLog
from jaxcompress.training.objective import Objective
from jaxcompress.training.preemption import Preempted, Preemption
from jaxcompress.training.step import (
    TrainState,
    init_state,
    jit_step,
    make_step,
    pmap_step,
    state_shardings,
)


class Batches(Protocol):
    """An endless source of batches that knows where it is (see `data.batches`)."""

    def __next__(self) -> dict[str, np.ndarray]:
        """This process's rows of the next global batch."""

    def state(self) -> dict[str, Any]:
        """Where the next batch is, JSON-able."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on there."""


class Diverged(InputError):
    """The loss, or a gradient, is no longer a finite number."""


def fit(
    model: Model,
    objective: Objective,
    batches: Batches,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    workdir: Path,
    mesh: Mesh | None = None,
    rules: Mapping[str, str | None] = RULES,
    train: str | tuple[str, ...] = "all",
    include: Patterns = None,
    exclude: Patterns = None,
    accumulate: int = 1,
    parallel: str = "jit",
    seed: int = 0,
    log_every: int = 10,
    checkpoint_every: int = 100,
    name: str = "train",
) -> Model:
    """`model` trained; run again after a kill, it goes on at the last checkpoint.

    Args:
      model: compressed leaves keep their form, and only their scales, factors or full weights
        train (`core.partition`). Half precision trains by float32 master weights, and is returned
        as it was. Leaves that are no arrays stay, and so do running statistics of batch norms.
      objective: what is minimized, a function of these parameters.
      batches: endless; restored to where a checkpoint left it.
      optimizer: from `make_optimizer`.
      steps: in all.
      workdir: holds checkpoints and metrics.
      mesh: from `make_mesh`; None: all devices hold copies.
      rules: how logical axes of parameters lie on the mesh.
      train: kinds of buffers that train, see `split`.
      include: patterns of paths that train; None: all.
      exclude: patterns of paths that stay.
      accumulate: micro-batches of a step, one after the other.
      parallel: "jit" (any mesh), or "pmap": plain data parallelism over the devices of a process.
      seed: of the random keys.
      log_every: steps between two lines of metrics (means over these steps).
      checkpoint_every: steps between two checkpoints; one more is written at the end.
      name: of this training in the progress shown.

    Raises:
      Diverged: the loss is NaN or infinite; names the step. The last good checkpoint stays.
      Preempted: SIGTERM or SIGINT came; a checkpoint was written.
      InputError: nothing to train, a mesh or batch that does not fit, or the checkpoint of
        another model or optimizer.
    """
    mesh = make_mesh() if mesh is None else mesh
    arrays = jax.tree.map(lambda x: x if hasattr(x, "dtype") else None, model.params)
    trainable, frozen = split(arrays, train, include=include, exclude=_untrained(model, exclude))
    run = _prepare(model, trainable, frozen, objective, optimizer, mesh, rules, accumulate,
                   parallel, seed)  # fmt: skip
    checkpoints = TrainCheckpoints(workdir / "checkpoints")
    state = run.state
    if checkpoints.latest is not None:
        state, position = checkpoints.restore(state, run.shardings, arrays)
        batches.restore(position)
    start = int(state.step)
    log = MetricsLog(workdir, resumed_at=start)
    shown: dict[str, float] = {}
    totals: dict[str, Any] = {}

    def save(state: TrainState) -> None:
        _check_sound(state, name, checkpoints)
        checkpoints.save(int(state.step), state, batches.state(), arrays)

    try:
        with Preemption() as preemption:
            todo = progress(
                range(start, steps), name, unit="step", done=start, total=steps,
                note=lambda: f"loss {shown['loss']:.4f}" if shown else "",
            )  # fmt: skip
            for step in todo:
                batch = run.place(next(batches))
                state, metrics = run.step(state, run.frozen, run.constants, batch)
                totals = metrics if not totals else jax.tree.map(jnp.add, totals, metrics)
                done = step + 1
                if done % log_every == 0 or done == steps:
                    since = done - max(start, (done - 1) // log_every * log_every)
                    _check_sound(state, name, checkpoints)
                    shown = {key: float(total) / since for key, total in totals.items()}
                    totals = {}
                    log.write(done, shown)
                if done % checkpoint_every == 0 and done < steps:
                    save(state)
                if preemption.requested() and done < steps:
                    save(state)
                    checkpoints.wait()
                    raise Preempted(
                        f"{name}: stopped on request after step {done} of {steps}, checkpoint "
                        "written; the same command goes on from here"
                    )
            save(state)
            checkpoints.wait()
    finally:
        log.close()
        checkpoints.close()
    return model.replace(params=_as_given(model.params, merge(state.trainable, run.frozen)))


@dataclass(frozen=True)
class _Run:
    """What a training repeats: where things lie, and the compiled step."""

    state: TrainState
    frozen: Any
    constants: Any
    shardings: TrainState
    step: Callable[..., Any]
    place: Callable[[dict[str, np.ndarray]], dict[str, Any]]


def _prepare(
    model: Model,
    trainable: Any,
    frozen: Any,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: Mapping[str, str | None],
    accumulate: int,
    parallel: str,
    seed: int,
) -> _Run:
    if parallel not in ("jit", "pmap"):
        raise InputError(f"parallel {parallel!r}: use jit or pmap")
    everywhere = NamedSharding(mesh, P())
    if parallel == "pmap":
        if jax.process_count() > 1 or mesh.shape["data"] != jax.local_device_count():
            raise InputError(
                "parallel 'pmap': plain data parallelism over the devices of one process; "
                "use parallel='jit' for other meshes"
            )
        whole = jax.tree.map(lambda _: everywhere, model.params)
    else:
        whole = param_shardings(model, mesh, rules)
    ours, theirs = _like(trainable, whole), _like(frozen, whole)
    # A step takes the memory of the state it is given: that of the caller's model stays his.
    trainable = jax.tree.map(lambda x, where: jnp.copy(spread(x, where)), trainable, ours)
    init = partial(init_state, optimizer=optimizer, seed=seed)
    shardings = state_shardings(jax.eval_shape(init, trainable), optimizer, ours, mesh)
    state = jax.jit(init, out_shardings=shardings, donate_argnums=0)(trainable)
    objective = _of_masters(objective, model.params)
    # Constants lie where their maker put them; what was not placed goes everywhere.
    constants = jax.tree.map(lambda x: _placed(x, mesh), objective.constants)

    def place(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        rows = len(next(iter(batch.values()))) * jax.process_count()
        check_batch(rows, mesh, accumulate)
        return dict(batch) if parallel == "pmap" else global_batch(batch, mesh)

    if parallel == "pmap":
        step = pmap_step(make_step(objective, optimizer, accumulate=accumulate, axis_name="data"))
    else:
        step = jit_step(
            make_step(objective, optimizer, accumulate=accumulate),
            (shardings, theirs, jax.tree.map(lambda x: x.sharding, constants)),
            mesh,
        )
    return _Run(state, spread(frozen, theirs), constants, shardings, step, place)


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
        return objective.function(_as_given(like, masters), batch, key, constants)

    return Objective(function, objective.constants)


def _as_given(params: Any, masters: Any) -> Any:
    """`masters` in the dtypes of `params`, with those leaves of `params` that are no arrays."""
    return jax.tree.map(
        lambda given, master: given if master is None else master.astype(given.dtype),
        params,
        masters,
    )


def _like(part: Any, whole: Any) -> Any:
    """`whole` with None wherever `part` has None."""
    return jax.tree.map(
        lambda p, w: None if p is None else w, part, whole, is_leaf=lambda x: x is None
    )


def _placed(x: Any, mesh: Mesh) -> Any:
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh == mesh:
        return x
    return spread(x, NamedSharding(mesh, P()))


def _check_sound(state: TrainState, name: str, checkpoints: TrainCheckpoints) -> None:
    """Raise `Diverged` once a step gave no finite number."""
    bad = int(state.diverged)
    if bad < 0:
        return
    kept = checkpoints.latest
    where = "no checkpoint was written before" if kept is None else f"checkpoint {kept} is kept"
    raise Diverged(
        f"{name}: the loss or its gradient is not finite in step {bad + 1}; {where}; "
        "lower the learning rate or clip harder"
    )
