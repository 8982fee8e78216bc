"""Training forms: gradients against PyTorch autograd, values against what will be stored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.core.arrays.affine import minmax_range
from jaxcompress.core.arrays.training import FakeQuantized, Masked

torch = pytest.importorskip("torch")


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class GradScale(torch.autograd.Function):
    """Identity whose gradient is multiplied, as in the appendix of the paper."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class RoundPass(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def lsq(weight, scale, low, high, normalized):
    """The paper's own listing, with groups: weight [N, G, K / G], scale [N or 1, G]."""
    if normalized:
        sharing = weight.numel() / scale.numel()
        largest = (high - low - 1) // 2 if low < 0 else high
        scale = GradScale.apply(scale, 1 / np.sqrt(sharing * max(largest, 1)))
    return RoundPass.apply(torch.clamp(weight / scale[..., None], low, high)) * scale[..., None]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("rows", [6, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_those_of_lsq_in_pytorch(bits, rows, normalized):
    groups = 4 if rows > 1 else 1
    weight, gradient = random(6, 32), random(6, 32, seed=1)
    scale = np.abs(random(rows, groups, seed=2)) * 2.0 ** (2 - bits) + 0.01  # many are clipped
    leaf = FakeQuantized(
        jnp.asarray(weight), jnp.asarray(scale), None, bits, normalized, casts=("float32",)
    )
    value, back = jax.vjp(lambda leaf: leaf.decode(), leaf)
    (mine,) = back(jnp.asarray(gradient))

    w, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (weight, scale))
    grouped = w.reshape(6, groups, -1)
    theirs = lsq(grouped, s, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, normalized).reshape(6, 32)
    theirs.backward(torch.tensor(gradient))
    np.testing.assert_allclose(value, theirs.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(mine.weight, w.grad.numpy(), rtol=1e-6)
    np.testing.assert_allclose(mine.scale, s.grad.numpy(), rtol=1e-5, atol=1e-4)
    clipped = np.asarray(mine.weight) == 0
    assert 0 < clipped.mean() < 1


def test_gradients_with_a_zero_point_are_those_of_lsq_shifted():
    weight, gradient = random(6, 32), random(6, 32, seed=1)
    scale = np.abs(random(6, 2, seed=2)) * 0.1 + 0.02
    zero = np.random.default_rng(3).integers(0, 16, (6, 2)).astype(np.uint8)
    leaf = FakeQuantized(jnp.asarray(weight), jnp.asarray(scale), jnp.asarray(zero), 4, False)

    def decode(weight, scale):
        return leaf.replace(weight=weight, scale=scale).decode()

    value, back = jax.vjp(decode, leaf.weight, leaf.scale)
    d_weight, d_scale = back(jnp.asarray(gradient))
    w, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (weight, scale))
    low = -torch.tensor(zero.astype(np.float32))[..., None]
    theirs = lsq(w.reshape(6, 2, 16), s, low, 15 + low, False).reshape(6, 32)
    theirs.backward(torch.tensor(gradient))
    np.testing.assert_allclose(value, theirs.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(d_weight, w.grad.numpy(), rtol=1e-6)
    np.testing.assert_allclose(d_scale, s.grad.numpy(), rtol=1e-5, atol=1e-4)


def test_an_unsigned_range_is_normalized_by_its_largest_code():
    """Section 2.2 of the paper: Q_P = 2^b - 1 for unsigned data."""
    weight, scale = jnp.asarray(np.abs(random(1, 16))), jnp.full((1, 1), 0.3)
    zero = jnp.zeros((1, 1), jnp.uint8)

    def total(scale, normalized):
        return FakeQuantized(weight, scale, zero, 4, normalized).decode().sum()

    plain, divided = (jax.grad(total)(scale, normalized) for normalized in (False, True))
    np.testing.assert_allclose(divided, plain / np.sqrt(16 * 15), rtol=1e-6)


@settings(max_examples=8)
@given(
    bits=st.integers(1, 8),
    symmetric=st.booleans(),
    groups=st.sampled_from([1, 4]),
    dtypes=st.sampled_from([("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "float32")]),
    seed=st.integers(0, 2**31),
)
def test_the_model_sees_what_will_be_stored(bits, symmetric, groups, dtypes, seed):
    matrix = jnp.asarray(random(4, 64, seed=seed), dtypes[0])
    scale, zero = minmax_range(matrix, bits=bits, groups=groups, symmetric=symmetric)
    scale = (scale * 0.8).astype(dtypes[1])
    leaf = FakeQuantized(matrix, scale, zero, bits, casts=(dtypes[0],))
    stored = leaf.to_affine()
    assert (stored.shape, stored.dtype, stored.group_size) == (leaf.shape, leaf.dtype, 64 // groups)
    np.testing.assert_array_equal(leaf.dense(), stored.dense())
    both = jax.jit(lambda leaf: (leaf.decode(), leaf.to_affine().decode()))(leaf)
    np.testing.assert_array_equal(both[0], both[1])
    np.testing.assert_array_equal(both[0], leaf.decode())


def test_a_training_step_under_scan_and_forward_mode():
    leaf = FakeQuantized(jnp.asarray(random(2, 4, 32)), jnp.full((2, 4, 1), 0.1))

    def loss(leaf):
        _, out = jax.lax.scan(lambda c, layer: (c, layer.dense()), 0, leaf)
        return (out**2).sum()

    by_hand = jax.grad(lambda leaf: (leaf.dense() ** 2).sum())(leaf)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(jax.grad(loss))(leaf), by_hand)
    tangents = jax.tree.map(jnp.ones_like, leaf)
    _, forward = jax.jvp(loss, (leaf,), (tangents,))
    np.testing.assert_allclose(forward, sum(x.sum() for x in jax.tree.leaves(by_hand)), rtol=1e-5)


def test_learned_steps_reduce_the_error_of_two_bits():
    weight, x = jnp.asarray(random(8, 64)), jnp.asarray(random(32, 64, seed=1))
    scale, _ = minmax_range(weight, bits=2, groups=1, symmetric=True)
    target = x @ weight.T

    def loss(leaf):
        return jnp.mean((x @ leaf.decode().T - target) ** 2)

    leaf = FakeQuantized(weight, scale, None, 2)
    optimizer = optax.adam(1e-2)
    state, first = optimizer.init(leaf), loss(leaf)

    @jax.jit
    def step(leaf, state):
        updates, state = optimizer.update(jax.grad(loss)(leaf), state)
        return optax.apply_updates(leaf, updates), state

    for _ in range(60):
        leaf, state = step(leaf, state)
    assert loss(leaf) < 0.6 * first


def test_removed_weights_have_no_gradient_and_stay_removed():
    weight, mask = jnp.asarray(random(4, 32)), jnp.asarray(random(4, 32, seed=1) > 0)

    def loss(weight):
        return (jnp.cos(Masked(weight, mask).dense()) * jnp.arange(1, 33)[:, None]).sum()

    gradient = jax.grad(loss)(weight)
    by_hand = jnp.where(mask, -jnp.sin(weight) * jnp.arange(1, 33), 0)
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-5, atol=1e-6)
    broken = jnp.where(mask, weight, jnp.nan)  # whatever a removed entry holds does not matter
    np.testing.assert_array_equal(Masked(broken, mask).decode(), jnp.where(mask, weight, 0))
    assert not np.isnan(jax.grad(loss)(broken)).any()
