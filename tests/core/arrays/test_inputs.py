"""Weights with rounded inputs: against compressed-tensors, PyTorch, and sums of whole numbers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.checkpoints.native import read_native, write_native
from jaxcompress.core.arrays.affine import encode_affine, minmax_range
from jaxcompress.core.arrays.base import dims_of
from jaxcompress.core.arrays.inputs import QuantizedInput, fake_quantize_input, scale_of_range
from jaxcompress.core.arrays.sharding import place
from jaxcompress.core.errors import InputError

torch = pytest.importorskip("torch")


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def int8(matrix, bits=8, groups=1, symmetric=True, per_tensor=False, **fields):
    matrix = jnp.asarray(matrix)
    scale, zero = minmax_range(
        matrix, bits=bits, groups=groups, symmetric=symmetric, per_tensor=per_tensor
    )
    return encode_affine(matrix, scale, zero, bits=bits, **fields)


# ------------------------------------------------------------------- rounding as its owner rounds


def args_of(name, **fields):
    from compressed_tensors.quantization import QuantizationArgs

    kind = "float" if name == "fp8" else "int"
    return QuantizationArgs(num_bits=4 if name == "int4" else 8, type=kind, **fields)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize(
    ("name", "symmetric"),
    [("int8", True), ("int8", False), ("int4", True), ("int4", False), ("fp8", True)],
)
def test_rounds_bit_for_bit_as_compressed_tensors(name, symmetric, granularity, dtype):
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

    x = (random(2, 9, 64) * np.exp2(random(2, 9, 1, seed=1) * 3)).astype(np.float32)
    x[0, 3] = 0
    theirs = torch.tensor(x).to(getattr(torch, dtype))
    args = args_of(name, symmetric=symmetric, strategy=granularity, dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(theirs, args, None)
    want = fake_quantize(theirs, scale, zero, args)
    leaf = QuantizedInput.of(
        int8(random(8, 64)), input_dtype=name, symmetric=symmetric, granularity=granularity
    )
    rounded = jax.jit(lambda leaf, x: leaf.rounded(x, (-1,)))
    got = rounded(leaf, jnp.asarray(x, dtype))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(jnp.float32), want.float().numpy())

    # The same scale, found beforehand.
    if granularity == "tensor":
        shape = {"input_scale": jnp.asarray(scale.float().numpy(), dtype).reshape(1, 1)}
        if not symmetric:
            middle = 8 if name == "int4" else 128
            shape["input_zero_point"] = jnp.asarray(zero.numpy().astype(int) + middle, jnp.uint8)
            shape["input_zero_point"] = shape["input_zero_point"].reshape(1, 1)
        np.testing.assert_array_equal(rounded(leaf.replace(**shape), jnp.asarray(x, dtype)), got)


def test_e5m2_and_what_is_too_large():
    scale = jnp.full((1, 1), 0.5, jnp.float32)
    x = np.concatenate([random(1, 500) * 1e3, [[1e9, -1e9, 0.0, 3e-6]]], axis=1).astype(np.float32)
    for name, dtype, top in (
        ("fp8", ml_dtypes.float8_e4m3fn, 448),
        ("fp8_e5m2", ml_dtypes.float8_e5m2, 57344),
    ):
        got = fake_quantize_input(jnp.asarray(x), scale, None, (name, True, True))
        want = np.clip(x / 0.5, -top, top).astype(dtype).astype(np.float32) * 0.5
        np.testing.assert_array_equal(got, want)


# ----------------------------------------------------------------------------- whole numbers


@pytest.mark.parametrize("granularity", ["token", "tensor", "static"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "per_tensor"), [(8, False), (4, False), (8, True)])
def test_integers_are_multiplied_and_summed_exactly(bits, per_tensor, symmetric, granularity):
    x, weight = random(2, 7, 96), int8(random(2, 12, 96, seed=1), bits, per_tensor=per_tensor)
    static = granularity == "static"
    leaf = QuantizedInput.of(
        weight, symmetric=symmetric, granularity="tensor" if static else granularity
    )
    if static:
        ends = (jnp.full((2, 1, 1), end) for end in (x.min() / 2, x.max() / 2))
        scale, zero = scale_of_range(*ends, "int8", symmetric)
        leaf = leaf.replace(input_scale=scale, input_zero_point=zero)
    multiply = jax.jit(lambda leaf, x: leaf.product(x, "k"))
    text = str(jax.make_jaxpr(multiply)(leaf, x))
    assert "preferred_element_type=int32" in text
    assert "i8[2,7,96]" in text

    scale, zero = (None if s is None else np.asarray(s) for s in leaf.scales(jnp.asarray(x), (-1,)))
    zero = 128 if zero is None else zero.astype(np.int64)
    q_x = np.clip(np.rint(x / scale + (zero - 128)), -128, 127).astype(np.int64) - (zero - 128)
    q_w = np.asarray(weight.integers()).astype(np.int64) - 2 ** (bits - 1)
    total = (q_x @ q_w.swapaxes(-1, -2)).astype(np.float32)  # 64-bit integers, rounded once
    want = total * (scale * np.asarray(weight.scale).swapaxes(-1, -2))
    np.testing.assert_array_equal(multiply(leaf, x), want)


def test_other_weights_are_multiplied_as_floats():
    x = jnp.asarray(random(7, 96))
    for weight in (
        int8(random(12, 96), 4, groups=3),
        int8(random(12, 96), symmetric=False),
        jnp.asarray(random(12, 96)),
    ):
        leaf = QuantizedInput.of(weight)
        assert "preferred_element_type=int32" not in str(
            jax.make_jaxpr(lambda leaf, x: leaf.product(x, "k"))(leaf, x)
        )
        want = np.asarray(leaf.rounded(x, (-1,)), np.float64) @ np.asarray(leaf.decode()).T
        np.testing.assert_allclose(leaf.product(x, "k", precision="highest"), want, atol=1e-4)


# -------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(
    ("name", "zero"), [("int8", None), ("int4", None), ("int4", 5), ("fp8", None)]
)
def test_the_gradient_of_the_scale_is_that_of_the_surrogate(name, zero, normalized):
    """Differences, in float64, of s * (clip(x / s) + what rounding adds where s is now)."""
    x, gradient = random(5, 64) * 4, random(5, 64, seed=1)
    bits, low, high = {
        "int8": (8, -128, 127), "int4": (4, -8, 7), "fp8": (0, -448, 448)
    }[name]  # fmt: skip
    if zero is not None:
        low, high = -zero, 15 - zero
    scale = np.float32(6.0 / high)  # some are clipped
    point = None if zero is None else jnp.full((1, 1), zero, jnp.uint8)

    def ours(x, scale):
        spec = (name, True, normalized)
        return jnp.sum(fake_quantize_input(x, scale, point, spec) * gradient)

    dx, ds = jax.jit(jax.grad(ours, (0, 1)))(jnp.asarray(x), jnp.full((1, 1), scale))
    steps = x / scale
    clipped = np.clip(steps, low, high)
    near = clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) if name == "fp8" else None
    near = np.rint(clipped) if near is None else near
    inside = (low < steps) & (steps < high)
    added = np.where(inside, near - clipped, 0)

    def surrogate(s):
        return np.sum(s * (np.clip(x.astype(np.float64) / s, low, high) + added) * gradient)

    s = float(scale)
    slope = (surrogate(s * (1 + 1e-7)) - surrogate(s * (1 - 1e-7))) / (2e-7 * s)
    if normalized:
        largest = 448 if name == "fp8" else 2 ** (bits - (zero is None)) - 1
        slope /= np.sqrt(64 * largest)
    assert 0 < (~inside).sum() < inside.sum()
    np.testing.assert_allclose(ds, slope, rtol=2e-3, atol=1e-5)
    np.testing.assert_array_equal(dx, np.where(inside, gradient, 0))


def test_gradients_of_the_integer_product_are_those_of_floats():
    x, weight = jnp.asarray(random(7, 96)), int8(random(12, 96, seed=1))
    leaf = QuantizedInput.of(weight, input_scale=jnp.full((1, 1), 0.02), granularity="tensor")
    trainable, frozen = jc.split({"w": leaf}, "scales")

    def loss(trainable, x, multiply):
        leaf = jc.merge(trainable, frozen)["w"]
        return jnp.sum(jnp.sin(multiply(leaf, x)))

    def integers(leaf, x):
        return leaf.product(x, "k")

    def floats(leaf, x):
        spec = ("int8", True, True)
        return fake_quantize_input(x, leaf.input_scale, None, spec) @ leaf.decode().T

    mine = jax.grad(loss, (0, 1))(trainable, x, integers)
    theirs = jax.grad(loss, (0, 1))(trainable, x, floats)
    assert len(jax.tree.leaves(mine)) == 3  # scales of weight and of input, and x
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
    tangent = jax.jvp(lambda x: integers(leaf, x), (x,), (jnp.ones_like(x),))[1]
    inside = np.abs(np.asarray(x)) < 0.02 * 127
    np.testing.assert_allclose(tangent, inside @ np.asarray(leaf.decode()).T, atol=1e-4)


# ------------------------------------------------------------------------------ in programs


def rounded_rows(x):
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127.5)
    return np.clip(np.rint(x / scale), -128, 127) * scale


def test_a_scan_over_stacked_layers_and_vmap():
    weights = int8(random(3, 48, 48) / 7)
    leaf = QuantizedInput.of(weights)
    x = random(2, 5, 48, seed=1)

    def model(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    want = x
    for layer in np.asarray(weights.decode()):
        want = np.tanh(rounded_rows(want) @ layer.T)
    got = jax.jit(jc.lift(model))({"w": leaf}, x)
    np.testing.assert_allclose(got, want, atol=2e-2)  # a flipped code moves what comes after
    assert np.mean(np.abs(np.asarray(got) - want)) < 1e-3
    assert not jc.materialized(model)({"w": leaf}, x)
    each = jax.vmap(lambda leaf: leaf.product(jnp.asarray(x[0]), "k"))(leaf)
    for i in range(3):
        np.testing.assert_allclose(each[i], leaf[i].product(jnp.asarray(x[0]), "k"), atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("layout", ["NHWC", "CHWN"])
def test_convolutions_round_with_one_scale_or_one_per_sample(layout, static, groups):
    x, kernel = random(2, 6, 6, 8), random(3, 3, 8 // groups, 12, seed=1)
    dims = dims_of(kernel.shape, (0, 1, 2))
    stored = kernel.reshape(-1, 12).T
    fields = {"input_scale": jnp.full((1, 1), 0.02), "granularity": "tensor"} if static else {}
    leaf = QuantizedInput.of(int8(stored, dims=dims), **fields)

    def model(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (2, 2), [(1, 1), (1, 1)],
            dimension_numbers=(layout, "HWIO", layout), feature_group_count=groups,
        )  # fmt: skip

    scale = np.float32(0.02) if static else (
        np.abs(x).max((1, 2, 3), keepdims=True) / np.float32(127.5)
    )  # fmt: skip
    rounded = np.clip(np.rint(x / scale), -128, 127) * scale
    want = torch.nn.functional.conv2d(
        torch.tensor(rounded.transpose(0, 3, 1, 2)),
        torch.tensor(np.asarray(leaf.dense()).transpose(3, 2, 0, 1)),
        stride=2, padding=1, groups=groups,
    ).numpy()  # fmt: skip
    given = x if layout == "NHWC" else x.transpose(3, 1, 2, 0)
    got = jax.jit(jc.lift(model))({"w": leaf}, given)
    got = np.asarray(got).transpose((0, 3, 1, 2) if layout == "NHWC" else (3, 0, 1, 2))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
    dense = leaf.replace(weight=leaf.weight.decode())
    again = np.asarray(jc.lift(model)({"w": dense}, given))
    again = again.transpose((0, 3, 1, 2) if layout == "NHWC" else (3, 0, 1, 2))
    np.testing.assert_allclose(again, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("spec", [P("k", "n"), P(None, ("k", "n")), P("k")])
@pytest.mark.parametrize("groups", [1, 4])
def test_on_a_mesh_it_is_the_same_product(spec, groups):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("k", "n"))
    leaf = QuantizedInput.of(int8(random(16, 256), 8, groups=groups))
    x = random(8, 256, seed=1)

    def model(params, x):
        return x @ params["w"]

    placed = place({"w": leaf}, NamedSharding(mesh, spec))
    got = jax.jit(jc.lift(model))(placed, x)
    np.testing.assert_allclose(got, jc.lift(model)({"w": leaf}, x), rtol=1e-5, atol=1e-5)


def test_written_and_read_back(tmp_path):
    static = {"input_scale": jnp.full((1, 1), 0.02), "granularity": "tensor"}
    params = {
        "a": QuantizedInput.of(int8(random(8, 64)), input_dtype="int4"),
        "b": QuantizedInput.of(jnp.asarray(random(8, 64)), input_dtype="fp8", **static),
    }
    write_native(tmp_path / "out", params)
    back = read_native(tmp_path / "out")
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_half_precision_comes_out_in_the_dtype_asked_for():
    leaf = QuantizedInput.of(int8(random(8, 64)))
    x = jnp.asarray(random(3, 64), jnp.bfloat16)
    out = jc.lift(lambda p, x: x @ p.astype(jnp.bfloat16))(leaf, x)
    assert out.dtype == jnp.bfloat16
    want = np.asarray(leaf.rounded(x, (-1,)), np.float32) @ np.asarray(leaf.decode()).T
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=1e-2, atol=0.1)


def test_refusals():
    with pytest.raises(InputError, match="activations 'int9': use one of int2"):
        QuantizedInput.of(int8(random(8, 64)), input_dtype="int9")
    with pytest.raises(InputError, match="granularity 'row'"):
        QuantizedInput.of(int8(random(8, 64)), granularity="row")
