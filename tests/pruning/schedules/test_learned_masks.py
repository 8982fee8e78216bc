"""Learned masks against their papers' formulas: by hand, by PyTorch, by drawing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress.core.arrays.base import KERNEL
from jaxcompress.core.errors import InputError
from jaxcompress.pruning.schedules import (
    hard_concrete,
    learned_n_m,
    movement,
    soft_movement,
    sr_ste,
)
from jaxcompress.pruning.schedules.hard_concrete import final_gate, gate, open_probability
from jaxcompress.pruning.schedules.learned_n_m import SCALES, all_patterns
from jaxcompress.training.objective import Objective

WHERE = {"w": KERNEL}
RATE = 0.05


def batch(step: int):
    rng = np.random.default_rng(step)
    return rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)


def loss(params, data):
    """Half the squared error of x w + b."""
    x, y = data
    return 0.5 * jnp.square(x @ params["w"] + params["b"] - y).sum()


def slope(w, step):
    x, y = batch(step)
    return x.T @ (x @ w - y)


def start():
    rng = np.random.default_rng(1)
    return {"w": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), "b": jnp.zeros(4)}


def slopes(transform):
    """`(params, step, key) -> gradients` of the changed objective, and its loss."""
    plain = Objective(lambda p, data, key, c: {"loss": (loss(p, data), jnp.float32(1))})
    function = transform.objective(plain).function
    grad = jax.jit(jax.grad(lambda p, data, key: function(p, data, key, None)["loss"][0]))
    return lambda params, step, key: grad(params, batch(step), key)


def descend(transform, inner, steps: int, frozen=("b",)):
    """The trained tree before each step, and after the last."""
    params = transform.begin(start())
    optimizer, gradient = transform.optimizer(inner), slopes(transform)
    state, update, seen = optimizer.init(params), jax.jit(optimizer.update), [params]
    for step in range(steps):
        found = gradient(params, step, jax.random.key(step))
        found = {k: jax.tree.map(jnp.zeros_like, g) if k in frozen else g for k, g in found.items()}
        updates, state = update(found, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def test_movement_scores_are_sums_of_gradient_times_weight():
    transform = movement(WHERE, sparsity=0.75, begin=1, end=9, interval=2, score_rate=0.3)
    w, mask = np.asarray(start()["w"]), np.ones((8, 4), bool)
    scores, came_back = np.zeros((8, 4)), 0
    for step, leaf in enumerate(p["w"] for p in descend(transform, optax.sgd(RATE), 14)):
        np.testing.assert_allclose(leaf.gates.T, scores, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(np.asarray(leaf.state).T, mask)
        np.testing.assert_allclose(leaf.weight.T, w, rtol=1e-3, atol=1e-4)
        g = slope(np.where(mask, w, 0), step)
        scores = scores - 0.3 * g * w
        w = w - RATE * np.where(mask, g, 0)
        i = np.clip((step - 1) // 2, 0, 4)
        removed = int((0.75 - 0.75 * (1 - i / 4) ** 3) * 32 + 1e-9)
        new = np.ones((8, 4), bool)
        new.ravel()[np.argsort(scores.ravel())[:removed]] = False
        came_back += (new & ~mask).sum()
        mask = new
    assert (~mask).sum() == 24
    assert came_back > 0
    out = transform.end({"w": leaf})["w"]
    np.testing.assert_array_equal(np.asarray(out) != 0, np.asarray(leaf.state).T > 0)


def test_soft_movement_pulls_scores_down_by_its_penalty():
    transform = soft_movement(WHERE, threshold=0.3, strength=7.0)
    params = transform.begin(start())
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(4, 8)).astype(np.float32)
    params["w"] = params["w"].replace(gates=jnp.asarray(scores))
    found = slopes(transform)(params, 0, jax.random.key(0))["w"]
    s = 1 / (1 + np.exp(-scores))
    mask, w = s > 0.3, np.asarray(start()["w"]).T
    g = slope(np.where(mask, w, 0).T, 0).T
    np.testing.assert_allclose(found.gates, g * w + 7 * s * (1 - s) / 32, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.weight, np.where(mask, g, 0), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(transform.end(params)["w"]).T != 0, mask)


def test_sr_ste_is_that_of_the_papers_autograd_function():
    torch = pytest.importorskip("torch")

    class Sparse(torch.autograd.Function):
        """As the authors give it: forward masked, backward straight through with a decay."""

        @staticmethod
        def forward(ctx, weight, decay):
            groups = weight.detach().abs().reshape(-1, 4)
            index = torch.argsort(groups, dim=1)[:, :2]
            mask = torch.ones_like(groups).scatter_(1, index, 0).reshape(weight.shape)
            ctx.save_for_backward(weight)
            ctx.mask, ctx.decay = mask, decay
            return weight * mask

        @staticmethod
        def backward(ctx, grad):
            (weight,) = ctx.saved_tensors
            return grad + ctx.decay * (1 - ctx.mask) * weight, None

    decay = 0.1
    transform = sr_ste(WHERE, pattern="2:4", strength=decay)
    w = torch.tensor(np.asarray(start()["w"]).T.copy(), requires_grad=True)  # [out, in]
    changed, before = 0, None
    for step, found in enumerate(descend(transform, optax.sgd(RATE), 8)):
        np.testing.assert_allclose(found["w"].T, w.detach(), rtol=1e-4, atol=1e-5)
        sparse = np.asarray(transform.end(found)["w"]).T
        np.testing.assert_array_equal((sparse != 0).reshape(-1, 4).sum(1), 2)
        changed += 0 if before is None else ((sparse != 0) != before).sum()
        before = sparse != 0
        x, y = (torch.tensor(a) for a in batch(step))
        (0.5 * (x @ Sparse.apply(w, decay).T - y).square().sum()).backward()
        with torch.no_grad():
            w -= RATE * w.grad
            w.grad = None
    assert changed > 0


def test_hard_concrete_gates_are_open_as_often_as_the_penalty_counts():
    log_alpha = jnp.asarray([-3.0, -1.0, 0.0, 0.5, 2.0])
    drawn = jax.random.uniform(jax.random.key(0), (200_000, 5), minval=1e-7)
    gates = np.asarray(gate(log_alpha, drawn))
    expected = 1 / (1 + np.exp(-(np.asarray(log_alpha) - 2 / 3 * np.log(0.1 / 1.1))))
    np.testing.assert_allclose(open_probability(log_alpha), expected, rtol=1e-5)
    np.testing.assert_allclose((gates > 0).mean(0), expected, atol=0.004)
    u, a = np.float64(0.3), 0.5
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + a) / (2 / 3)))
    np.testing.assert_allclose(gate(jnp.float32(a), jnp.float32(u)), s * 1.2 - 0.1, rtol=1e-5)
    np.testing.assert_allclose(
        final_gate(log_alpha), np.clip(1.2 / (1 + np.exp(-log_alpha)) - 0.1, 0, 1), atol=1e-6
    )


@pytest.mark.parametrize(("groups", "each"), [("weights", 1), ("rows", 8), ("columns", 4)])
def test_hard_concrete_penalty_and_result(groups, each):
    strength = 40.0
    transform = hard_concrete(WHERE, strength=strength, groups=groups, start=0.6)
    params = transform.begin(start())
    assert params["w"].gates.size == 32 // each
    plain = Objective(lambda p, data, key, c: {"loss": (0 * p["w"].sum(), jnp.float32(6))})
    sums = transform.objective(plain).function(params, batch(0), jax.random.key(0), None)
    share = open_probability(jnp.log(0.6 / 0.4))
    np.testing.assert_allclose(sums["loss"][0] / sums["loss"][1], strength * share, rtol=1e-5)
    rng = np.random.default_rng(0)
    log_alpha = rng.normal(size=params["w"].gates.shape).astype(np.float32)
    log_alpha.ravel()[::2] = -4
    leaf = params["w"].replace(gates=jnp.asarray(log_alpha))
    out = np.asarray(transform.end({"w": leaf})["w"]).T
    np.testing.assert_allclose(out, np.asarray(leaf.weight) * final_gate(leaf.gates), rtol=1e-5)
    assert (out == 0).sum() == 16
    function = transform.objective(plain).function
    found = jax.grad(lambda p: function(p, batch(0), jax.random.key(0), None)["loss"][0])(params)
    one = share * (1 - share) * strength * 6 / params["w"].gates.size
    np.testing.assert_allclose(found["w"].gates, jnp.full_like(params["w"].gates, one), rtol=1e-4)


def test_hard_concrete_draws_differ_by_step_and_leaf():
    seen = []
    plain = Objective(lambda p, d, k, c: seen.append(p) or {"loss": (p["v"].sum(), jnp.ones(()))})
    transform = hard_concrete({"v": KERNEL, "w": KERNEL}, start=0.5)
    params = transform.begin({"v": jnp.ones((8, 4)), "w": jnp.ones((8, 4))})
    for step in (0, 0, 1):
        transform.objective(plain).function(params, None, jax.random.key(step), None)
    np.testing.assert_array_equal(seen[0]["v"], seen[1]["v"])
    assert (seen[0]["v"] != seen[2]["v"]).any()
    assert (seen[0]["v"] != seen[0]["w"]).any()


def test_learned_n_m_begins_near_magnitude_and_draws_by_its_probabilities():
    transform = learned_n_m(WHERE, steps=10, pattern="2:4", prior=30.0)
    params = transform.begin(start())
    leaf = params["w"]
    assert leaf.gates.shape == (4, 2 * 6)
    magnitude = np.asarray(sr_ste(WHERE).end(start())["w"])
    np.testing.assert_array_equal(np.asarray(transform.end(params)["w"]), magnitude)
    without = learned_n_m(WHERE, steps=10, pattern="2:4", prior=0.0)
    assert (np.asarray(without.end(without.begin(start()))["w"]) != magnitude).any()
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 2, 6)).astype(np.float32) / SCALES[1]
    leaf = leaf.replace(
        gates=jnp.asarray(logits.reshape(4, 12)), weight=jnp.ones((4, 8)), state=jnp.ones((1, 1))
    )
    seen = []
    plain = Objective(lambda p, d, k, c: seen.append(p["w"]) or {"loss": (0.0, 1.0)})
    function = transform.objective(plain).function

    def masks(key):
        function({"w": leaf, "b": None}, None, key, None)
        return seen.pop()

    drawn = np.asarray(
        jax.vmap(masks)(jax.random.split(jax.random.key(0), 4000))
    )  # [draws, in, out]
    hard = drawn.transpose(0, 2, 1).reshape(-1, 4, 2, 4) > 0.5
    p = np.exp(logits * SCALES[1])
    p /= p.sum(-1, keepdims=True)
    for i, pattern in enumerate(all_patterns(2, 4)):
        np.testing.assert_allclose((hard == pattern).all(-1).mean(0), p[..., i], atol=0.04)


def test_learned_n_m_finds_the_pattern_that_the_loss_wants():
    """The largest weights are the ones that the target does without."""
    keep = np.tile([True, False, True, False], 2)
    w = jnp.where(jnp.asarray(keep)[:, None], 1.0, 1.5) * jnp.ones((8, 4))
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    y = x[:, keep].sum(1, keepdims=True) * np.ones((1, 4), np.float32)
    transform = learned_n_m(WHERE, steps=150, gate_rate=2e-3)
    params = transform.begin({"w": w})
    by_magnitude = np.asarray(transform.end(params)["w"]) != 0
    assert (by_magnitude == keep[:, None]).mean() < 0.2
    plain = Objective(
        lambda p, d, k, c: {"loss": (jnp.square(x @ p["w"] - y).mean(), jnp.float32(1))}
    )
    function = transform.objective(plain).function
    optimizer = transform.optimizer(optax.set_to_zero())

    @jax.jit
    def step(params, state, key):
        gradients = jax.grad(lambda p: function(p, None, key, None)["loss"][0])(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), 150):
        params, state = step(params, state, key)
    np.testing.assert_allclose(params["w"].state, 1.0)
    np.testing.assert_array_equal(params["w"].weight, w.T)
    found = np.asarray(transform.end(params)["w"]) != 0
    assert (found == keep[:, None]).mean() > 0.9


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: movement(WHERE, sparsity=0.5, begin=3, end=2, interval=1), "begin 3"),
        (lambda: soft_movement(WHERE, threshold=0.6), "threshold 0.6"),
        (lambda: sr_ste(WHERE, pattern="unstructured"), "pattern 'unstructured'"),
        (lambda: hard_concrete(WHERE, groups="heads"), "groups 'heads'"),
        (lambda: hard_concrete(WHERE, start=1.0), "start 1"),
        (lambda: learned_n_m(WHERE, steps=3, pattern="16:32"), "pattern '16:32'"),
        (lambda: learned_n_m(WHERE, steps=3, pattern="1:3").begin(start()), "3 does not divide"),
    ],
)
def test_what_is_wrong_is_refused(make, text):
    with pytest.raises(InputError, match=text):
        make()
