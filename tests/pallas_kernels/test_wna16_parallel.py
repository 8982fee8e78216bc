"""Column and row parallel products on eight devices against the float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from wna16_cases import Weight, assert_close

from pallas_kernels import wna16
from pallas_kernels.wna16_parallel import column_parallel, row_parallel, weight_specs


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def operands(weight: Weight, layout: str):
    codes, scale, zero = weight.operands()
    if layout == "tpu":
        codes = wna16.to_tpu_layout(codes, bits=weight.bits)
        scale = wna16.scale_to_kernel_layout(scale, weight.n)
        zero = None if zero is None else wna16.scale_to_kernel_layout(zero, weight.n)
    return codes, scale, zero


CASES = [
    ("canonical", Weight(24, 256, 4, groups=8, asymmetric=True)),
    ("canonical", Weight(24, 256, 3, groups=4)),
    ("canonical", Weight(24, 256, 4, per_tensor=True)),
    ("tpu", Weight(24, 256, 4, groups=8, asymmetric=True)),
    ("tpu", Weight(24, 256, 8)),
]


@pytest.mark.parametrize(("layout", "weight"), CASES)
@pytest.mark.parametrize("parallel", [column_parallel, row_parallel])
def test_values_and_gradients_on_eight_devices(mesh, parallel, layout, weight):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, 3, weight.k)).astype(np.float32)
    ct = rng.normal(size=(4, 3, weight.n)).astype(np.float32)
    codes, scale, zero = operands(weight, layout)

    def run(x, scale):
        return parallel(
            x, codes, scale, zero, mesh=mesh, axis="model", batch_axes=("data",),
            bits=weight.bits, layout=layout,
        )  # fmt: skip

    assert_close(jax.jit(run)(x, scale), x.astype(np.float64) @ weight.dense().T, 1e-5)
    _, back = jax.vjp(jax.jit(run), x, scale)
    dx, dscale = back(jnp.asarray(ct))
    assert_close(dx, ct.astype(np.float64) @ weight.dense(), 1e-5)
    if layout == "tpu":
        dscale = wna16.scale_from_kernel_layout(dscale)
    of_columns = np.einsum("abn,abk->nk", ct, x) * weight.centred()
    expected = of_columns.reshape(weight.n, weight.groups, -1).sum(-1)
    if weight.per_tensor:
        expected = expected.sum(0, keepdims=True)
    assert_close(dscale, expected, 1e-5)


def test_packed_weights_stay_where_they_are(mesh):
    """A column then a row parallel layer: one sum over devices, nothing gathered."""
    up, down = Weight(64, 128, 4, groups=4), Weight(32, 256, 4, groups=8)

    def place(v, spec):
        return jax.device_put(v, NamedSharding(mesh, spec))

    up_operands = up.operands()[:2]
    down_operands = down.operands()[:2]
    # A device's 64 rows of `up` feed its 64 columns of `down`.
    up4 = [jnp.concatenate([v] * 4) for v in up_operands]
    up4 = [
        place(v, s) for v, s in zip(up4, weight_specs((*up4, None), "model", None), strict=False)
    ]
    down4 = [
        place(v, s)
        for v, s in zip(down_operands, weight_specs((*down_operands, None), None, "model"))
    ]
    x = place(np.ones((4, 128), np.float32), PartitionSpec("data"))

    def mlp(x, up, down):
        options = {"bits": 4, "mesh": mesh, "axis": "model", "batch_axes": ("data",)}
        return row_parallel(jnp.tanh(column_parallel(x, *up, **options)), *down, **options)

    compiled = jax.jit(mlp).lower(x, up4, down4).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert text.count("all-reduce(") + text.count("all-reduce-start(") == 1
    expected = np.tanh(np.ones((4, 128)) @ np.tile(up.dense(), (4, 1)).T) @ down.dense().T
    assert_close(compiled(x, up4, down4), expected, 1e-5)


def test_sums_over_devices_are_float32(mesh):
    """Parts that cancel: in bfloat16 each would lose what remains."""
    weight = Weight(8, 256, 4, groups=8)
    x = jnp.ones((1, 256), jnp.bfloat16)
    text = str(
        jax.make_jaxpr(
            lambda x: row_parallel(x, *weight.operands(), bits=4, mesh=mesh, axis="model")
        )(x)
    )
    (line,) = [line for line in text.splitlines() if "psum" in line]
    assert "f32" in line.split("=")[0]


def test_a_part_that_breaks_a_group_is_refused(mesh):
    weight = Weight(8, 384, 4, groups=3)
    with pytest.raises(ValueError, match="multiple of 128; group_size 32 would divide it"):
        row_parallel(np.ones((1, 384)), *weight.operands(), bits=4, mesh=mesh, axis="model")
    with pytest.raises(ValueError, match="N = 6 does not split over 4"):
        column_parallel(
            np.ones((1, 32)), *Weight(6, 32, 4).operands(), bits=4, mesh=mesh, axis="model"
        )
