"""What a recipe would do, and what it would take: nothing is read but configs and data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.distillation import distill
from jaxcompress.recipe.checks import Scene, check_parallel, check_stages, guide_of
from jaxcompress.recipe.config import read_config
from jaxcompress.recipe.inputs import Inputs, model_shapes, naming
from jaxcompress.recipe.stages import Stage, read_stages
from jaxcompress.training.aot import compile_step, token_batch
from jaxcompress.training.mesh import AnyMesh, abstract_mesh
from jaxcompress.training.objective import next_token
from jaxcompress.training.plan import StageMemory, plan_stage, plan_table
from jaxcompress.training.topology import parse_topology


def plan(config: Any, topology: str | None = None) -> Iterator[str]:
    """The plan of a recipe, line by line: stages, parameters, bytes per device.

    Args:
      config: see `run`.
      topology: a TPU pod such as "v5p:4x4x4", none of which need be there: every step that trains
        is compiled for it, and memory per chip and collectives are told. The mesh of the config is
        then laid over its chips.

    Raises:
      InputError: what `run` would refuse before any work, a bad topology, or a step that the
        compiler refuses.
    """
    recipe = read_config(config)
    stages = read_stages(recipe)
    devices = jax.device_count() if topology is None else parse_topology(topology).chips
    sizes = {name: getattr(recipe.mesh, name) for name in ("data", "fsdp", "tensor")}
    with naming("config.mesh"):
        mesh = abstract_mesh(devices, **sizes)
    check_parallel(recipe.mesh, mesh)
    start = model_shapes(recipe)
    scene = Scene(recipe, mesh, start, Inputs(recipe.data, start, recipe.seed))
    before = check_stages(stages, scene)
    yield plan_table([_memory(s, m, scene, mesh) for s, m in zip(stages, before)], mesh)
    unknown = [s.name for s, m in zip(stages, before) if m is None]
    if unknown:
        yield f"The data decide what {', '.join(unknown)} begins with; it is counted as before."
    if topology is None:
        return
    for stage, model in zip(stages, before):
        if stage.training is not None:
            yield ""
            yield f"{stage.name}: one step on"
            yield _compiled(topology, stage, model or start, scene, sizes)


def _memory(stage: Stage, model: Model | None, scene: Scene, mesh: AnyMesh) -> StageMemory:
    model = scene.start if model is None else model
    teachers = [guide_of(stage, scene)] if stage.method == "distill" else []
    return plan_stage(stage.name, model, mesh, settings=stage.training, teachers=teachers)


def _compiled(
    topology: str, stage: Stage, model: Model, scene: Scene, sizes: dict[str, int]
) -> str:
    settings = stage.training
    assert settings is not None
    if not scene.inputs.is_text:
        raise InputError("topology: steps are compiled for models that read token ids")
    teachers, objective = [], partial(next_token)
    if stage.method == "distill":
        own = {
            n: v for n, v in stage.options.items() if n in ("loss", "temperature", "alpha", "beta")
        }
        teachers, objective = [guide_of(stage, scene)], partial(distill, **own)
    batch = token_batch(settings.batch_size, scene.recipe.data.ctx)
    return str(
        compile_step(topology, model, settings, objective, batch, teachers=teachers, **sizes)
    )
