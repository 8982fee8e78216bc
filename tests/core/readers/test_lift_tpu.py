"""A lifted model compiled for TPUs, on any machine: its products are the kernels."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from lift_cases import affine
from jaxcompress.core.arrays.sharding import shardings_of
from jaxcompress.core.readers.lift import lift

devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
params = {"up": affine(1, 1024, 2048, groups=8), "down": affine(2, 2048, 1024, groups=16)}
params = {name: leaf.with_layout("tpu") for name, leaf in params.items()}
places = {"up": P(None, "model"), "down": P("model", None)}
shardings = {name: NamedSharding(mesh, spec) for name, spec in places.items()}
data = NamedSharding(mesh, P("data"))

def mlp(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]

x = jax.ShapeDtypeStruct((16, 1024), jnp.bfloat16)
abstract = jax.eval_shape(lambda: params)
placed = (shardings_of(abstract, shardings), data)

def texts(fn):
    lowered = jax.jit(fn, in_shardings=placed).lower(abstract, x)
    return lowered.as_text(), lowered.compile().as_text()

cast = lambda p: jax.tree.map(lambda leaf: leaf.replace(casts=("bfloat16",)), p,
                              is_leaf=lambda leaf: hasattr(leaf, "casts"))
_, known = texts(lambda p, x: lift(mlp, shardings=(shardings, data))(cast(p), x))
print("kernels", known.count("tpu_custom_call"), "gathers", known.count(" all-gather("))
_, unknown = texts(lambda p, x: lift(mlp)(cast(p), x))
print("unknown", unknown.count("tpu_custom_call"))
"""


@pytest.mark.aot_tpu
def test_kernels_where_the_partition_is_known_and_plain_xla_where_not():
    pytest.importorskip("libtpu")
    here = os.path.dirname(__file__)
    environment = {**os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([here, environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "kernels 2 gathers 0" in run.stdout
    assert "unknown 0" in run.stdout
