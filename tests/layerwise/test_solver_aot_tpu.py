"""The column solver compiled for a TPU pod that is not there."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxcompress.layerwise.batch import split
from jaxcompress.layerwise.grid import grid_of
from jaxcompress.quantization.gptq import Columns
from jaxcompress.training.aot import compile_program
from jaxcompress.training.mesh import make_mesh
from jaxcompress.training.topology import topology_devices

mesh = make_mesh(2, 2, 2, devices=topology_devices("v5p:2x2x2"))
over_all = NamedSharding(mesh, P(mesh.axis_names))
solver = Columns(grid_of("int", bits=4, group_size=128), act_order=True, damp=0.01, rounds=0)
for columns in (512, 1024):
    shapes = ((256, columns), jnp.bfloat16), ((columns, columns), jnp.float32)
    given = [jax.ShapeDtypeStruct((8, *s), dtype, sharding=over_all) for s, dtype in shapes]
    made = compile_program(split.lower(solver, mesh, mesh.axis_names, *given))
    runs = sum(count.executed for count in made.collectives.values())
    print(json.dumps([made.arguments, made.used, made.lines, runs]))
"""


@pytest.mark.aot_tpu
@pytest.mark.slow
def test_each_chip_solves_its_own_by_a_program_of_one_length():
    pytest.importorskip("libtpu")
    environment = {**os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    short, long = map(json.loads, run.stdout.splitlines())
    for columns, (arguments, used, _, collectives) in ((512, short), (1024, long)):
        moment = 4 * columns**2
        assert collectives == 0
        assert moment + 2 * 256 * columns <= arguments < 1.01 * (moment + 2 * 256 * columns)
        assert used < 5 * moment + 16 * 4 * 256 * columns
    assert long[2] < 1.1 * short[2]
