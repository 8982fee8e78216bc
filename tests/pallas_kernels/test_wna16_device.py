"""Every implementation on a real CUDA device; run by ``launch/gpu_check.sh``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wna16_cases import Weight, assert_close

pytestmark = pytest.mark.gpu

KERNEL_CASES = [
    (m, Weight(n, k, bits, groups, "bfloat16", asymmetric))
    for m in (1, 7, 16, 64, 128)
    for n, k, bits, groups, asymmetric in (
        (256, 512, 4, 4, False),
        (128, 1408, 4, 11, True),
        (384, 256, 4, 4, False),
        (256, 512, 4, 1, True),
        (256, 512, 8, 4, True),
    )
]


@pytest.fixture(scope="module", autouse=True)
def device():
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("no CUDA device")
    with jax.default_device(device):
        yield device


def inputs(weight, transpose=False, m=3, dtype="bfloat16"):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(m, weight.n if transpose else weight.k)), dtype)


@pytest.mark.parametrize(("m", "weight"), KERNEL_CASES, ids=str)
@pytest.mark.parametrize("layout", ["canonical", "gpu"])
def test_the_hopper_kernel(device, m, weight, layout):
    if not device.compute_capability.startswith("9"):
        pytest.skip("the kernel is Hopper's")
    x = inputs(weight, m=m)
    options = {"implementation": "mosaic_gpu", "preferred_element_type": "float32"}
    y = jax.jit(lambda x: weight.matmul(x, layout, **options))(x)
    assert_close(y, np.asarray(x, np.float64) @ weight.dense().T, 1e-4)


@pytest.mark.parametrize("implementation", [None, "reference", "xla"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_form_and_width(implementation, transpose, dtype, bits):
    for n, k in ((33, 96), (768, 640)):
        weight = Weight(n, k, bits, groups=k // 32, dtype=dtype, asymmetric=bits % 2 == 0)
        x = inputs(weight, transpose, dtype=dtype)
        y = weight.matmul(
            x, transpose=transpose, implementation=implementation, precision="highest"
        )
        expected = np.asarray(x, np.float64) @ (weight.dense() if transpose else weight.dense().T)
        assert_close(y, expected, 1e-5 if dtype == "float32" else 2e-2)


def test_gradients_behind_the_kernel():
    weight = Weight(256, 512, 4, groups=4, dtype="bfloat16")
    x, c = inputs(weight, m=16), inputs(weight, True, m=16)
    _, back = jax.vjp(lambda x, s: weight.matmul(x, scale=s), x, weight.scale)
    dx, dscale = back(c)
    assert_close(dx, np.asarray(c, np.float64) @ weight.dense(), 2e-2)
    outer = np.asarray(c, np.float64).T @ np.asarray(x, np.float64) * weight.centred()
    assert_close(dscale, outer.reshape(256, 4, -1).sum(-1), 2e-2)
