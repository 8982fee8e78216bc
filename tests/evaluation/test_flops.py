"""FLOPs against closed forms, PyTorch's counter and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiny import write_llama
from torch.utils.flop_counter import FlopCounterMode

import jaxcompress as jc
from jaxcompress.core.flops import flops, flops_of_jaxpr
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers.lift import lift
from jaxcompress.models import ResNetConfig, abstract_params, functions_of

F32 = jnp.float32


def shape(*sizes, dtype=F32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def normal(*sizes, seed=0):
    return np.random.default_rng(seed).normal(size=sizes).astype(np.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("flops") / "llama")


def counted_by_torch(module, *inputs):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_llama_is_two_per_weight_and_attention(llama, scan_layers):
    model = jc.load(llama, scan_layers=scan_layers)
    config, ctx = model.config, 48
    found = flops(model.apply, model.params, shape(1, ctx, dtype=jnp.int32))
    weights = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
        if "kernel" in jax.tree_util.keystr(path)
    )
    # 2 N a token, and query x key and weights x value: 2 * ctx * width each.
    width = config.num_attention_heads * config.head_dim
    attention = config.num_hidden_layers * 2 * 2 * ctx * width
    assert found.total == ctx * (2 * weights + attention)
    assert found.nonzero == found.total


def test_llama_as_torch_counts_it(llama):
    ctx = 40
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")
    want = counted_by_torch(theirs, torch.zeros(2, ctx, dtype=torch.long))
    model = jc.load(llama)
    found = flops(model.apply, model.params, shape(2, ctx, dtype=jnp.int32))
    assert found.total == want


def test_resnet20():
    config = ResNetConfig()
    apply = functions_of(config).apply
    found = flops(apply, abstract_params(config), shape(1, 32, 32, 3))
    first, linear = 32 * 32 * 3 * 16 * 9, 64 * 10
    stage = 6 * 32 * 32 * 16 * 16 * 9
    later = stage * 11 // 12  # the first convolution of a stage reads half of the channels
    assert found.total == 2 * (first + stage + 2 * later + linear)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((6, 4, 3, 3), {"stride": 2, "padding": 1}),
        ((6, 2, 3, 3), {"groups": 2, "padding": 2, "dilation": 2}),
    ],
)
def test_convolutions_as_torch_counts_them(kernel, options):
    x = torch.zeros(3, 4, 15, 15)
    want = counted_by_torch(lambda x: torch.conv2d(x, torch.zeros(kernel), **options), x)

    def fn(w, x):
        pad, dilation = options.get("padding", 0), options.get("dilation", 1)
        return lax.conv_general_dilated(
            x,
            w,
            (options.get("stride", 1),) * 2,
            [(pad, pad)] * 2,
            rhs_dilation=(dilation,) * 2,
            feature_group_count=options.get("groups", 1),
        )

    assert flops(fn, shape(*kernel), shape(*x.shape)).total == want


def test_transposed_convolution_as_torch_counts_it():
    want = counted_by_torch(
        lambda x: torch.conv_transpose2d(x, torch.zeros(4, 6, 3, 3), stride=2),
        torch.zeros(2, 4, 8, 8),
    )

    def fn(w, x):
        names = ("NCHW", "OIHW", "NCHW")
        return lax.conv_transpose(x, w, (2, 2), "VALID", dimension_numbers=names)

    found = flops(fn, shape(6, 4, 3, 3), shape(2, 4, 8, 8))
    assert found.total == want


PRODUCT = 2 * 8 * 8 * 8  # of two [8, 8]
MESH = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def in_scan(w, x):
    return lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]


def in_nested_scan(w, x):
    return lax.scan(lambda x, _: (in_scan(w, x), None), x, None, length=3)[0]


def in_while(w, x):
    return lax.while_loop(lambda x: (x @ w).sum() < 9, lambda x: x @ w @ w, x)


def in_cond(w, x):
    return lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)


@jax.custom_vjp
def custom(w, x):
    return x @ w


custom.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))


def in_shard_map(w, x):
    def body(w, x):
        return lax.psum(x @ w, "tensor")

    specs = (P("tensor", None), P("data", "tensor"))
    return jax.shard_map(body, mesh=MESH, in_specs=specs, out_specs=P("data", None))(w, x)


def in_pallas(w, x):
    def kernel(w, x, out):
        out[...] = x[...] @ w[...]

    return pl.pallas_call(
        kernel,
        out_shape=shape(8, 8),
        cost_estimate=pl.CostEstimate(flops=PRODUCT, bytes_accessed=0, transcendentals=0),
    )(w, x)


PROGRAMS = {
    "jit in jit": (lambda w, x: jax.jit(jax.jit(lambda w, x: x @ w @ w))(w, x), 2),
    "scan": (in_scan, 5),
    "nested scan": (in_nested_scan, 15),
    "while, one step and one test": (in_while, 3),
    "the larger branch": (in_cond, 2),
    "remat": (jax.checkpoint(lambda w, x: x @ w), 1),
    "custom_vjp": (custom, 1),
    "gradient": (lambda w, x: jax.grad(lambda w: (x @ w).sum())(w), 2),
    "vmap": (lambda w, x: jax.vmap(lambda row: row @ w)(x), 1),
    "shard_map, all devices": (in_shard_map, 1),
    "pallas, its estimate": (in_pallas, 1),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_product_is_found(name):
    fn, products = PROGRAMS[name]
    assert flops(fn, shape(8, 8), shape(8, 8)).total == products * PRODUCT


def pruned(*sizes, keep, seed=0):
    draw = np.random.default_rng(seed + 1).random(sizes) < keep
    return normal(*sizes, seed=seed) * draw


def brute_force(x, *weights):
    """Multiplications by a weight that is not zero, one by one."""
    return sum(2 * sum(np.count_nonzero(w[k]) for k in range(len(w)) for _ in x) for w in weights)


def shares(params):
    return {path: np.count_nonzero(x) / x.size for path, x in leaves_with_paths(params)}


def views(p, x):
    return (x.astype(jnp.bfloat16) @ p["a"].astype(jnp.bfloat16).T.reshape(8, 12)).astype(F32)


def scanned(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]


NONZERO = {
    "plain": (lambda p, x: x @ p["a"] @ p["b"], {"a": (8, 12, 0.5), "b": (12, 4, 0.2)}),
    "views": (views, {"a": (12, 8, 0.3)}),
    "fused": (
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1),
        {"a": (8, 12, 0.5), "b": (8, 4, 0.1)},
    ),
    "attention": (lambda p, x: (y := x @ p["a"]) @ y.T @ y, {"a": (8, 8, 0.25)}),
}


@pytest.mark.parametrize("name", NONZERO)
def test_zeros_of_parameters_are_left_out(name):
    fn, sizes = NONZERO[name]
    params = {k: pruned(*s[:-1], keep=s[-1], seed=i) for i, (k, s) in enumerate(sizes.items())}
    x = normal(5, 8)
    found = flops(fn, params, x, shares=shares(params))
    dense = 2 * 2 * 5 * 5 * 8 if name == "attention" else 0  # products without a parameter
    assert found.nonzero == pytest.approx(brute_force(x, *params.values()) + dense)
    assert found.nonzero < found.total


def test_layers_of_a_scan_have_zeros_of_their_own():
    params = {"layers": np.stack([pruned(8, 8, keep=k, seed=i) for i, k in enumerate((1, 0.5, 0))])}
    x = normal(4, 8)
    found = flops(scanned, params, x, shares=shares(params))
    assert found.nonzero == pytest.approx(brute_force(x, *params["layers"]))


def test_a_mask_among_the_parameters_counts_as_zeros():
    params = {"w": normal(8, 8), "mask": (np.random.default_rng(3).random((8, 8)) < 0.4) * 1.0}
    x = normal(4, 8)
    found = flops(lambda p, x: x @ (p["w"] * p["mask"]), params, x, shares=shares(params))
    assert found.nonzero == pytest.approx(brute_force(x, params["w"] * params["mask"]))


def test_a_weight_that_is_shifted_has_no_zeros():
    params = pruned(8, 8, keep=0.5)
    found = flops(lambda w, x: x @ (1 + w), params, normal(4, 8), shares=shares(params))
    assert found.nonzero == found.total


def test_compressed_leaves_are_counted_as_the_dense_ones():
    params = {"a": {"kernel": normal(64, 32)}}
    fn, x = (lambda p, x: x @ p["a"]["kernel"]), shape(3, 64)
    small = jc.quantize(params, bits=4, group_size=32, include="**")
    assert flops(fn, small, x) == flops(fn, params, x)


def test_kernels_of_quantized_products_are_counted():
    """In a jaxpr they are no `dot_general`; gradients of inputs and scales cost as much again."""
    kernel = jc.quantize({"kernel": normal(1024, 512)}, bits=4, group_size=128)["kernel"]
    x = normal(3, 1024)

    def loss(scale, x):
        return (lift(lambda w, x: x @ w)(kernel.replace(scale=scale), x) ** 2).sum()

    once = 2 * 3 * 1024 * 512
    forward = jax.make_jaxpr(loss)(kernel.scale, x)
    assert "wna16_product" in str(forward)
    assert flops_of_jaxpr(forward.jaxpr) == once
    backward = jax.make_jaxpr(jax.grad(loss, (0, 1)))(kernel.scale, x)
    assert "wna16_scale_gradient" in str(backward)
    assert flops_of_jaxpr(backward.jaxpr) == 3 * once
