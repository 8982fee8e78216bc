"""A distillation step of Llama 3 70B to 8B compiled for TPU pods: memory and collectives.

    python benchmarks/pod_step.py [--pods 0,1] [--seq 4096]

No TPU is needed: the step that the training loop runs is compiled by libtpu for pods that are not
there. HBM is what the compiler assigns on each chip. A collective inside the scan over the layers
is one instruction and runs once per layer; "runs" are those of one step.
"""

import functools
import json

from tables import Table, arguments, write

from jaxcompress.core.model import Model
from jaxcompress.distillation import distill
from jaxcompress.methods import compressed_shapes
from jaxcompress.models import DecoderConfig, abstract_params, functions_of
from jaxcompress.models.rope import RopeConfig
from jaxcompress.training.aot import compile_step, token_batch
from jaxcompress.training.collectives import KINDS
from jaxcompress.training.mesh import abstract_mesh
from jaxcompress.training.plan import plan_stage
from jaxcompress.training.settings import Training

GIB = 2**30
SIZES = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "param_dtype": "float32",
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "param_dtype": "bfloat16",
    },
}
# Pod, data x fsdp x tensor, rows per chip of the batch split (data x fsdp), bits of the teacher.
PODS = [
    ("v5p:4x4x4", 2, 8, 4, 4, None),
    ("v5p:8x8x8", 16, 8, 4, 4, None),
    ("v5p:4x4x4", 2, 8, 4, 4, 4),
    ("v5p:8x8x8", 16, 8, 4, 4, 4),
    ("v6e:8x8", 2, 8, 4, 2, None),
    ("v6e:16x16", 8, 8, 4, 2, None),
    ("2*v6e:16x16", 16, 8, 4, 2, None),
    ("v5p:8x8x8", 2, 64, 4, 4, None),
]

NOTES = [
    "Student: float32 master weights and AdamW moments, computing in bfloat16. Each block is "
    "rematerialized. Collectives are given as instructions / runs in one step.",
    "Arguments are what lies on a chip between steps; planned is what `training.plan` says of it, "
    "without compiling.",
    "HBM of a chip by the Cloud TPU documentation: v5p 95, v6e 32 GiB.",
]


def llama(name):
    """Shapes of a Llama 3."""
    layers = SIZES[name]["num_hidden_layers"]
    config = DecoderConfig(
        **SIZES[name],
        vocab_size=128256,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope=RopeConfig(rope_theta=500000.0),
        windows=(None,) * layers,
        scan_layers=True,
        remat=True,
        dtype="bfloat16",
    )
    functions = functions_of(config)
    return Model(functions.apply, abstract_params(config), functions.blocks, config)


def compiled(pod, data, fsdp, tensor, rows, bits, seq, chunk):
    """What the compiler says of a step, and what the plan says of its weights."""
    student, teacher = llama("8B"), llama("70B")
    if bits is not None:
        teacher = compressed_shapes(teacher, "rtn", bits=bits, group_size=128)
    settings = Training(steps=1000, batch_size=rows * data * fsdp, weight_decay=0.1)
    step = compile_step(
        pod,
        student,
        settings,
        functools.partial(distill, chunk=chunk),
        token_batch(settings.batch_size, seq),
        teachers=(teacher,),
        data=data,
        fsdp=fsdp,
        tensor=tensor,
    )
    mesh = abstract_mesh(step.chips, data, fsdp, tensor)
    planned = plan_stage("distill", student, mesh, settings=settings, teachers=[teacher])
    return step, planned


def row(case, step, planned, seq):
    """Cells of the table."""
    _, data, fsdp, _, rows, _ = case
    counts = [step.collectives[kind] for kind in KINDS]
    total = sum(count.executed for count in counts)
    return (
        *key(case),
        rows * data * fsdp * seq,
        f"{step.used / GIB:.1f} of {step.hbm / GIB:.0f}",
        f"{step.arguments / GIB:.1f}",
        f"{(planned.weights + planned.moments + planned.teacher) / GIB:.1f}",
        f"{step.temporaries / GIB:.1f}",
        *(f"{count.instructions} / {count.executed}" for count in counts),
        total,
        f"{step.flops:.2e}",
        f"{step.seconds:.0f}",
    )


def key(case):
    """The first cells of a row, which tell it from the others."""
    pod, data, fsdp, tensor, _, bits = case
    return pod, f"{data} x {fsdp} x {tensor}", "bf16" if bits is None else f"W{bits} g128"


def earlier(file, title, cells):
    """Rows of an earlier run of the table of this title, by so many of their first cells."""
    tables = json.loads(file.read_text())["tables"] if file.exists() else []
    rows = [
        tuple(row.values()) for table in tables if table["title"] == title for row in table["rows"]
    ]
    return {row[:cells]: row for row in rows}


def main():
    args = arguments(__doc__, pods="", seq=4096, chunk=1024)
    chosen = [int(i) for i in args.pods.split(",")] if args.pods else range(len(PODS))
    title = f"Llama 3 70B to 8B, {args.seq} tokens in a row"
    known = earlier(args.out / "pod_step.json", title, 3) if args.pods else {}
    columns = ["pod", "data x fsdp x tensor", "teacher", "tokens per step", "HBM per chip, GiB"]
    columns += ["arguments", "planned", "temporaries", *KINDS, "runs in all", "FLOPs per chip"]
    table = Table(title, [*columns, "compiled in s"])
    for index, case in enumerate(PODS):
        if index in chosen:
            table.add(*row(case, *compiled(*case, args.seq, args.chunk), args.seq))
        elif key(case) in known:
            table.add(*known[key(case)])
    write(args.out, "pod_step", __doc__, [table], NOTES)


if __name__ == "__main__":
    main()
