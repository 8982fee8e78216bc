"""The loop: steps over batches, with metrics, checkpoints, and an answer to what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from jaxcompress.progress import progress
from jaxcompress.training.checkpoints import TrainCheckpoints
from jaxcompress.training.mesh import (
    RULES,
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
    include: Any = None,
    exclude: Any = None,
    accumulate: int = 1,
    parallel: str = "jit",
    seed: int = 0,
    log_every: int = 10,
    checkpoint_every: int = 100,
    name: str = "train",
) -> Model:
    """`model` trained; run again after a kill, it goes on at the last checkpoint.

    Args:
      model: float32 parameters; compressed leaves keep their form, and only their scales, factors
        or full weights train (`core.partition`).
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
      InputError: nothing to train, a mesh that does not fit, or another model's checkpoint.
    """
    mesh = make_mesh() if mesh is None else mesh
    trainable, frozen = split(model.params, train, include=include, exclude=exclude)
    run = _prepare(model, trainable, frozen, objective, optimizer, mesh, rules, accumulate,
                   parallel, seed)  # fmt: skip
    checkpoints = TrainCheckpoints(workdir / "checkpoints")
    state = run.state
    if checkpoints.latest is not None:
        state, position = checkpoints.restore(state, run.shardings, model.params)
        batches.restore(position)
    start = int(state.step)
    log = MetricsLog(workdir, resumed_at=start)
    shown: dict[str, float] = {}
    totals: dict[str, Any] = {}

    def save(state: TrainState) -> None:
        _check_sound(state, name, checkpoints)
        checkpoints.save(int(state.step), state, batches.state(), model.params)

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
                    shown = {key: float(total) / since for key, total in totals.items()}
                    totals = {}
                    _check_sound(state, name, checkpoints)
                    log.write(done, shown)
                if done % checkpoint_every == 0 and done < steps:
                    save(state)
                if _may_look(done, log_every) and preemption.requested():
                    save(state)
                    checkpoints.wait()
                    raise Preempted(
                        f"{name}: stopped on request after step {done} of {steps}, checkpoint "
                        "written; the same command goes on from here"
                    )
        save(state)
    finally:
        log.close()
        checkpoints.close()
    return model.replace(params=merge(state.trainable, run.frozen))


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
    trainable = jax.tree.map(jnp.copy, spread(trainable, ours))
    state = init_state(trainable, optimizer, seed)
    shardings = state_shardings(state, optimizer, ours, mesh)
    state = spread(state, shardings)
    # Constants lie where their maker put them; what was not placed goes everywhere.
    constants = jax.tree.map(lambda x: _placed(x, mesh), objective.constants)
    if parallel == "pmap":
        step = pmap_step(make_step(objective, optimizer, accumulate=accumulate, axis_name="data"))
        return _Run(state, frozen, constants, shardings, step, dict)
    step = jit_step(
        make_step(objective, optimizer, accumulate=accumulate),
        (shardings, theirs, jax.tree.map(lambda x: x.sharding, constants)),
        mesh,
    )
    return _Run(
        state, spread(frozen, theirs), constants, shardings, step, lambda b: global_batch(b, mesh)
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


def _may_look(done: int, log_every: int) -> bool:
    """Whether to ask for preemption now: with several processes asking costs a round trip."""
    return jax.process_count() == 1 or done % log_every == 0
