"""Compiles wna16 programs for TPUs without one; prints one JSON object per program.

Run as a script by ``test_wna16_aot_tpu.py``: a failed check in the compiler ends the process.
"""

import json
import os
import sys

os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pallas_kernels.wna16 import wna16_matmul
from pallas_kernels.wna16_parallel import column_parallel, row_parallel, weight_specs

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (4096, 14336)]


def struct(shape, dtype, sharding):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


def weight(n, k, *, bits, group, zero, layout, shardings):
    """Structs of codes, scale and, where asked, zero point."""
    words, quantities = (n, k * bits // 32), (n, k // group)
    if layout == "tpu":
        words, quantities = words[::-1], (k // group, 1, n)
    operands = [(words, "int32"), (quantities, "bfloat16")]
    if zero:
        operands.append((quantities, "uint8"))
    return [struct(*v, s) for v, s in zip(operands, shardings, strict=False)]


def report(name, function, *operands, **facts):
    compiled = jax.jit(function).lower(*operands).compile()
    text = compiled.as_text()
    # Instructions such as: %t = s32[4096,512]{0,1} transpose(...)
    reordered = [
        line.split("=")[1].split("[")[0].strip()
        for line in text.splitlines()
        if " transpose(" in line or " copy(" in line
    ]
    facts |= {
        "program": name,
        "temp": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "reorders_words": "s32" in reordered,
        "all_gathers": text.count("all-gather"),
        "all_reduces": text.count(" all-reduce(") + text.count(" all-reduce-start("),
    }
    print(json.dumps(facts), flush=True)


def products(chip):
    device = topologies.get_topology_desc(chip, platform="tpu").devices[0]
    sharding = SingleDeviceSharding(device)
    cases = [(n, k, 4, 128, m, False, "tpu") for n, k in SHAPES for m in (1, 16, 256)]
    cases += [(4096, 4096, 4, group, 16, True, "tpu") for group in (32, 64, 4096)]
    cases += [(4096, 14336, 8, 128, 16, False, "tpu"), (4096, 4096, 4, 128, 16, True, "canonical")]
    for n, k, bits, group, m, zero, layout in cases:
        operands = weight(
            n, k, bits=bits, group=group, zero=zero, layout=layout, shardings=[sharding] * 3
        )
        for transpose in (False, True):
            x = struct((m, n if transpose else k), "bfloat16", sharding)
            report(
                "product",
                lambda x, *w: wna16_matmul(x, *w, bits=bits, layout=layout, transpose=transpose),  # noqa: B023
                x,
                *operands,
                dense=2 * n * k,
                layout=layout,
                case=[n, k, bits, group, m, transpose],
            )
    n, k = 4096, 14336
    for layout in ("canonical", "tpu"):
        operands = weight(
            n, k, bits=4, group=128, zero=True, layout=layout, shardings=[sharding] * 3
        )
        report(
            "xla",
            lambda x, *w: wna16_matmul(x, *w, bits=4, layout=layout, implementation="xla"),  # noqa: B023
            struct((16, k), "bfloat16", sharding),
            *operands,
            dense=2 * n * k,
        )

    def loss(x, scale, codes):
        y = wna16_matmul(x, codes, scale, bits=4, layout="tpu", contracted=k)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    codes, scale = weight(
        n, k, bits=4, group=128, zero=False, layout="tpu", shardings=[sharding] * 2
    )
    x = struct((256, k), "bfloat16", sharding)
    report("gradient", jax.grad(loss, (0, 1)), x, scale, codes, dense=2 * n * k)
    experts = [
        jax.ShapeDtypeStruct((8, *v.shape), v.dtype, sharding=sharding) for v in (codes, scale)
    ]
    report(
        "experts",
        jax.vmap(lambda x, c, s: wna16_matmul(x, c, s, bits=4, layout="tpu")),
        struct((8, 16, k), "bfloat16", sharding),
        *experts,
        dense=8 * 2 * n * k,
    )


def sharded_mlp(chip):
    devices = topologies.get_topology_desc(chip, platform="tpu").devices
    mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "model"))
    d, f, options = 4096, 14336, {"bits": 4, "group": 128, "zero": False, "layout": "tpu"}

    def placed(n, k, n_axis, k_axis):
        bare = [*weight(n, k, **options, shardings=[None] * 2), None]
        specs = weight_specs(tuple(bare), n_axis, k_axis, layout="tpu")[:2]
        return weight(n, k, **options, shardings=[NamedSharding(mesh, s) for s in specs])

    up, down = placed(f, d, "model", None), placed(d, f, None, "model")
    x = struct((16, d), "bfloat16", NamedSharding(mesh, PartitionSpec("data")))
    shared = {"mesh": mesh, "axis": "model", "batch_axes": ("data",), "bits": 4, "layout": "tpu"}

    def mlp(x, up, down):
        return row_parallel(jax.nn.silu(column_parallel(x, *up, **shared)), *down, **shared)

    report("mlp", mlp, x, up, down, dense=2 * d * f // 4)

    def partitioned(x, up):
        return wna16_matmul(x, *up, bits=4, layout="tpu")

    report("partitioned", partitioned, x, up, dense=2 * d * f // 4)


if __name__ == "__main__":
    {"products": products, "sharded_mlp": sharded_mlp}[sys.argv[1]](sys.argv[2])
