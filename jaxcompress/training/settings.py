"""The settings of one training, as a stage of a recipe gives them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.training.loop import Batches, fit
from jaxcompress.training.masks import hold_zeros, release
from jaxcompress.training.mesh import AnyMesh, check_batch
from jaxcompress.training.objective import Objective
from jaxcompress.training.optimizers import learning_rate_schedule, make_optimizer
from jaxcompress.training.transform import Transform


@dataclass(frozen=True)
class Training:
    """Settings of one training.

    Attributes:
      steps: optimizer steps in all.
      batch_size: rows of a global batch.
      learning_rate: the highest.
      optimizer: a name of `training.optimizers.OPTIMIZERS`.
      schedule: "cosine", "linear" (both to 0) or "constant".
      warmup: steps over which the rate rises.
      weight_decay: of matrices, decoupled.
      clip: largest norm of the gradient; None: any.
      optimizer_options: the optimizer's own, such as `{"b2": 0.95}`.
      accumulate: micro-batches of a step.
      train: which buffers train (`core.partition`): "all", "dense", "scales", ...
      include: patterns of paths that train.
      exclude: patterns of paths that do not.
      keep_zeros: pruned entries of dense matrices stay 0.
      log_every: steps between lines of metrics.
      checkpoint_every: steps between checkpoints.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    train: str | tuple[str, ...] = "all"
    include: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None
    keep_zeros: bool = True
    log_every: int = 10
    checkpoint_every: int = 100

    def check(self, mesh: AnyMesh) -> None:
        """Raise `InputError` where a number is out of range, or does not divide over the mesh."""
        for name in ("steps", "accumulate", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: must be 1 or more")
        check_batch(self.batch_size, mesh, self.accumulate)
        optimizer, kernel = self.make_optimizer(), jax.ShapeDtypeStruct((2, 2), jnp.float32)
        try:
            jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), {"kernel": kernel})
        except (TypeError, ValueError) as error:  # optax looks at an option when it uses it
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"optimizer_options {dict(self.optimizer_options)}: {self.optimizer} cannot use "
                f"them ({reason})"
            ) from None

    @property
    def rate(self) -> optax.Schedule:
        """The learning rate of each step."""
        return learning_rate_schedule(
            self.schedule,
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
        )

    def make_optimizer(self) -> Any:
        """The optimizer with its schedule; raises `InputError` where a setting is wrong."""
        twice = inspect.signature(make_optimizer).parameters.keys() & self.optimizer_options.keys()
        if twice:
            raise InputError(f"optimizer_options {', '.join(sorted(twice))}: no options of its own")
        return make_optimizer(
            self.optimizer,
            steps=self.steps,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            clip=self.clip,
            **self.optimizer_options,
        )


def train(
    model: Model,
    objective: Objective,
    batches: Batches,
    settings: Training,
    *,
    workdir: Path,
    mesh: Mesh,
    parallel: str = "jit",
    seed: int = 0,
    name: str = "train",
    transform: Transform | None = None,
) -> Model:
    """`model` trained with these settings; see `fit`, which says what is raised.

    Args:
      model: see `fit`, like the rest.
      objective: what is minimized.
      batches: endless.
      settings: of the training.
      workdir: holds checkpoints and metrics.
      mesh: of devices.
      parallel: "jit" or "pmap".
      seed: of the random keys.
      name: in the progress shown.
      transform: what else is done to the training.
    """
    change = transform or Transform()
    held: tuple[str, ...] = ()
    params = model.params
    if settings.keep_zeros:
        params, held = hold_zeros(params, spared=change.paths)
    trained = fit(
        model.replace(params=change.begin(params)),
        change.objective(objective),
        batches,
        change.optimizer(settings.make_optimizer()),
        steps=settings.steps if change.steps is None else change.steps,
        workdir=workdir,
        mesh=mesh,
        train=settings.train,
        include=settings.include,
        exclude=settings.exclude,
        accumulate=settings.accumulate,
        parallel=parallel,
        seed=seed,
        log_every=settings.log_every,
        checkpoint_every=settings.checkpoint_every,
        name=name,
    )
    return trained.replace(params=release(change.end(trained.params), held))
