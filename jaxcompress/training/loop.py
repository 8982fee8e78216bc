"""The loop: steps over batches, with metrics, checkpoints, and an answer to what goes wrong."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.partition import merge
from jaxcompress.core.selection import Patterns
from jaxcompress.progress import progress
from jaxcompress.training.checkpoints import TrainCheckpoints
from jaxcompress.training.mesh import RULES, check_batch, global_batch, make_mesh, spread
from jaxcompress.training.metrics import MetricsLog, RunningMeans
from jaxcompress.training.objective import Objective
from jaxcompress.training.preemption import Preempted, Preemption
from jaxcompress.training.prepare import Prepared, arrays_of, as_given, prepare
from jaxcompress.training.step import TrainState, steps_ahead


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
      checkpoint_every: steps between two checkpoints; the last step has one too.
      name: of this training in the progress shown.

    Raises:
      Diverged: the loss is NaN or infinite; names the step. The last good checkpoint stays.
      Preempted: SIGTERM or SIGINT came; a checkpoint was written.
      InputError: nothing to train, a mesh or batch that does not fit, or the checkpoint of
        another model or optimizer.
    """
    mesh = make_mesh() if mesh is None else mesh
    prepared = prepare(model, objective, optimizer, mesh, accumulate=accumulate, parallel=parallel,
                       rules=rules, train=train, include=include, exclude=exclude,
                       seed=seed)  # fmt: skip
    arrays = arrays_of(model.params)
    state, frozen, constants = _begun(prepared, objective.constants)
    means, shown, running = RunningMeans(), dict[str, float](), deque[jax.Array]()
    with Preemption() as preemption, closing(TrainCheckpoints(workdir / "checkpoints")) as kept:
        if kept.latest is not None:
            state, position = kept.restore(state, prepared.parts.state_at, arrays)
            batches.restore(position["batches"])
            means.restore(position["means"])

        def save() -> None:
            _check_sound(state, name, kept)
            position = {"batches": batches.state(), "means": means.state()}
            kept.save(int(state.step), state, position, arrays)

        start = int(state.step)
        with closing(MetricsLog(workdir, resumed_at=start)) as log:
            todo = progress(
                range(start + 1, steps + 1), name, unit="step", done=start, total=steps,
                note=lambda: f"loss {shown['loss']:.4f}" if shown else "",
            )  # fmt: skip
            for step in todo:
                batch = _placed(next(batches), mesh, accumulate, parallel)
                state, metrics = prepared.step(state, frozen, constants, batch)
                running.append(metrics["loss"])
                if len(running) > steps_ahead():
                    running.popleft().block_until_ready()
                means.add(metrics)
                if step % log_every == 0 or step == steps:
                    _check_sound(state, name, kept)
                    shown = means.take()
                    log.write(step, shown)
                if step % checkpoint_every == 0 or step == steps:
                    save()
                if preemption.requested() and step < steps:
                    save()
                    kept.wait()
                    raise Preempted(
                        f"{name}: stopped on request after step {step} of {steps}, checkpoint "
                        "written; the same command goes on from here"
                    )
    return model.replace(params=as_given(model.params, merge(state.trainable, frozen)))


def _begun(prepared: Prepared, constants: Any) -> tuple[TrainState, Any, Any]:
    """State, frozen parameters and constants where the step wants them."""
    parts = prepared.parts
    # A step takes the memory of the state it is given: that of the caller's model stays his.
    trainable = jax.tree.map(
        lambda x, where: jnp.copy(spread(x, where)), parts.trainable, parts.state_at.trainable
    )
    state = jax.jit(parts.init, out_shardings=parts.state_at, donate_argnums=0)(trainable)
    return state, spread(parts.frozen, parts.frozen_at), spread(constants, prepared.constants_at)


def _placed(
    batch: dict[str, np.ndarray], mesh: Mesh, accumulate: int, parallel: str
) -> dict[str, Any]:
    rows = len(next(iter(batch.values()))) * jax.process_count()
    check_batch(rows, mesh, accumulate)
    return dict(batch) if parallel == "pmap" else global_batch(batch, mesh)


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
