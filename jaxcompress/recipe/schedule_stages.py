"""The stages that prune while they train.

`SCHEDULES` make a change to a training (`training.transform.Transform`) of a `Job`; their
keyword-only parameters, `matrices` and `spared` are the options of the stage.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from jaxcompress.core.model import Model
from jaxcompress.pruning import schedules
from jaxcompress.pruning.patterns import Scope
from jaxcompress.pruning.schedules import Targets
from jaxcompress.pruning.schedules.lottery import Control
from jaxcompress.recipe.inputs import Inputs
from jaxcompress.recipe.work import Context, Outcome, finetuned
from jaxcompress.training.settings import Training
from jaxcompress.training.transform import Transform

Patterns = str | tuple[str, ...] | None
Candidate = Mapping[str, Any]  # a method and its options, as a stage gives them
VALIDATION_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Job:
    """A training that prunes.

    Attributes:
      model: that trains; its parameters may be shapes.
      where: its matrices that are pruned.
      example: of what it takes, one sample, shapes.
      settings: of the training.
      seed: of what is drawn.
    """

    model: Model
    where: Targets
    example: jax.ShapeDtypeStruct
    settings: Training
    seed: int

    @property
    def end(self) -> int:
        """Where schedules end that are not told: after three quarters of the training."""
        return max(1, self.settings.steps * 3 // 4)

    def transform(self, optimizer: Callable[..., Any], **changes: Any) -> Transform:
        """A change to the optimizer, and whatever else."""
        return Transform(optimizer=optimizer, paths=tuple(self.where), **changes)


def job(
    model: Model,
    inputs: Inputs,
    settings: Training,
    seed: int,
    *,
    matrices: Patterns = None,
    spared: Patterns = None,
) -> Job:
    """The job of a stage; raises `InputError` where the patterns match nothing to prune."""
    one = inputs.drawn("train", 1)
    example = jax.ShapeDtypeStruct(one.shape, one.dtype)
    where = schedules.targets(model, example, include=matrices, exclude=spared)
    return Job(model, where, example, settings, seed)


# ---------------------------------------------------------------------------- while they train


def gradual(
    job: Job,
    *,
    sparsity: float = 0.5,
    initial_sparsity: float = 0.0,
    begin: int = 0,
    end: int | None = None,
    interval: int | None = None,
    pattern: str = "unstructured",
    scope: Scope = "layer",
) -> Transform:
    """Cubic gradual pruning by magnitude (Zhu and Gupta)."""
    last = job.end if end is None else end
    step = max(1, (last - begin) // 20) if interval is None else interval
    make = functools.partial(
        schedules.gradual, where=job.where, sparsity=sparsity, begin=begin, end=last,
        interval=step, initial_sparsity=initial_sparsity, pattern=pattern, scope=scope,
    )  # fmt: skip
    return job.transform(make)


def lottery(
    job: Job,
    *,
    sparsity: float = 0.8,
    rounds: int = 5,
    rewind: int = 0,
    scope: Scope = "layer",
    control: Control = "none",
) -> Transform:
    """Lottery ticket: train, prune, rewind to step `rewind`, again; then train the ticket."""
    steps = job.settings.steps
    make = functools.partial(
        schedules.lottery, where=job.where, sparsity=sparsity, rounds=rounds, steps=steps,
        rewind=rewind, scope=scope, control=control, seed=job.seed,
    )  # fmt: skip
    return job.transform(make, steps=schedules.training_steps(steps, rounds, rewind))


def evolution(
    job: Job,
    *,
    sparsity: float = 0.8,
    fraction: float = 0.3,
    interval: int | None = None,
    end: int | None = None,
    distribution: Literal["erk", "uniform"] = "erk",
) -> Transform:
    """SET: sparse throughout; small weights go, others come at random."""
    make = functools.partial(
        schedules.sparse_evolution, where=job.where, fraction=fraction, seed=job.seed,
        interval=_interval(job, interval), end=job.end if end is None else end,
    )  # fmt: skip
    return job.transform(make, begin=_sparse_start(job, sparsity, distribution))


def rigl(
    job: Job,
    *,
    sparsity: float = 0.8,
    fraction: float = 0.3,
    interval: int | None = None,
    end: int | None = None,
    distribution: Literal["erk", "uniform"] = "erk",
) -> Transform:
    """RigL: sparse throughout; small weights go, those with the largest gradients come."""
    make = functools.partial(
        schedules.rigl, where=job.where, fraction=fraction,
        interval=_interval(job, interval), end=job.end if end is None else end,
    )  # fmt: skip
    return job.transform(make, begin=_sparse_start(job, sparsity, distribution))


def l1(job: Job, *, strength: float = 1e-3) -> Transform:
    """L1: the proximal step sets single weights to 0 that pay too little."""
    shrink = schedules.soft_threshold(job.where)
    return job.transform(_proximal(job, shrink, strength))


def group_lasso(job: Job, *, strength: float = 1e-3, groups: str = "rows") -> Transform:
    """Group lasso: rows, columns, blocks, or all that a structured cut would remove, go to 0."""
    if groups == "coupling":
        shrink = schedules.coupled_threshold(job.where, job.model, job.example)
    else:
        shrink = schedules.group_threshold(job.where, groups)
    return job.transform(_proximal(job, shrink, strength))


def sr_ste(job: Job, *, pattern: str = "2:4", strength: float = 2e-4) -> Transform:
    """SR-STE: n:m by a straight-through gradient, and a decay of what is masked."""
    return schedules.sr_ste(job.where, pattern=pattern, strength=strength)


def movement(
    job: Job,
    *,
    sparsity: float = 0.5,
    begin: int = 0,
    end: int | None = None,
    interval: int | None = None,
    scope: Literal["layer", "row"] = "layer",
    score_rate: float = 1.0,
) -> Transform:
    """Movement pruning: weights that training moves away from 0 stay (hard, top v)."""
    last = job.end if end is None else end
    step = max(1, (last - begin) // 20) if interval is None else interval
    return schedules.movement(
        job.where, sparsity=sparsity, begin=begin, end=last, interval=step, scope=scope,
        score_rate=score_rate,
    )  # fmt: skip


def soft_movement(
    job: Job, *, threshold: float = 0.1, strength: float = 1.0, score_rate: float = 1e-2
) -> Transform:
    """Movement pruning by a threshold on the scores, which a penalty pulls down."""
    return schedules.soft_movement(
        job.where, threshold=threshold, strength=strength, score_rate=score_rate
    )


def l0(
    job: Job,
    *,
    strength: float = 1.0,
    groups: Literal["weights", "rows", "columns"] = "weights",
    start: float = 0.9,
    gate_rate: float = 1e-2,
) -> Transform:
    """L0 by hard-concrete gates of weights, rows or columns."""
    return schedules.hard_concrete(
        job.where, strength=strength, groups=groups, start=start, gate_rate=gate_rate
    )


def learned_n_m(
    job: Job,
    *,
    pattern: str = "2:4",
    prior: float = 3.0,
    strength: float = 0.0,
    gate_rate: float = 1e-3,
) -> Transform:
    """Learned n:m (MaskLLM); with train="gates" the weights stay as they are."""
    return schedules.learned_n_m(
        job.where, steps=job.settings.steps, pattern=pattern, prior=prior, strength=strength,
        gate_rate=gate_rate, seed=job.seed,
    )  # fmt: skip


def _interval(job: Job, given: int | None) -> int:
    return max(1, min(100, job.settings.steps // 10)) if given is None else given


def _sparse_start(job: Job, sparsity: float, distribution: str) -> Callable[[Any], Any]:
    return functools.partial(
        schedules.sparse_start, where=job.where, sparsity=sparsity, distribution=distribution,
        seed=job.seed,
    )  # fmt: skip


def _proximal(job: Job, shrink: Any, strength: float) -> Callable[..., Any]:
    return functools.partial(
        schedules.proximal, where=job.where, shrink=shrink, strength=strength,
        rate=job.settings.rate,
    )  # fmt: skip


SCHEDULES: dict[str, Callable[..., Transform]] = {
    "gradual": gradual,
    "lottery": lottery,
    "set": evolution,
    "rigl": rigl,
    "l1": l1,
    "group_lasso": group_lasso,
    "sr_ste": sr_ste,
    "movement": movement,
    "soft_movement": soft_movement,
    "l0": l0,
    "learned_n_m": learned_n_m,
}


def _stage(name: str, build: Callable[..., Transform]) -> Callable[..., Outcome]:
    """The stage of a schedule."""

    def run(
        model: Model,
        context: Context,
        settings: Training,
        *,
        matrices: Patterns = None,
        spared: Patterns = None,
        **options: Any,
    ) -> Outcome:
        made = job(model, context.inputs, settings, context.seed, matrices=matrices, spared=spared)
        trained = finetuned(model, context, settings, name, transform=build(made, **options))
        told = schedules.zeros_told(trained.params, made.where)
        return Outcome(trained.replace(notes=(*trained.notes, *(f"{name}: {t}" for t in told))))

    hints = typing.get_type_hints(build)
    given = list(inspect.signature(run).parameters.values())[:-1]
    own = list(inspect.signature(build).parameters.values())[1:]
    run.__doc__ = build.__doc__
    run.__signature__ = inspect.Signature(given + own)  # type: ignore[attr-defined]
    run.__annotations__ |= {p.name: hints[p.name] for p in own}
    return run


SCHEDULE_STAGES = {name: _stage(name, build) for name, build in SCHEDULES.items()}
