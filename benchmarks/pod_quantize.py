"""GPTQ of a block of Llama 3 70B compiled for a TPU pod: memory and collectives of each program.

    python benchmarks/pod_quantize.py [--pod v5p:2x2x4] [--mesh 1,8,2] [--samples 128] [--seq 2048]

No TPU is needed: the programs that the walk runs for a block are compiled by libtpu for a pod that
is not there. All blocks are alike, so that each program is compiled once for the whole model. HBM
is what the compiler assigns on each chip. A collective inside the loop over the calibration data
is one instruction and runs once per chunk; "runs" are those of one program.
"""

import functools
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pod_step import GIB, earlier, llama
from tables import Table, arguments, write

from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers.lift import lift
from jaxcompress.layerwise.batch import dealt, split
from jaxcompress.layerwise.grid import grid_of, stored
from jaxcompress.layerwise.observe import Observer, summed
from jaxcompress.layerwise.walk import advance, samples_together
from jaxcompress.methods import compressed_shapes
from jaxcompress.quantization.gptq import Columns
from jaxcompress.training.aot import compile_program
from jaxcompress.training.collectives import KINDS
from jaxcompress.training.mesh import make_mesh, param_shardings, partitioned
from jaxcompress.training.topology import parse_topology, topology_devices

FORMAT = {"bits": 4, "group_size": 128}
SOLVER = Columns(grid_of("int", **FORMAT), act_order=True, damp=0.01, rounds=0)

NOTES = [
    "Weights and hidden states bfloat16, second moments float32; int4 in groups of 128, columns by "
    "falling activation. The weights lie split over fsdp and tensor, the calibration data over "
    "data and fsdp. Collectives are given as instructions / runs in one program.",
    "`deal` puts the matrices of one shape, and their second moments, one on a chip; `solve` "
    "factors the moment, rounds, and measures the error on every chip by itself; `store` packs the "
    "codes. Where there are fewer matrices of a shape than chips, some chips repeat the last one.",
    "Compiled on one core that other work shared; with `--only` other rows are of earlier runs.",
    "HBM of a chip by the Cloud TPU documentation: v5p 95, v6e 32 GiB.",
]


def main():
    args = arguments(__doc__, pod="v5p:2x2x4", mesh="1,8,2", samples=128, seq=2048, only="")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    sizes = [int(size) for size in args.mesh.split(",")]
    mesh = make_mesh(*sizes, devices=topology_devices(args.pod))
    hbm = parse_topology(args.pod).hbm / GIB
    columns = ["program", "HBM per chip, GiB", "arguments", "outputs", "temporaries"]
    columns += [*KINDS, "lines of HLO", "compiled in s"]
    shape = " x ".join(map(str, sizes))
    title = (
        f"A block on {args.pod}, {shape} (data x fsdp x tensor), {args.samples} x {args.seq} tokens"
    )
    known = earlier(args.out / "pod_quantize.json", title, 1) if args.only else {}
    table = Table(title, columns)
    for name, lower in programs(llama("70B"), mesh, args.samples, args.seq):
        if name.startswith(args.only):
            table.add(*row(name, compile_program(lower()), hbm))
        elif (name,) in known:
            table.add(*known[name,])
    write(args.out, "pod_quantize", __doc__, [table], NOTES)


def row(name, program, hbm):
    """Cells of the table."""
    counts = [program.collectives[kind] for kind in KINDS]
    return (
        name,
        f"{program.used / GIB:.1f} of {hbm:.0f}",
        *(f"{n / GIB:.1f}" for n in (program.arguments, program.outputs, program.temporaries)),
        *(f"{count.instructions} / {count.executed}" for count in counts),
        program.lines,
        f"{program.seconds:.0f}",
    )


def programs(model, mesh, samples, seq):
    """Name, and a function that lowers it, of each program of a block."""
    compressed = partitioned(compressed_shapes(model, "gptq", **FORMAT), mesh)
    dense, small = on_mesh(model, mesh), on_mesh(compressed, mesh)
    paths = tuple(path for path, leaf in leaves_with_paths(small) if is_compressed(leaf))
    batch = mesh.shape["data"] * mesh.shape["fsdp"]
    together = samples_together(samples, seq, batch)
    hidden = jax.ShapeDtypeStruct(
        (samples // together, together, seq, model.config.hidden_size),
        model.config.dtype,
        sharding=NamedSharding(mesh, P(None, ("data", "fsdp"))),
    )
    observer = Observer(model.blocks.block, paths, ["second_moment"])
    yield "statistics", lambda: summed.lower(observer.capture(paths), dense, hidden)
    yield from solver_programs(dense, paths, mesh)
    yield "advance", lambda: advance.lower(lift(model.blocks.block), small, hidden)


def on_mesh(model, mesh):
    """Shapes of one block, laid out as the stacked blocks are."""
    blocks = jax.eval_shape(lambda params: model.blocks.of(params)[0], model.params)
    shardings = param_shardings(model, mesh)["layers"]
    return jax.tree.map(
        lambda x, stacked: placed(x.shape, x.dtype, mesh, P(*stacked.spec[1:])), blocks, shardings
    )


def solver_programs(block, paths, mesh):
    """Of the matrices of each shape: dealt to the chips, solved, and packed."""
    mesh = Mesh(mesh.devices, mesh.axis_names)
    shapes = {}
    for path, leaf in leaves_with_paths(block):
        if path in paths:
            shapes.setdefault(leaf.shape[::-1], []).append(path.split("/")[-2].split("_")[0])
    for (rows, columns), names in shapes.items():
        name = f"{', '.join(names)}: {rows} x {columns}"
        members = [
            (
                placed((rows, columns), jnp.bfloat16, mesh, P()),
                {"second_moment": placed((columns, columns), jnp.float32, mesh, P())},
            )
        ] * len(names)
        yield f"deal {name}", functools.partial(dealt.lower, mesh, *members)
        weight, statistics = jax.tree.map(
            lambda x: placed(x.shape, x.dtype, mesh, P(mesh.axis_names)),
            jax.eval_shape(functools.partial(dealt, mesh), *members),
        )
        solver = functools.partial(split, SOLVER, mesh, mesh.axis_names)
        given = weight, statistics["second_moment"]
        yield f"solve {name}", functools.partial(split.lower, *solver.args, *given)
        found = jax.tree.map(
            lambda x: placed(x.shape, x.dtype, mesh, P(mesh.axis_names)),
            jax.eval_shape(solver, *given)[0],
        )
        yield f"store {name}", functools.partial(stored.lower, SOLVER.grid, *found, weight.dtype)


def placed(shape, dtype, mesh, spec):
    """The shape of an array that lies on a mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


if __name__ == "__main__":
    main()
