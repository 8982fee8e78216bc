"""Low rank factors beside a low-bit model: what trains, what they begin as, how they merge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.inputs import QuantizedInput
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.quantization.activations import activations
from jaxcompress.quantization.lora import add_lora, merge_lora

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(64, 32)), jnp.float32)
PATHS = ["first/kernel", "layers/kernel"]


def network():
    def kernel(*shape):
        return {"kernel": jnp.asarray(RNG.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)}

    def apply(params, x):
        hidden = jnp.tanh(x @ params["first"]["kernel"])
        step = lambda h, kernel: (jnp.tanh(h @ kernel), None)  # noqa: E731
        return jax.lax.scan(step, hidden, params["layers"]["kernel"])[0]

    return Model(apply, {"first": kernel(32, 48), "layers": kernel(2, 48, 48)})


MODEL = network()


def small(dtype="int", **options):
    options = {"bits": 3, "group_size": 16, **options}
    return jc.compress(MODEL, "rtn", dtype=dtype, **options)


def leaves(model):
    return [model.params[name]["kernel"] for name in ("first", "layers")]


def trained(model, target, steps=40):
    trainable, frozen = jc.split(model.params, "factors")
    optimizer = optax.adam(1e-2)
    state = optimizer.init(trainable)
    apply = jc.lift(model.apply)

    def loss(trainable):
        return jnp.mean(jnp.square(apply(jc.merge(trainable, frozen), X) - target))

    @jax.jit
    def step(trainable, state):
        updates, state = optimizer.update(jax.grad(loss)(trainable), state)
        return optax.apply_updates(trainable, updates), state

    first = loss(trainable)
    for _ in range(steps):
        trainable, state = step(trainable, state)
    return model.replace(params=jc.merge(trainable, frozen)), float(first), float(loss(trainable))


def test_factors_begin_as_nothing_and_train_alone():
    base = small()
    ready = add_lora(base, rank=4)
    assert all(isinstance(leaf, Sum) for leaf in leaves(ready))
    np.testing.assert_array_equal(ready(X), base(X))
    for leaf, held in zip(leaves(ready), leaves(base), strict=True):
        assert leaf.dims == held.dims
        np.testing.assert_array_equal(leaf.first.a, 0)
        np.testing.assert_allclose(jnp.var(leaf.first.b) * held.contracted, 1, rtol=0.4)
    assert not np.array_equal(leaves(ready)[1].first.b[0], leaves(ready)[1].first.b[1])
    made, before, after = trained(ready, MODEL(X))
    assert after < 0.3 * before
    for leaf, held in zip(leaves(made), leaves(base), strict=True):
        for mine, theirs in zip(jax.tree.leaves(leaf.second), jax.tree.leaves(held), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert np.any(np.asarray(leaf.first.a) != 0)


def test_factors_begin_at_what_quantization_lost():
    base = small()
    ready = add_lora(base, MODEL, rank=4)
    for leaf, held, dense in zip(leaves(ready), leaves(base), leaves(MODEL), strict=True):
        lost = np.asarray(dense, np.float64) - np.asarray(held.dense(), np.float64)
        left = np.asarray(dense, np.float64) - np.asarray(leaf.dense(), np.float64)
        values = np.linalg.svd(lost, compute_uv=False)
        least = np.sqrt(np.square(values[..., 4:]).sum())
        np.testing.assert_allclose(np.linalg.norm(left), least, rtol=1e-5)
    target = MODEL(X)
    assert jnp.mean(jnp.square(ready(X) - target)) < jnp.mean(jnp.square(base(X) - target))


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("layers", {"bits": 8, "group_size": 16}),
        ("layers", {"bits": 3, "group_size": 16, "symmetric": False}),
        ("layers", {"dtype": "nf4", "group_size": 16}),
        ("first", {"dtype": "mxfp4"}),
    ],
)
def test_merged_weights_are_the_sum_or_in_its_format(path, options):
    include = f"{path}/kernel"
    base = jc.compress(MODEL, "rtn", include=include, **options)
    ready, *_ = trained(add_lora(base, rank=2), MODEL(X), steps=5)
    merged = merge_lora(ready)
    found = merged.params[path]["kernel"]
    assert isinstance(found, jax.Array)
    np.testing.assert_array_equal(found, ready.params[path]["kernel"].dense())
    again = merge_lora(ready, requantize=True).params[path]["kernel"]
    assert jax.tree.structure(again) == jax.tree.structure(base.params[path]["kernel"])
    want = jc.compress(merged, "rtn", include=include, **options).params[path]["kernel"]
    np.testing.assert_array_equal(again.dense(), want.dense())


def test_weights_of_rounded_inputs_get_factors_too():
    base = activations(small(bits=8, group_size=-1), PATHS)
    ready = add_lora(base, MODEL, rank=4)
    assert all(isinstance(leaf, QuantizedInput) for leaf in leaves(ready))
    assert all(isinstance(leaf.weight, Sum) for leaf in leaves(ready))
    np.testing.assert_allclose(ready(X), base(X), atol=0.05)
    merged = merge_lora(ready)
    for leaf, apart in zip(leaves(merged), leaves(ready), strict=True):
        np.testing.assert_array_equal(leaf.weight, apart.weight.matrix())
    np.testing.assert_allclose(merged(X), ready(X), atol=0.02)  # a code or two apart
    again = merge_lora(ready, requantize=True)
    assert all(isinstance(leaf.weight, Affine) for leaf in leaves(again))


def test_what_has_nothing_to_stand_beside_is_refused():
    with pytest.raises(InputError, match="no weight is compressed"):
        add_lora(MODEL)
    with pytest.raises(InputError, match="first/kernel: rank 64"):
        add_lora(small(), rank=64)
    with pytest.raises(InputError, match="low rank part"):
        merge_lora(small())
    scaled = jc.compress(MODEL, "rtn", dtype="nf4", group_size=16, scale_bits=8)
    with pytest.raises(InputError, match="requantize"):
        merge_lora(add_lora(scaled, rank=2), requantize=True)
