"""The weight-only quantized product against float64 NumPy, its derivatives, its refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from wna16_cases import Weight, assert_close

from pallas_kernels import packing, wna16, wna16_xla

TOLERANCE = {"float32": 2e-6, "float16": 3e-3, "bfloat16": 2e-2}
LARGE = [
    Weight(512, 512, 4, groups=4, asymmetric=True),
    Weight(1021, 640, 3, groups=5, dtype="bfloat16"),  # a prime: the last chunk is smaller
    Weight(768, 512, 8, per_tensor=True),
]


@st.composite
def weights(draw, bits=None):
    """Weights of a few groups of any size, of any width or those drawn from ``bits``."""
    per_tensor = draw(st.booleans())
    count, size = draw(st.integers(1, 12)), draw(st.sampled_from([1, 8, 25, 32]))
    return Weight(
        n=draw(st.integers(1, 40)),
        k=count * size,
        bits=draw(st.integers(1, 8) if bits is None else bits),
        groups=1 if per_tensor or draw(st.booleans()) else count,
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        asymmetric=draw(st.booleans()),
        per_tensor=per_tensor,
        seed=draw(st.integers(0, 2**31)),
    )


def inputs(weight: Weight, transpose: bool, lead=(3,), dtype="float32", seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(*lead, weight.n if transpose else weight.k)), dtype)


def magnitude(weight: Weight, x, transpose: bool) -> np.ndarray:
    """The size of an entry of the product were its terms of random sign; none cancels this."""
    squares = weight.dense() ** 2
    return np.sqrt(np.asarray(x, np.float64) ** 2 @ (squares if transpose else squares.T))


def expected(weight: Weight, x, transpose: bool) -> np.ndarray:
    return np.asarray(x, np.float64) @ (weight.dense() if transpose else weight.dense().T)


@settings(max_examples=20)
@given(
    weight=weights(),
    transpose=st.booleans(),
    lead=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    implementation=st.sampled_from([None, "reference", "xla"]),
)
def test_any_weight_any_input(weight, transpose, lead, dtype, implementation):
    x = inputs(weight, transpose, lead, dtype)
    options = {"transpose": transpose, "implementation": implementation}
    y = jax.jit(lambda x: weight.matmul(x, **options))(x)
    assert y.dtype == jnp.promote_types(x.dtype, weight.dtype)
    tolerance = max(TOLERANCE[dtype], TOLERANCE[weight.dtype])
    assert_close(y, expected(weight, x, transpose), tolerance, magnitude(weight, x, transpose))


@given(weight=weights(bits=st.sampled_from([4, 8])), transpose=st.booleans(), m=st.integers(1, 4))
@settings(max_examples=5)
def test_the_tpu_layout_holds_the_same_weight(weight, transpose, m):
    x = inputs(weight, transpose, (m,))
    options = {"transpose": transpose, "implementation": "xla"}
    y = jax.jit(lambda x: weight.matmul(x, "tpu", **options))(x)
    tolerance = TOLERANCE[weight.dtype]
    assert_close(y, expected(weight, x, transpose), tolerance, magnitude(weight, x, transpose))
    words = wna16.to_tpu_layout(weight.codes, bits=weight.bits)
    np.testing.assert_array_equal(wna16.from_tpu_layout(words, bits=weight.bits), weight.codes)
    # Signed two's complement fields, consecutive columns k in one word, from the lowest bits.
    fields = packing.unpack(words.T, weight.bits, weight.k).astype(np.int32)
    signed = np.where(fields < 2 ** (weight.bits - 1), fields, fields - 2**weight.bits)
    np.testing.assert_array_equal(signed, weight.u.astype(int) - 2 ** (weight.bits - 1))


@given(
    n=st.integers(1, 300),
    groups=st.integers(1, 6),
    unit=st.sampled_from([32, 64, 128]),
    bits=st.sampled_from([4, 8]),
    asymmetric=st.booleans(),
    transpose=st.booleans(),
    layout=st.sampled_from(["canonical", "tpu"]),
    m=st.sampled_from([1, 5, 16, 128, 300]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
@settings(max_examples=12)
def test_the_tpu_kernel_interpreted(n, groups, unit, bits, asymmetric, transpose, layout, m, dtype):
    weight = Weight(n, groups * unit, bits, groups, dtype, asymmetric)
    x = inputs(weight, transpose, (m,), dtype)
    options = {"transpose": transpose, "implementation": "mosaic_tpu", "interpret": True}
    options["preferred_element_type"] = "float32"
    y = jax.jit(lambda x: weight.matmul(x, layout, **options))(x)
    assert_close(y, expected(weight, x, transpose), 1e-2, magnitude(weight, x, transpose))


@pytest.mark.parametrize("k", [70, 11008])
def test_the_tpu_kernel_pads_and_blocks_the_contracted_axis(k):
    groups = 1 if k % 128 else k // 128
    weight = Weight(136, k, 4, groups, "bfloat16")
    for transpose in (False, True):
        x = inputs(weight, transpose, (4,), "bfloat16")
        options = {"transpose": transpose, "implementation": "mosaic_tpu", "interpret": True}
        assert_close(weight.matmul(x, **options), expected(weight, x, transpose), 1e-2)


@pytest.mark.parametrize("weight", LARGE, ids=str)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("m", [1, 3])
def test_large_weights_and_their_gradients(weight, transpose, m):
    """Gradients in closed form: with L = sum(c * y), dx = c W and ds = sum of (c x)(u - z)."""
    x = inputs(weight, transpose, (m,))
    c = inputs(weight, not transpose, (m,), seed=2)
    y, back = jax.vjp(lambda x, s: weight.matmul(x, scale=s, transpose=transpose), x, weight.scale)
    tolerance = TOLERANCE[weight.dtype]
    assert_close(y, expected(weight, x, transpose), tolerance)
    dx, dscale = back(c.astype(y.dtype))
    assert_close(dx, expected(weight, c, not transpose), tolerance)
    of_rows, of_columns = (x, c) if transpose else (c, x)
    outer = np.asarray(of_rows, np.float64).T @ np.asarray(of_columns, np.float64)
    of_groups = (outer * weight.centred()).reshape(weight.n, weight.groups, -1).sum(-1)
    if weight.per_tensor:
        of_groups = of_groups.sum(0, keepdims=True)
    assert dscale.dtype == weight.scale.dtype
    assert_close(dscale, of_groups, tolerance)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_derivatives_of_first_and_second_order(transpose, asymmetric):
    weight = Weight(5, 48, 3, groups=3, asymmetric=asymmetric)
    x = inputs(weight, transpose, (2,))

    def f(x, scale):
        return jnp.sin(weight.matmul(x, scale=scale, transpose=transpose)).sum()

    check_grads(f, (x, weight.scale), order=2, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2)


def test_jvp_linearize_remat_and_disabled_jit_agree():
    weight = Weight(16, 64, 4, groups=2)
    x, dx = inputs(weight, False), inputs(weight, False, seed=3)
    dscale = jnp.ones_like(weight.scale)

    def f(x, s):
        return weight.matmul(x, scale=s)

    y, dy = jax.jvp(f, (x, weight.scale), (dx, dscale))
    ones = Weight(16, 64, 4, groups=2)
    object.__setattr__(ones, "scale", dscale)
    assert_close(dy, expected(weight, dx, False) + expected(ones, x, False), 1e-5)
    y2, linear = jax.linearize(f, x, weight.scale)
    np.testing.assert_array_equal(y, y2)
    np.testing.assert_allclose(dy, linear(dx, dscale), rtol=1e-5)

    def loss(f):
        return jax.grad(lambda x: jnp.sum(f(x, weight.scale) ** 2))(x)

    np.testing.assert_allclose(loss(f), loss(jax.checkpoint(f)), rtol=1e-6)
    with jax.disable_jit():
        np.testing.assert_allclose(f(x, weight.scale), y, rtol=1e-6)


def test_codes_have_a_gradient_without_values():
    weight = Weight(4, 32, 4)
    grad = jax.grad(
        lambda x, codes: wna16.wna16_matmul(x, codes, weight.scale, bits=4).sum(),
        argnums=(0, 1),
        allow_int=True,
    )(inputs(weight, False), weight.codes)
    assert grad[1].dtype == jax.dtypes.float0


@pytest.mark.parametrize("implementation", [None, "mosaic_tpu"])
@pytest.mark.parametrize(("n", "k"), [(24, 64), (513, 512)])
def test_vmap_over_inputs_experts_and_scales(implementation, n, k):
    if implementation and n > 100:
        pytest.skip("interpreting large kernels shows nothing new")
    options = {"implementation": implementation, "interpret": implementation is not None}
    experts = [Weight(n, k, 4, groups=2, asymmetric=True, seed=s) for s in range(3)]
    codes, scale, zero = (jnp.stack(v) for v in zip(*(w.operands() for w in experts)))

    def matmul(x, c, s, z):
        return wna16.wna16_matmul(x, c, s, z, bits=4, **options)

    x = jnp.stack([inputs(w, False, (2,), seed=i) for i, w in enumerate(experts)])
    tolerance = 1e-2 if implementation else 1e-5
    one = jax.vmap(matmul, (1, None, None, None), 1)(x, codes[0], scale[0], zero[0])
    assert_close(one, expected(experts[0], x, False), tolerance)
    each = jax.vmap(matmul)(x, codes, scale, zero)
    assert_close(each, np.stack([expected(w, v, False) for w, v in zip(experts, x)]), tolerance)
    same_x = jax.vmap(matmul, (None, 0, 0, 0))(x[0], codes, scale, zero)
    assert_close(same_x, np.stack([expected(w, x[0], False) for w in experts]), tolerance)
    nested = jax.vmap(jax.vmap(matmul, (0, None, None, None)))(x, codes, scale, zero)
    np.testing.assert_allclose(nested, each, rtol=1e-3, atol=1e-5)
    grads = jax.vmap(jax.grad(lambda s, x, c, z: matmul(x, c, s, z).sum()))(scale, x, codes, zero)
    alone = jax.grad(lambda s: matmul(x[1], codes[1], s, zero[1]).sum())(scale[1])
    np.testing.assert_allclose(grads[1], alone, rtol=1e-3, atol=1e-4)


def test_scan_over_stacked_layers():
    layers = [Weight(64, 64, 4, groups=2, seed=s) for s in range(3)]
    codes, scale = (jnp.stack(v) for v in list(zip(*(w.operands() for w in layers)))[:2])
    x = inputs(layers[0], False)

    def loss(scale):
        def step(x, w):
            return (jnp.tanh(wna16.wna16_matmul(x, w[0], w[1], bits=4)), None)

        return jax.lax.scan(step, x, (codes, scale))[0].sum()

    y = np.asarray(x, np.float64)
    for w in layers:
        y = np.tanh(y @ w.dense().T)
    np.testing.assert_allclose(jax.jit(loss)(scale), y.sum(), rtol=1e-5)
    check_grads(loss, (scale,), order=1, modes=("rev",), atol=1e-2, rtol=1e-2)


def test_casts_and_result_types_are_those_of_decoding_first():
    weight = Weight(16, 64, 4, groups=2, dtype="float32")
    x = inputs(weight, False, dtype="bfloat16")
    y = weight.matmul(x, casts=("bfloat16",))
    dense = (weight.centred().astype(np.float32) * weight._columns(weight.scale)).astype("float32")
    dense = jnp.asarray(dense).astype("bfloat16")
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.matmul(x, dense.T))
    wide = weight.matmul(x, casts=("bfloat16",), preferred_element_type="float32")
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide, jnp.matmul(x, dense.T, preferred_element_type="float32"))


def values_of(jaxpr):
    """Every value computed in a jaxpr and in those nested in it."""
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        for param in jax.tree.leaves(
            eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from values_of(inner)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_no_value_on_a_cpu_has_the_size_of_the_dense_weight(bits, batch):
    """Forward, transposed and both gradients; of what is lowered, not of the opaque primitive."""
    n = k = 512
    spec = Weight(1, 1, bits).spec(k=k, casts=("float32",))
    transposed = dataclasses.replace(spec, transpose=True)

    def operand(shape, dtype="float32"):
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    codes = operand((n, packing.packed_words(k, bits)), "int32")
    scale, x = operand((n, 4), "bfloat16"), operand((2, k))
    programs = [
        jax.make_jaxpr(lambda *a: wna16_xla.product(*a, spec=spec, platform="cpu"))(
            x, scale, codes
        ),
        jax.make_jaxpr(lambda *a: wna16_xla.product(*a, spec=transposed, platform="cpu"))(
            x, scale, codes
        ),
        jax.make_jaxpr(lambda *a: wna16_xla.scale_gradient(*a, spec=spec, groups=4))(x, x, codes),
    ]
    for program in programs:
        sizes = [v.size for v in values_of(program.jaxpr)]
        assert max(sizes) < n * k
        assert max(sizes) > n * k // 16  # the chunks were seen: the walk enters the loop


@pytest.mark.parametrize("n", [512, 515])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("transpose", [False, True])
def test_weights_that_are_constants_of_the_program(n, bits, transpose):
    """XLA folds a bitcast of constant words to uint4 to wrong values."""
    weight = Weight(n, 512, bits, groups=4)
    x = inputs(weight, transpose)
    y = jax.jit(lambda x: weight.matmul(x, transpose=transpose))(x)
    assert_close(y, expected(weight, x, transpose), 1e-5)


def test_compiled_memory_and_residuals_hold_no_dense_weight():
    weight = Weight(1024, 1024, 4, groups=8)
    x = inputs(weight, False, (2,))

    def loss(x, scale, codes):
        return jnp.sum(wna16.wna16_matmul(x, codes, scale, bits=4) ** 2)

    step = jax.jit(jax.grad(loss, (0, 1)))
    compiled = step.lower(x, weight.scale, weight.codes).compile()
    dense = 4 * weight.n * weight.k
    assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * dense
    _, back = jax.vjp(lambda x, s: loss(x, s, weight.codes), x, weight.scale)
    assert sum(v.nbytes for v in jax.tree.leaves(back)) < dense / 4


def test_a_small_weight_lowers_to_few_operations():
    """No more than decoding by hand and one product: deep models must compile fast."""
    weight = Weight(64, 64, 4, groups=2)
    x = inputs(weight, False)

    def by_hand(x, codes, scale):
        u = packing.unpack(codes, 4).astype(jnp.float32).reshape(64, 2, 32)
        return x @ ((u - 8) * scale[..., None]).reshape(64, 64).T

    def count(f):
        return jax.jit(f).lower(x, weight.codes, weight.scale).as_text().count("stablehlo.")

    ours = count(lambda x, c, s: wna16.wna16_matmul(x, c, s, bits=4))
    assert ours <= count(by_hand) + 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "cuda"}, "layout 'cuda' is none of canonical, tpu, gpu"),
        ({"implementation": "triton"}, "is none of reference, xla"),
        ({"contracted": 20}, "do not hold 20 columns"),
        ({"transpose": True}, r"does not fit W \[6, 64\] with transpose=True"),
        ({"scale": jnp.ones((6, 3))}, "G a divisor of K"),
        ({"scale": jnp.ones((5, 1))}, "G a divisor of K"),
        ({"zero_point": jnp.ones((6, 1), jnp.uint8)}, "differ in their number of groups"),
        ({"codes": jnp.ones((1, 6, 8), jnp.int32)}, "use jax.vmap"),
        ({"bits": 9}, "1 to 8 bits"),
    ],
)
def test_bad_arguments_are_named(change, message):
    weight = Weight(6, 64, 4, groups=2)
    arguments = {"codes": weight.codes, "scale": weight.scale, "bits": 4, **change}
    with pytest.raises(ValueError, match=message):
        wna16.wna16_matmul(jnp.ones((1, 64)), **arguments)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (Weight(8, 64, 3), {}, "4 and 8 bits, not 3"),
        (Weight(8, 64, 4), {"precision": "highest"}, "at highest"),
        (Weight(8, 64, 4, dtype="float16"), {}, "bfloat16"),
        (Weight(8, 64, 4, groups=8), {}, "multiples of 32, not 8"),
    ],
)
def test_a_named_kernel_says_what_it_does_not_take(weight, options, message):
    x = inputs(weight, False, dtype=weight.dtype)
    with pytest.raises(NotImplementedError, match=message):
        weight.matmul(x, implementation="mosaic_tpu", interpret=True, **options)


def test_the_default_precision_of_the_program_is_heard():
    weight = Weight(8, 64, 4)
    with (
        jax.default_matmul_precision("highest"),
        pytest.raises(NotImplementedError, match="at highest"),
    ):
        weight.matmul(inputs(weight, False), implementation="mosaic_tpu", interpret=True)


@given(weight=weights(bits=st.sampled_from([1, 2, 4, 8])), transpose=st.booleans())
@settings(max_examples=6)
def test_the_form_by_planes(weight, transpose):
    """The TPU's XLA form, run on the CPU."""
    assume(weight.k // weight.groups % (32 // weight.bits) == 0)
    x = inputs(weight, transpose)[None]
    operands, spec = weight.batch_of_one(), weight.spec(transpose=transpose)
    y = jax.jit(lambda *a: wna16_xla.product_by_planes(*a, spec=spec))(x, *operands)[0]
    x, tolerance = x[0], TOLERANCE[weight.dtype]
    assert_close(y, expected(weight, x, transpose), tolerance, magnitude(weight, x, transpose))
