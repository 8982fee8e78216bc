"""The methods `heads`, `neurons`, `filters`, `units` and `width`: one cut of one kind of group."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.pruning.structured.choice import Allocation, best, choose
from jaxcompress.pruning.structured.compensate import Compensate
from jaxcompress.pruning.structured.configs import tied_heads
from jaxcompress.pruning.structured.cutting import Cut, Settings, decide
from jaxcompress.pruning.structured.data import data_of
from jaxcompress.pruning.structured.importance import Reduce
from jaxcompress.pruning.structured.result import Form
from jaxcompress.pruning.structured.roles import Kind


def _cut(
    model: Model, calibration: Any, kind: Kind, settings: Settings, residual: bool | None = None
) -> Model:
    """One kind of group, cut."""
    if kind == "heads" and settings.form == "config" and tied_heads(model.config):
        raise InputError(
            f"heads: the config of {model.config.model_type} makes all heads together as wide as "
            "the residual stream; use method width, which cuts both, or form='function'"
        )
    made = decide(model, kind, calibration, settings, residual=residual)
    return made.cut.result(made.groups, made.kept, settings, kind)


def heads(
    model: Model,
    *,
    calibration: Any = None,
    sparsity: float = 0.25,
    score: str = "magnitude",
    reduce: Reduce = "sum",
    multiple: int = 1,
    minimum: int = 1,
    allocation: Allocation = "uniform",
    compensate: Compensate = "none",
    form: Form = "config",
    random_seed: int = 0,
) -> Model:
    """Attention heads go: those that share a key and value head, together with it.

    Source: Michel et al., "Are Sixteen Heads Really Better than One?", arXiv:1905.10650.

    Args:
      model: any model; heads are found in its program.
      calibration: inputs `[samples, ...]`, where the score or the compensation needs them.
      sparsity: fraction removed, floor(sparsity * n) of each group, or fewer for `multiple`.
      score: of the weights: magnitude, taylor, fisher, wanda and the other scores of single
        weights; of what consumers read: activation, activation_l2, apoz (fraction of zeros); gate
        (gradient of a gate); random; of heads: entropy (the most spread go first) or
        entropy_reversed.
      reduce: how scores of single weights or channels become one: sum, mean, max or l2.
      multiple: what stays is a multiple of it, such as 8, 64 or 128.
      minimum: the least that stay of a group.
      allocation: "uniform", or "global": the lowest of all groups together.
      compensate: "none", "bias" (the mean of what goes into the consumers' biases), or "refit"
        (the consumers fitted anew by least squares).
      form: "config", or "function": of a reference model too, the cut program without a config.
      random_seed: of the score random.

    Returns:
      The smaller model; its notes say what stayed.

    Raises:
      InputError: no such group, an option out of range, or a format that cannot say the result.
    """
    settings = Settings(
        sparsity, score, reduce, multiple, minimum, allocation, compensate, form, random_seed
    )
    return _cut(model, calibration, "heads", settings)


def neurons(
    model: Model,
    *,
    calibration: Any = None,
    sparsity: float = 0.25,
    score: str = "magnitude",
    reduce: Reduce = "sum",
    multiple: int = 1,
    minimum: int = 1,
    allocation: Allocation = "uniform",
    compensate: Compensate = "none",
    form: Form = "config",
    random_seed: int = 0,
) -> Model:
    """Neurons inside the blocks go: of feed-forward layers, of hidden layers of a classifier.

    Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
    (Minitron), arXiv:2407.14679, section 2.2.

    Args:
      model: see `heads`, like the rest.
      calibration: inputs, where the score or the compensation needs them.
      sparsity: fraction removed.
      score: as of `heads`, without the entropies.
      reduce: sum, mean, max or l2.
      multiple: what stays is a multiple of it, such as 8, 64 or 128.
      minimum: the least that stay of a group.
      allocation: "uniform", or "global": the lowest of all groups together.
      compensate: "none", "bias" or "refit".
      form: "config" or "function".
      random_seed: of the score random.
    """
    settings = Settings(
        sparsity, score, reduce, multiple, minimum, allocation, compensate, form, random_seed
    )
    return _cut(model, calibration, "neurons", settings)


def filters(
    model: Model,
    *,
    calibration: Any = None,
    sparsity: float = 0.25,
    score: str = "magnitude",
    reduce: Reduce = "sum",
    multiple: int = 1,
    minimum: int = 1,
    allocation: Allocation = "uniform",
    residual: bool = False,
    compensate: Compensate = "none",
    form: Form = "config",
    random_seed: int = 0,
) -> Model:
    """Filters of convolutions go, with their norms and what reads them.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, section 3; over
    coupled layers: Fang et al., "DepGraph", arXiv:2301.12900.

    Args:
      model: see `heads`, like the rest.
      calibration: images, or (images, labels) for scores from gradients.
      sparsity: fraction removed.
      score: as of `heads`, without the entropies.
      reduce: sum, mean, max or l2.
      multiple: what stays is a multiple of it, such as 8, 64 or 128.
      minimum: the least that stay of a group.
      allocation: "uniform", or "global": the lowest of all groups together.
      residual: also cut the filters that residual additions tie together.
      compensate: "none", "bias" or "refit".
      form: "config" or "function".
      random_seed: of the score random.
    """
    settings = Settings(
        sparsity, score, reduce, multiple, minimum, allocation, compensate, form, random_seed
    )
    return _cut(model, calibration, "filters", settings, None if residual else False)


def units(
    model: Model,
    *,
    calibration: Any = None,
    sparsity: float = 0.25,
    score: str = "magnitude",
    reduce: Reduce = "sum",
    multiple: int = 1,
    minimum: int = 1,
    compensate: Compensate = "none",
    form: Form = "config",
    random_seed: int = 0,
) -> Model:
    """Units of recurrent layers go, with all their gates.

    Source: Wen et al., "Learning Intrinsic Sparse Structures within Long Short-Term Memory",
    arXiv:1709.05027, section 3.

    Args:
      model: see `heads`, like the rest.
      calibration: inputs, where the score or the compensation needs them.
      sparsity: fraction removed of each layer.
      score: as of `heads`, without the entropies.
      reduce: sum, mean, max or l2.
      multiple: what stays is a multiple of it, such as 8, 64 or 128.
      minimum: the least that stay of a layer.
      compensate: "none", "bias" or "refit".
      form: "config" or "function".
      random_seed: of the score random.
    """
    settings = Settings(
        sparsity, score, reduce, multiple, minimum, "uniform", compensate, form, random_seed
    )
    return _cut(model, calibration, "units", settings)


def width(
    model: Model,
    *,
    calibration: Any = None,
    sparsity: float = 0.25,
    score: str = "activation",
    reduce: Reduce = "mean",
    multiple: int = 1,
    minimum: int = 1,
    form: Form = "config",
    random_seed: int = 0,
) -> Model:
    """The residual stream becomes narrower: embeddings, norms, and every block's ins and outs.

    Where the format makes all heads together as wide as the residual stream (GPT-2), as many heads
    go as well.

    Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
    (Minitron), arXiv:2407.14679, section 2.2.

    Args:
      model: see `heads`, like the rest.
      calibration: inputs, where the score needs them.
      sparsity: fraction removed.
      score: as of `heads`, without the entropies.
      reduce: sum, mean, max or l2.
      multiple: what stays is a multiple of it, such as 8, 64 or 128.
      minimum: the least that stay.
      form: "config" or "function".
      random_seed: of the score random.
    """
    settings = Settings(
        sparsity, score, reduce, multiple, minimum, form=form, random_seed=random_seed
    )
    cut = Cut.of(model, data_of(model, calibration))
    streams = cut.of_kind("width")
    head_dim = tied_heads(model.config) if form == "config" else 0
    settings = replace(settings, multiple=math.lcm(multiple, head_dim or 1))
    scores = cut.scores(streams, settings)
    indices = choose(scores, sparsity, multiple=settings.multiple, minimum=minimum)
    if not head_dim:
        return cut.result(streams, indices, settings, "width")
    also = cut.of_kind("heads")
    count = indices[0].shape[-1] // head_dim
    chosen = [best(s, count) for s in cut.scores(also, settings)]
    return cut.result([*streams, *also], [*indices, *chosen], settings, "width with heads")
