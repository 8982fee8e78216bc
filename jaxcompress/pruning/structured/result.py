"""From a record of what stays to the smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers.cut import cut
from jaxcompress.core.readers.kept import KeptArrays, sliced
from jaxcompress.core.readers.lift import lift
from jaxcompress.models import build_model
from jaxcompress.pruning.structured.configs import smaller_config

Form = Literal["config", "function"]

# Of the largest output: two evaluations of one network in different order.
SAME, SAME_HALF = 1e-3, 3e-2


def smaller_model(
    model: Model,
    params: Any,
    kept: KeptArrays,
    inputs: tuple[Any, ...],
    form: Form,
    notes: Sequence[str],
    *,
    checked: bool = True,
) -> Model:
    """The model of what stays.

    A reference model becomes one of a smaller config, whose outputs are seen to equal those of
    the cut program. Any other keeps its own function, if that computes the same on the smaller
    parameters; otherwise it runs the cut program.

    Args:
      model: before the cut.
      params: its parameters at full size, perhaps compensated.
      kept: what stays.
      inputs: some, to compare on.
      form: "config"; or "function": of a reference model too, the cut program without a config.
      notes: what was done.
      checked: whether to compare; there is nothing to compare of shapes.

    Raises:
      InputError: no config says it, or the smaller config computes something else.
    """
    notes = (*model.notes, *notes)
    if not checked and model.config is not None:
        smaller = sliced(params, kept)
        config = smaller_config(model.config, smaller, kept)
        return _of_config(model, config, smaller, notes)
    smaller, function = cut(model.apply, params, kept, *inputs, means="kept")
    if not checked:
        return model.replace(apply=function, params=smaller, blocks=None, notes=notes)
    expected = jax.jit(function)(smaller, *inputs)
    if model.config is not None and form == "config":
        config = smaller_config(model.config, smaller, kept)
        made = _of_config(model, config, smaller, notes)
        if why := _differs(made.apply, smaller, inputs, expected):
            raise InputError(
                f"{config.model_type}: the smaller config computes something else than the cut "
                f"network ({why}); form='function' keeps the cut network"
            )
        return made
    own = model.config is None and not _differs(model.apply, smaller, inputs, expected)
    if own:
        blocks = model.blocks
        if blocks is not None and _differs(blocks.run, smaller, inputs, expected):
            blocks = None
        return model.replace(params=smaller, blocks=blocks, notes=notes)
    said = "the cut network is evaluated from its own program, it has no config and no blocks"
    return model.replace(
        apply=function, params=smaller, blocks=None, config=None, notes=(*notes, said)
    )


def _of_config(model: Model, config: Any, params: Any, notes: tuple[str, ...]) -> Model:
    made = build_model(config, params)
    before = model.config
    changed = [n for n in before.architecture() if getattr(before, n) != getattr(config, n)]
    told = ", ".join(f"{n} {getattr(before, n)} -> {getattr(config, n)}" for n in changed)
    return model.replace(
        apply=made.apply,
        params=params,
        blocks=made.blocks,
        config=config,
        notes=(*notes, told) if told else notes,
    )


def _differs(function: Any, params: Any, inputs: tuple[Any, ...], expected: Any) -> str:
    """Why the outputs differ from those expected; empty where they do not."""
    try:
        found = jax.jit(lift(function))(params, *inputs)
    except Exception as error:  # whatever a stranger's function raises on other shapes
        first = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {first[0]}"
    structure: Any = jax.tree.structure(expected)
    if structure != jax.tree.structure(found):
        return "another structure of outputs"
    half = any(x.dtype.itemsize < 4 for x in jax.tree.leaves((params, expected)) if _floats(x))
    tolerance = SAME_HALF if half else SAME
    for (path, a), (_, b) in zip(leaves_with_paths(expected), leaves_with_paths(found)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if a.shape != b.shape:
            return f"output {path} of shape {b.shape}, not {a.shape}"
        off = np.abs(a - b).max() / max(np.abs(a).max(), 1e-6)
        if not off <= tolerance:
            return f"output {path} differs by {off:.1e} of its largest entry".replace("  ", " ")
    return ""


def _floats(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
