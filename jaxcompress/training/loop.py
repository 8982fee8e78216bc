"""The loop: steps over batches, with metrics, checkpoints, and an answer to what goes wrong."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
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
from jaxcompress.training.prepare import Parts, Prepared, arrays_of, as_given, prepare
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
    rows = partial(_rows_on_devices, mesh=mesh, accumulate=accumulate, parallel=parallel)
    with Preemption() as preemption, closing(TrainCheckpoints(workdir / "checkpoints")) as kept:
        run = _Run(name, prepared, objective.constants, batches, rows, kept, model.params)
        with closing(MetricsLog(workdir, resumed_at=int(run.state.step))) as log:
            run.go_on(steps, log, preemption, log_every, checkpoint_every)
    return model.replace(params=as_given(model.params, merge(run.state.trainable, run.frozen)))


class _Run:
    """A training on its way: its state, its place in the data, and its checkpoints."""

    def __init__(
        self,
        name: str,
        prepared: Prepared,
        constants: Any,
        batches: Batches,
        rows: Callable[[dict[str, np.ndarray]], dict[str, Any]],
        kept: TrainCheckpoints,
        params: Any,
    ) -> None:
        parts = prepared.parts
        self.name, self.batches, self.kept, self._rows = name, batches, kept, rows
        self._what = arrays_of(params)
        self._step = prepared.step
        self.means = RunningMeans()
        self.frozen = spread(parts.frozen, parts.frozen_at)
        self.constants = spread(constants, prepared.constants_at)
        self.state = _new_state(parts) if kept.latest is None else self._restored(parts)

    def _restored(self, parts: Parts) -> TrainState:
        """The state of the newest checkpoint; data and metrics go on from there too."""
        # By shapes: a state to be thrown away would take the memory of the one that is read.
        state, position = self.kept.restore(parts.state, parts.state_at, self._what)
        self.batches.restore(position["batches"])
        self.means.restore(position["means"])
        return state

    def go_on(
        self,
        steps: int,
        log: MetricsLog,
        preemption: Preemption,
        log_every: int,
        checkpoint_every: int,
    ) -> None:
        """All steps that are left of `steps`."""
        done = int(self.state.step)
        shown, running = dict[str, float](), deque[jax.Array]()
        todo = progress(
            range(done + 1, steps + 1), self.name, unit="step", done=done, total=steps,
            note=lambda: f"loss {shown['loss']:.4f}" if shown else "",
        )  # fmt: skip
        for step in todo:
            batch = self._rows(next(self.batches))
            self.state, metrics = self._step(self.state, self.frozen, self.constants, batch)
            running.append(metrics["loss"])
            if len(running) > steps_ahead():
                running.popleft().block_until_ready()
            self.means.add(metrics)
            if step % log_every == 0 or step == steps:
                self.check_sound()
                shown = self.means.take()
                log.write(step, shown)
            if step % checkpoint_every == 0 or step == steps:
                self.save()
            if preemption.requested() and step < steps:
                self.save()
                self.kept.wait()
                raise Preempted(
                    f"{self.name}: stopped on request after step {step} of {steps}, checkpoint "
                    "written; the same command goes on from here"
                )

    def save(self) -> None:
        """Begin to write a checkpoint of a state that is sound."""
        self.check_sound()
        position = {"batches": self.batches.state(), "means": self.means.state()}
        self.kept.save(int(self.state.step), self.state, position, self._what)

    def check_sound(self) -> None:
        """Raise `Diverged` once a step gave no finite number."""
        bad = int(self.state.diverged)
        if bad < 0:
            return
        kept = self.kept.latest
        where = "no checkpoint was written before" if kept is None else f"checkpoint {kept} is kept"
        raise Diverged(
            f"{self.name}: the loss or its gradient is not finite in step {bad + 1}; {where}; "
            "lower the learning rate or clip harder"
        )


def _new_state(parts: Parts) -> TrainState:
    """The state before the first step, where the step wants it."""
    # A step takes the memory of the state it is given: that of the caller's model stays his.
    trainable = jax.tree.map(
        lambda x, where: jnp.copy(spread(x, where)), parts.trainable, parts.state_at.trainable
    )
    return jax.jit(parts.init, out_shardings=parts.state_at, donate_argnums=0)(trainable)


def _rows_on_devices(
    batch: dict[str, Any], *, mesh: Mesh, accumulate: int, parallel: str
) -> dict[str, Any]:
    """A batch as the step takes it."""
    rows = len(jax.tree.leaves(batch)[0]) * jax.process_count()
    check_batch(rows, mesh, accumulate)
    return dict(batch) if parallel == "pmap" else global_batch(batch, mesh)
