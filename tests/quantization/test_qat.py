"""Quantization-aware training: what is converted computes, bit for bit, what was trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow_but

import jaxcompress as jc
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.codebook import Codebook, encode_codebook
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.floats import Float
from jaxcompress.core.arrays.inputs import QuantizedInput
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.arrays.sparse import NMSparse
from jaxcompress.core.arrays.training import FakeEncoded, FakeQuantized
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.layerwise.grid import grid_of, nearest
from jaxcompress.quantization.activations import activations
from jaxcompress.quantization.qat import convert, prepare_qat

torch = pytest.importorskip("torch")

X = jnp.asarray(np.random.default_rng(9).normal(size=(256, 64)), jnp.float32)
Y = jnp.tanh(X[:, :16] * X[:, 16:32] + X[:, 32:48])


def network(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def kernel(*shape):
        return {"kernel": jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)}

    def apply(params, x):
        hidden = jnp.tanh(x.astype(dtype) @ params["first"]["kernel"])
        return hidden @ params["second"]["kernel"]

    return Model(apply, {"first": kernel(64, 128), "second": kernel(128, 16)})


def error(model, params):
    out = jc.lift(model.apply)(params, X)
    return jnp.mean(jnp.square(out.astype(jnp.float32) - Y))


def fitted(model, steps=30, rate=3e-3, what="all"):
    trainable, frozen = jc.split(model.params, what)
    optimizer = optax.adam(rate)

    def narrow(masters):
        return jax.tree.map(lambda x, like: x.astype(like.dtype), masters, trainable)

    @jax.jit
    def step(masters, state):
        slope = jax.grad(lambda m: error(model, jc.merge(narrow(m), frozen)))(masters)
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(masters, updates), state

    masters = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    state = optimizer.init(masters)
    for _ in range(steps):
        masters, state = step(masters, state)
    return model.replace(params=jc.merge(narrow(masters), frozen))


def quantized(model, **options):
    grid = grid_of(**options)

    def rounded(leaf):
        return nearest(grid, leaf.T).replace(dims=(("k", -1), ("n", -1)))

    return model.replace(params=jax.tree.map(rounded, model.params))


def assert_bit_equal(a, b):
    a, b = (np.asarray(x) for x in (a, b))
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def outputs(model):
    return jax.jit(jc.lift(model.apply))(model.params, X)


def leaves(model):
    return [model.params[name]["kernel"] for name in ("first", "second")]


FORMATS = {
    "int1": {"bits": 1, "group_size": 32, "symmetric": False},
    "int2": {"bits": 2, "group_size": 32},
    "int3 asymmetric": {"bits": 3, "group_size": 16, "symmetric": False},
    "int4 tensor": {"bits": 4, "granularity": "tensor"},
    "int4 block": {"bits": 4, "granularity": "block", "group_size": 24},
    "int4 float16 scales": {"bits": 4, "group_size": 32, "scale_bits": 16},
    "int8": {"bits": 8, "granularity": "channel"},
    "int16": {"bits": 16, "granularity": "channel"},
    "fp8": {"dtype": "fp8", "granularity": "channel"},
    "fp8_e5m2": {"dtype": "fp8_e5m2", "granularity": "tensor"},
    "fp8 block": {"dtype": "fp8", "granularity": "block", "group_size": 24},
    "mxfp4": {"dtype": "mxfp4"},
    "nvfp4": {"dtype": "nvfp4"},
    "nf4": {"dtype": "nf4"},
}
QUICK = ("int3 asymmetric", "fp8 block", "nvfp4")


@pytest.mark.parametrize("name", slow_but(FORMATS, QUICK))
def test_training_begins_and_ends_with_the_network_that_is_stored(name):
    model = network()
    small = quantized(model, **FORMATS[name])
    ready = prepare_qat(small, model)
    form = FakeQuantized if name.startswith("int") else FakeEncoded
    assert all(isinstance(leaf, form) for leaf in leaves(ready))
    assert_bit_equal(outputs(ready), outputs(small))
    for leaf, first in zip(leaves(ready), leaves(model), strict=True):
        assert np.mean(np.asarray(leaf.weight) == np.asarray(first.T)) == 1
    trained = fitted(ready, steps=12, rate=1e-2)
    made = convert(trained)
    assert_bit_equal(outputs(trained), outputs(made))
    for before, seen, after in zip(leaves(small), leaves(trained), leaves(made), strict=True):
        assert jax.tree.structure(before) == jax.tree.structure(after)
        assert_bit_equal(seen.dense(), after.dense())
        assert np.any(np.asarray(after.integers()) != np.asarray(before.integers()))
    assert error(made, made.params) < error(small, small.params)


def test_training_in_bfloat16_ends_with_what_is_stored():
    model = network(jnp.bfloat16)
    trained = fitted(prepare_qat(quantized(model, bits=3, group_size=32), model), steps=5)
    assert_bit_equal(outputs(trained), outputs(convert(trained)))


def test_two_bits_train_to_a_fraction_of_the_error_that_rounding_leaves():
    model = fitted(network(), steps=300)
    small = quantized(model, bits=2, group_size=32)
    dense, rounded = error(model, model.params), error(small, small.params)
    trained = convert(fitted(prepare_qat(small, model), steps=300))
    assert rounded > 5 * dense
    assert error(trained, trained.params) < 0.2 * rounded
    steps_alone = fitted(small, steps=300, what="scales")
    assert error(steps_alone, steps_alone.params) < 0.9 * rounded
    assert_bit_equal(leaves(steps_alone)[0].codes, leaves(small)[0].codes)


@pytest.mark.parametrize("scaling", ["dynamic", "static"])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_inputs_train_and_convert_to_the_same_bits(bits, scaling):
    model = network()
    small = quantized(model, bits=bits, granularity="channel")
    how = {"activation_scaling": scaling, "calibration": X[:32]}
    small = activations(small, ["first/kernel", "second/kernel"], **how)
    ready = prepare_qat(small, model)
    assert all(isinstance(leaf, QuantizedInput) for leaf in leaves(ready))
    assert all(isinstance(leaf.weight, FakeQuantized) for leaf in leaves(ready))
    assert_bit_equal(outputs(ready), outputs(small))
    trained = fitted(ready, steps=10)
    made = convert(trained)
    assert all(isinstance(leaf.weight, Affine) for leaf in leaves(made))
    assert_bit_equal(outputs(trained), outputs(made))
    if scaling == "static":
        moved = [a.input_scale != b.input_scale for a, b in zip(leaves(made), leaves(small))]
        assert all(np.all(x) for x in moved)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_was_pruned_stays_0(symmetric):
    model = network()
    mask = {n: np.random.default_rng(3).random(model.params[n]["kernel"].shape) < 0.4
            for n in model.params}  # fmt: skip
    params = {n: {"kernel": model.params[n]["kernel"] * mask[n]} for n in mask}
    model = model.replace(params=params)
    ready = prepare_qat(quantized(model, bits=4, group_size=32, symmetric=symmetric), model)
    made = convert(fitted(ready, steps=20))
    for name, kept in mask.items():
        found = np.asarray(made.params[name]["kernel"].dense())
        np.testing.assert_array_equal(found[~kept], 0)
    free = prepare_qat(quantized(model, bits=4, group_size=32), model, keep_zeros=False)
    found = np.asarray(convert(fitted(free, steps=20)).params["first"]["kernel"].dense())
    assert np.any(found[~mask["first"]] != 0)


def test_quantized_values_inside_of_other_arrays_train():
    model = network()
    first = model.params["first"]["kernel"].T
    keep = jnp.tile(jnp.arange(64) % 4 < 2, (128, 1))
    grid = grid_of(bits=4, group_size=32)
    sparse = NMSparse.from_mask(first, keep, 2, 4, encode=lambda x: nearest(grid, x))
    second = nearest(grid, model.params["second"]["kernel"].T)
    low = LowRank(jnp.zeros((16, 2)), jnp.ones((2, 128)), dims=second.dims)
    mended = Sum.of(low, second).replace(dims=(("k", -1), ("n", -1)))
    small = model.replace(params={"first": {"kernel": sparse}, "second": {"kernel": mended}})
    ready = prepare_qat(small, model)
    assert isinstance(leaves(ready)[0].values, FakeQuantized)
    assert isinstance(leaves(ready)[1].second, FakeQuantized)
    trained = fitted(ready, steps=10)
    made = convert(trained)
    assert jax.tree.structure(made.params) == jax.tree.structure(small.params)
    assert_bit_equal(outputs(trained), outputs(made))
    np.testing.assert_array_equal(np.asarray(leaves(made)[0].dense()).T[~np.asarray(keep)], 0)
    assert np.any(np.asarray(leaves(made)[1].first.a) != 0)


def test_a_start_that_rounds_elsewhere_gives_way_to_what_was_found():
    """GPTQ and its kin put weights at other points than the nearest: those begin there."""
    model = network()
    small = quantized(model, bits=4, group_size=32)
    shifted = jax.tree.map(lambda x: x.at[:8].add(1.0), model.params)
    ready = prepare_qat(small, model.replace(params=shifted))
    assert_bit_equal(outputs(ready), outputs(small))
    weight, kept = np.asarray(leaves(ready)[0].weight), np.asarray(model.params["first"]["kernel"])
    np.testing.assert_array_equal(weight[:, 8:], kept.T[:, 8:])
    assert np.mean(weight[:, :8] == np.asarray(shifted["first"]["kernel"]).T[:, :8]) < 0.1
    alone = prepare_qat(small)
    assert_bit_equal(alone.params["first"]["kernel"].weight, leaves(small)[0].matrix())


def test_gradients_of_fp8_are_those_of_the_straight_through_estimator_in_pytorch():
    rng = np.random.default_rng(1)
    weight, gradient = (rng.normal(size=(6, 32)).astype(np.float32) for _ in range(2))
    form = nearest(grid_of("fp8", granularity="channel"), jnp.asarray(weight))
    scale = np.asarray(form.scale) * 0.7  # some are clipped
    leaf = FakeEncoded(jnp.asarray(weight), form.replace(scale=jnp.asarray(scale)), False)

    def decode(weight, scale):
        return leaf.replace(weight=weight, form=leaf.form.replace(scale=scale)).decode()

    value, back = jax.vjp(decode, leaf.weight, leaf.form.scale)
    d_weight, d_scale = back(jnp.asarray(gradient))

    w, s = (torch.tensor(x, requires_grad=True) for x in (weight, scale))
    steps = torch.clamp(w / s, -448, 448)
    rounded = steps + (steps.to(torch.float8_e4m3fn).float() - steps).detach()
    theirs = rounded * s
    theirs.backward(torch.tensor(gradient))
    np.testing.assert_allclose(value, theirs.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(d_weight, w.grad.numpy(), rtol=1e-6)
    np.testing.assert_allclose(d_scale, s.grad.numpy(), rtol=1e-4, atol=1e-2)
    assert 0 < np.mean(np.asarray(d_weight) == 0) < 0.5


def test_values_of_a_table_move_by_the_sum_over_their_weights():
    weight = jnp.asarray(np.random.default_rng(2).normal(size=(4, 40)), jnp.float32)
    table = jnp.asarray([[-1.0, -0.2, 0.3, 1.1]])
    leaf = FakeEncoded(weight, encode_codebook(weight, table, bits=2))
    slope = np.random.default_rng(3).normal(size=(4, 40)).astype(np.float32)
    found = jax.grad(lambda leaf: (leaf.decode() * slope).sum(), allow_int=True)(leaf)
    nearest_one = np.abs(np.asarray(weight)[..., None] - np.asarray(table)[0]).argmin(-1)
    want = [slope[nearest_one == i].sum() for i in range(4)]
    np.testing.assert_allclose(found.form.table[0], want, rtol=1e-5, atol=1e-5)
    inside = (np.asarray(weight) >= -1.0) & (np.asarray(weight) <= 1.1)
    np.testing.assert_array_equal(found.weight, np.where(inside, slope, 0))


def test_what_cannot_be_prepared_is_refused():
    model = network()
    with pytest.raises(InputError, match="no weight is quantized"):
        prepare_qat(model)
    other = model.replace(params=jax.tree.map(lambda x: x[:32], model.params))
    with pytest.raises(InputError, match="first/kernel"):
        prepare_qat(quantized(model, bits=4, group_size=32), other)


def test_the_table_of_a_format_stays_and_a_learned_one_moves():
    model = network()
    nf4 = fitted(prepare_qat(quantized(model, dtype="nf4"), model), steps=3)
    stored = leaves(convert(nf4))[0]
    assert type(stored) is Codebook
    np.testing.assert_array_equal(stored.table, leaves(quantized(model, dtype="nf4"))[0].table)
    small = jc.compress(model, "kmeans", bits=3)
    made = convert(fitted(prepare_qat(small, model), steps=10))
    before, after = (np.asarray(leaves(m)[0].table) for m in (small, made))
    assert np.any(before != after)
    assert np.all(np.diff(after) > 0)
    assert isinstance(leaves(convert(prepare_qat(quantized(model, dtype="mxfp4"))))[0], Float)
