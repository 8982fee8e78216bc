"""A training step compiled for a pod that is not there: memory per chip, and its collectives.

compiled = compile_step("v5p:4x4x4", student, Training(steps=1000, batch_size=64), distill,
                        teachers=(teacher,), batch=token_batch(64, 4096), fsdp=16, tensor=4)

The TPU compiler ends the process it runs in where it finds something wrong, so that process is
another one.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxcompress.core.errors import InputError
from jaxcompress.core.flops import flops_of_jaxpr
from jaxcompress.core.model import Model
from jaxcompress.models import functions_of
from jaxcompress.training.collectives import Count, count_collectives
from jaxcompress.training.mesh import (
    abstract_mesh,
    check_batch,
    make_mesh,
    param_shardings,
    partitioned,
)
from jaxcompress.training.objective import Objective
from jaxcompress.training.prepare import prepare
from jaxcompress.training.settings import Training
from jaxcompress.training.topology import (
    GIB,
    parse_topology,
    require_libtpu,
    topology_devices,
)

Batch = Mapping[str, jax.ShapeDtypeStruct]
# What a compiler that found its memory too small says of it.
_TOO_LARGE = re.compile(r"Used ([\d.]+[GM]) of ([\d.]+[GM]) hbm")


@dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """What the compiler says of a program; sizes are bytes of one chip.

    Attributes:
      arguments: that it is given.
      outputs: that it gives.
      aliased: outputs that take the place of arguments.
      temporaries: everything in between.
      peak: the most that is alive at one time, temporaries and the rest.
      collectives: by kind.
      lines: of its optimized text.
      seconds: that compiling took.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    collectives: dict[str, Count]
    lines: int
    seconds: float

    @property
    def used(self) -> int:
        """Bytes of a chip's memory that it takes."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclass(frozen=True, kw_only=True)
class CompiledStep(CompiledProgram):
    """What the compiler says of a step, which is given state, frozen parameters and a batch.

    Attributes:
      topology: name of the pod.
      chips: in it.
      mesh: size of each mesh axis.
      hbm: memory of a chip.
      flops: of all products in a step (multiply and add = 2), those computed anew in the backward
        pass too, divided by the chips.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    hbm: int
    flops: float

    def __str__(self) -> str:
        """The lines that a person is shown."""
        gib = {n: getattr(self, n) / GIB for n in ("arguments", "temporaries", "used", "hbm")}
        mesh = ", ".join(f"{name} {size}" for name, size in self.mesh.items())
        runs = ", ".join(
            f"{kind} {count.instructions} ({count.executed} runs)"
            for kind, count in self.collectives.items()
            if count.instructions
        )
        return "\n".join(
            [
                f"{self.topology}: {self.chips} chips as {mesh}",
                f"HBM per chip: {gib['used']:.1f} of {gib['hbm']:.0f} GiB (arguments "
                f"{gib['arguments']:.1f}, temporaries {gib['temporaries']:.1f})",
                f"collectives in a step: {runs or 'none'}",
                f"{self.flops:.2e} FLOPs per chip and step; compiled in {self.seconds:.0f} s",
            ]
        )


def token_batch(rows: int, ctx: int) -> Batch:
    """Shapes of a batch of windows of text."""
    return {"ids": jax.ShapeDtypeStruct((rows, ctx), jnp.int32)}


def image_batch(rows: int, shape: tuple[int, int, int]) -> Batch:
    """Shapes of a batch of labelled images `[height, width, channels]`."""
    return {
        "images": jax.ShapeDtypeStruct((rows, *shape), jnp.float32),
        "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }


def compile_step(
    topology: str,
    model: Model,
    settings: Training,
    objective: Callable[..., Objective],
    batch: Batch,
    *,
    teachers: Sequence[Model] = (),
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
) -> CompiledStep:
    """The step that `train` would run on a pod, compiled.

    Args:
      topology: `v5p:4x4x4`, `2*v6e:16x16`, see `training.topology`.
      model: with a config; its parameters may be `jax.ShapeDtypeStruct`s.
      settings: of the training.
      objective: called as `objective(model, *teachers)`; a function of a module, or a
        `functools.partial` of one.
      batch: shapes of a global batch.
      teachers: models with configs too; laid out over the mesh like the model.
      data: mesh axis; -1: what remains.
      fsdp: mesh axis.
      tensor: mesh axis.

    Raises:
      InputError: a topology or mesh that there is not, a model without config, a step that does
        not fit the chips' memory, or one that the compiler fails on.
    """
    pod = parse_topology(topology)
    mesh = abstract_mesh(pod.chips, data, fsdp, tensor)
    sizes = dict(mesh.shape)
    check_batch(next(iter(batch.values())).shape[0], mesh, settings.accumulate)
    request = {
        "topology": topology,
        "mesh": sizes,
        "models": [_description(one) for one in (model, *teachers)],
        "settings": settings,
        "objective": objective,
        "batch": dict(batch),
    }
    require_libtpu()
    found = _in_another_process(request, topology)
    return CompiledStep(topology=topology, chips=pod.chips, mesh=sizes, hbm=pod.hbm, **found)


def compile_program(lowered: Any) -> CompiledProgram:
    """A program lowered for devices of a topology, compiled in this process."""
    with tempfile.TemporaryDirectory() as folder:
        # The text is read from a dump: a program's own way to text fails on some.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        start = time.perf_counter()
        compiled = lowered.compile(compiler_options=options)
        seconds = time.perf_counter() - start
        (file,) = Path(folder).glob("*.after_optimizations.txt")
        text = file.read_text()
    memory = compiled.memory_analysis()
    return CompiledProgram(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        collectives=count_collectives(text),
        lines=len(text.splitlines()),
        seconds=seconds,
    )


def _description(model: Model) -> tuple[Any, Any]:
    """Config and shapes of a model, which another process can be told."""
    if model.config is None:
        raise InputError("topology: a model without config cannot be compiled for a pod")
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x,
        model.params,
    )
    return model.config, shapes


def _in_another_process(request: dict[str, Any], topology: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request"), Path(folder, "answer")
        asked.write_bytes(pickle.dumps(request))
        run = subprocess.run(
            [sys.executable, "-m", "jaxcompress.training.aot", folder],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if not answered.exists():
            raise InputError(f"topology {topology}: the compiler stopped: {_reason(run.stderr)}")
        answer = pickle.loads(answered.read_bytes())
    if isinstance(answer, str):
        raise InputError(f"topology {topology}: {answer}")
    return answer


def _reason(log: str) -> str:
    """The line of a log that says why a process ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"Check fail|RET_CHECK|^F\d{4}|Error: ", line)]
    return (telling or lines or ["without a word"])[-1][:500]


def _main(folder: Path) -> None:
    """Compile what the request in a folder asks for, and leave the answer there."""
    request = pickle.loads((folder / "request").read_bytes())
    try:
        answer: Any = _compiled(request)
    except InputError as error:
        answer = str(error)
    except jax.errors.JaxRuntimeError as error:
        too_large = _TOO_LARGE.search(str(error))
        if too_large is None:
            raise
        answer = (
            f"does not fit: uses {too_large[1]} of {too_large[2]} of a chip's memory; raise "
            "mesh.fsdp, mesh.tensor or accumulate, or lower batch_size"
        )
    (folder / "answer.part").write_bytes(pickle.dumps(answer))
    (folder / "answer.part").rename(folder / "answer")


def _compiled(request: dict[str, Any]) -> dict[str, Any]:
    mesh = make_mesh(**request["mesh"], devices=topology_devices(request["topology"]))
    model, *teachers = (_model(*described) for described in request["models"])
    objective = request["objective"](model, *(_placed(teacher, mesh) for teacher in teachers))
    settings = request["settings"]
    prepared = prepare(
        model,
        objective,
        settings.make_optimizer(),
        mesh,
        accumulate=settings.accumulate,
        train=settings.train,
        include=settings.include,
        exclude=settings.exclude,
    )
    parts = prepared.parts
    traced = prepared.step.trace(parts.state, parts.frozen, objective.constants, request["batch"])
    flops = flops_of_jaxpr(traced.jaxpr.jaxpr) / mesh.size
    return {**vars(compile_program(traced.lower())), "flops": flops}


def _model(config: Any, params: Any) -> Model:
    functions = functions_of(config)
    return Model(functions.apply, params, blocks=functions.blocks, config=config)


def _placed(teacher: Model, mesh: Mesh) -> Model:
    """A teacher of shapes that lie on the mesh."""
    teacher = partitioned(teacher, mesh)
    return teacher.replace(
        params=jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            teacher.params,
            param_shardings(teacher, mesh),
        )
    )


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
