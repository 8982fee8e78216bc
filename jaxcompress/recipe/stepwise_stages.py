"""The stages that prune step by step: `iterative` tunes after each step, `greedy` does not."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.selection import nearest
from jaxcompress.data.images import normalize
from jaxcompress.layerwise.losses import loss_of, mean_loss
from jaxcompress.methods import method_named
from jaxcompress.pruning import schedules
from jaxcompress.pruning.schedules.iterative import Progression
from jaxcompress.recipe.inputs import Inputs, on_one_device
from jaxcompress.recipe.work import BatchNorm, Context, Outcome, compressed, finetuned
from jaxcompress.training.metrics import read_metrics
from jaxcompress.training.settings import Training

Candidate = Mapping[str, Any]  # a method and its options, as a stage gives them
VALIDATION_BATCH = 8
# Of `methods.compress`, beside a method's own.
PER_MATRIX = ("include", "exclude", "overrides")
WALKED = ("calibration_samples", "sequential", "dense_target")


def iterative(
    model: Model,
    context: Context,
    settings: Training,
    *,
    prune: Candidate | tuple[Candidate, ...] = {"method": "magnitude"},  # noqa: B006
    sparsity: float = 0.8,
    rounds: int = 4,
    progression: Progression = "geometric",
    batch_norm: BatchNorm = "running",
    validation_samples: int = 32,
) -> Outcome:
    """Prune a step by any method, finetune, and again.

    Args:
      prune: dict(method=NAME, ...); of several, each round takes the one of least validation loss.
      sparsity: share removed in the end. Methods that cut take their part of what is left in each
        round; one without an option `sparsity` does the same each time.
      rounds: how often; `steps` are those of one round.
      progression: of the share, see `pruning.schedules.progression`.
      batch_norm: as of `finetune`.
      validation_samples: of the training data, on which several methods are compared.
    """
    totals = schedules.progression(progression, sparsity, rounds)
    losses: list[dict[str, Any]] = []

    def at(number: int) -> Context:
        return dataclasses.replace(context, folder=context.folder / "partial" / f"round-{number}")

    def pruned(model: Model, before: float, after: float) -> Model:
        folder = at(totals.index(after)).folder
        remove = {
            name: functools.partial(
                _removed, context=dataclasses.replace(context, folder=folder / name),
                candidate=candidate, before=before, after=after,
            )
            for name, candidate in named(prune).items()
        }  # fmt: skip
        if len(remove) == 1:
            return next(iter(remove.values()))(model)
        return schedules.greedy(model, remove, _validation(context, validation_samples))

    def tuned(model: Model, number: int) -> Model:
        name = f"round {number + 1} of {rounds}"
        made = finetuned(model, at(number), settings, name, batch_norm=batch_norm)
        rows = read_metrics(at(number).folder / "metrics.jsonl")
        losses.extend({**row, "step": row["step"] + number * settings.steps} for row in rows)
        return made

    small = schedules.iterative(model, pruned, tuned, totals)
    if jax.process_index() == 0:
        text = "".join(json.dumps(row) + "\n" for row in losses)
        (context.folder / "metrics.jsonl").write_text(text)
    return Outcome(small)


def greedy(
    model: Model,
    context: Context,
    *,
    candidates: tuple[Candidate, ...],
    rounds: int = 1,
    validation_samples: int = 32,
) -> Outcome:
    """Each round takes the candidate after which the validation loss is least; nothing trains.

    Args:
      candidates: each dict(method=NAME, ...).
      rounds: removals.
      validation_samples: of the training data, on which candidates are compared.
    """
    tried = itertools.count()  # what one attempt keeps is no other's

    def removed(model: Model, candidate: Candidate) -> Model:
        folder = context.folder / "partial" / str(next(tried))
        own = dataclasses.replace(context, folder=folder)
        return _removed(model, context=own, candidate=candidate)

    remove = {
        name: functools.partial(removed, candidate=candidate)
        for name, candidate in named(candidates).items()
    }
    loss = _validation(context, validation_samples)
    return Outcome(schedules.greedy(model, remove, loss, rounds=rounds))


def candidate_options(
    candidate: Candidate, before: float = 0.0, after: float | None = None
) -> tuple[str, dict[str, Any]]:
    """The method of a candidate, and its options where it is to go from one share to another.

    Raises:
      InputError: an unknown method, or an option that is not its own or not of its type.
    """
    options = dict(candidate)
    name = options.pop("method", None)
    if not isinstance(name, str):
        raise InputError("method: each candidate is dict(method=NAME, ...)")
    method = method_named(name)
    if after is not None:
        share = schedules.share_of_rest(before, after)
        if "budget" in method.options:
            options["budget"] = 1 - share
        elif "sparsity" in method.options:
            options["sparsity"] = share if method.produces == "model" else after
    known = {*method.options, *WALKED, *(PER_MATRIX if method.per_matrix else ())}
    for option in options.keys() - known:
        raise InputError(f"{name}.{option}: no such option; {nearest(option, known)}")
    method.accepted({n: v for n, v in options.items() if n in method.options})
    return name, options


def _removed(
    model: Model,
    *,
    context: Context,
    candidate: Candidate,
    before: float = 0.0,
    after: float | None = None,
) -> Model:
    name, options = candidate_options(candidate, before, after)
    made = compressed(model, context, name, options).model
    assert made is not None
    return made


def named(given: Candidate | tuple[Candidate, ...]) -> dict[str, Candidate]:
    """Candidates by names of which no two are the same."""
    several = (given,) if isinstance(given, Mapping) else given
    if not several:
        raise InputError("candidates: name at least one")
    return {f"{i + 1}-{c.get('method')}": c for i, c in enumerate(several)}


def _validation(context: Context, samples: int) -> Callable[[Model], float]:
    """The loss of a model on data that training may see, and the report's quality is not of."""
    batches = validation_batches(context.inputs, samples)

    def loss(model: Model) -> float:
        local = on_one_device(model.params)
        return mean_loss(jax.jit(loss_of(model, batches[0])), local, batches)

    return loss


def validation_batches(inputs: Inputs, samples: int) -> list[Any]:
    """Training data, drawn otherwise than those that methods are calibrated on."""
    rows = inputs.dataset("train")
    if not 1 <= samples <= len(rows):
        raise InputError(f"validation_samples {samples}: the data hold {len(rows)}")
    drawn = np.random.default_rng([inputs.seed, 1]).choice(len(rows), samples, replace=False)
    found = rows[np.sort(drawn)]
    parts = -(-samples // VALIDATION_BATCH)
    if inputs.is_text:
        return np.array_split(found["ids"], parts)
    images = np.array_split(normalize(found["images"]), parts)
    return list(zip(images, np.array_split(found["labels"], parts), strict=True))
