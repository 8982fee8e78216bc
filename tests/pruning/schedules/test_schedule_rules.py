"""Every schedule against its paper's rule, recomputed step by step in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress.core.arrays.base import KERNEL
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.models import DecoderConfig, build_model
from jaxcompress.pruning.schedules import (
    coupled_threshold,
    cubic,
    gradual,
    greedy,
    group_threshold,
    iterative,
    lottery,
    progression,
    proximal,
    rigl,
    share_of_rest,
    soft_threshold,
    sparse_evolution,
    sparse_start,
    targets,
    training_steps,
)

RATE = 0.05
WHERE = {"w": KERNEL}
TARGET = np.random.default_rng(9).normal(size=(8, 6)).astype(np.float32)


def slope(w: np.ndarray, step: int) -> np.ndarray:
    """A gradient that depends on the weights and the step."""
    noise = np.random.default_rng(100 + step).normal(size=w.shape).astype(np.float32)
    return (w - TARGET + 0.3 * noise).astype(np.float32)


def params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32), "b": jnp.ones(3)}


def run(optimizer, start, steps: int, idle: int = 0) -> list:
    """Weights and states after each step, of which some move no weight."""
    state, now, seen = optimizer.init(start), start, []
    update = jax.jit(optimizer.update)
    for step in range(steps):
        gradients = {"w": jnp.asarray(slope(np.asarray(now["w"]), step)), "b": jnp.ones(3)}
        updates, state = update(gradients, state, now)
        now = optax.apply_updates(now, updates)
        seen.append((np.asarray(now["w"]), state))
    np.testing.assert_allclose(now["b"], 1 - RATE * (steps - idle), rtol=1e-5)
    return seen


def test_cubic_values():
    s_i, s_f, n = 0.1, 0.8, 5
    wanted = [s_f + (s_i - s_f) * (1 - t / n) ** 3 for t in range(n + 1)]
    np.testing.assert_allclose(cubic(s_i, s_f, n), wanted, rtol=1e-12)
    assert cubic(s_i, s_f, n)[-1] == s_f


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_gradual_prunes_by_the_cubic_schedule(scope):
    begin, interval, times = 1, 2, 3
    optimizer = gradual(
        optax.sgd(RATE), WHERE, sparsity=0.75, begin=begin, end=begin + times * interval + 1,
        interval=interval, initial_sparsity=0.2, scope=scope,
    )  # fmt: skip
    w, mask = np.asarray(params()["w"]), np.ones((8, 6), bool)
    for step, (found, _) in enumerate(run(optimizer, params(), 10)):
        w = np.where(mask, w - np.float32(RATE) * slope(w, step), 0)
        i, rest = divmod(step - begin, interval)
        if rest == 0 and 0 <= i <= times:
            s = 0.75 + (0.2 - 0.75) * (1 - i / times) ** 3
            order = np.argsort(np.abs(w).ravel())
            mask.ravel()[order[: int(s * w.size)]] = False
            w = np.where(mask, w, 0)
        np.testing.assert_allclose(found, w, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found == 0, ~mask)
    assert (found == 0).sum() == 36


def test_gradual_removes_whole_blocks():
    optimizer = gradual(
        optax.sgd(RATE), WHERE, sparsity=0.5, begin=0, end=2, interval=1, pattern="block:3x4"
    )
    found, _ = run(optimizer, params(), 3)[-1]
    blocks = (found.T == 0).reshape(2, 3, 2, 4).transpose(0, 2, 1, 3).reshape(4, 12)
    assert sorted(blocks.sum(1)) == [0, 0, 12, 12]
    kept = np.abs(found.T).reshape(2, 3, 2, 4).sum((1, 3)).ravel() > 0
    assert kept.sum() == 2


def test_a_global_budget_is_shared_by_size_of_weight():
    start = {
        "a": jnp.full((4, 4), 1.0) + jnp.arange(16.0).reshape(4, 4),
        "b": jnp.full((4, 4), 0.5),
    }
    where = {"a": KERNEL, "b": KERNEL}
    optimizer = gradual(
        optax.sgd(0.0), where, sparsity=0.5, begin=0, end=1, interval=1, scope="global"
    )
    zero = jax.tree.map(jnp.zeros_like, start)
    state, update = optimizer.init(start), jax.jit(optimizer.update)
    for _ in range(2):
        updates, state = update(zero, state, start)
        start = optax.apply_updates(start, updates)
    assert (np.asarray(start["a"]) == 0).sum() == 0
    assert (np.asarray(start["b"]) == 0).sum() == 16


def test_zeros_of_before_stay_and_moments_are_those_of_kept_weights():
    start = params()
    start["w"] = jnp.where(jnp.abs(start["w"]) < 0.5, 0, start["w"])
    removed = np.asarray(start["w"]) == 0
    assert 0.2 < removed.mean() < 1
    optimizer = gradual(optax.adam(RATE), WHERE, sparsity=0.2, begin=0, end=60, interval=5)
    state = optimizer.init(start)
    gradients = {"w": jnp.ones((8, 6)), "b": jnp.ones(3)}
    for _ in range(2):
        updates, state = optimizer.update(gradients, state, start)
        start = optax.apply_updates(start, updates)
    moved = np.asarray(start["w"])
    np.testing.assert_array_equal(moved == 0, removed)
    moment = np.asarray(state.inner[0].mu["w"])
    np.testing.assert_array_equal(moment == 0, removed)


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients():
    interval, end, alpha = 3, 10, 0.5
    start = sparse_start(params(), WHERE, sparsity=0.5, distribution="uniform", seed=1)
    optimizer = rigl(optax.sgd(RATE), WHERE, fraction=alpha, interval=interval, end=end)
    w = np.asarray(start["w"])
    mask = w != 0
    assert mask.sum() == 24
    changes = 0
    for step, (found, state) in enumerate(run(optimizer, start, 14, idle=3)):
        g = slope(w, step)
        if step and step % interval == 0 and step < end:
            k = int(alpha / 2 * (1 + np.cos(np.pi * step / end)) * mask.sum())
            sizes = np.where(mask, np.abs(w), np.inf).ravel()
            stays = mask.copy()
            stays.ravel()[np.argsort(sizes)[:k]] = False
            growth = np.where(stays, -np.inf, np.abs(g)).ravel()
            new = stays.copy()
            new.ravel()[np.argsort(-growth)[:k]] = True
            changes += int((new & ~mask).sum())
            w, mask = np.where(new & mask, w, 0), new
        else:
            w = np.where(mask, w - np.float32(RATE) * g, 0)
        np.testing.assert_array_equal(np.asarray(state.masks["w"]), mask)
        assert mask.sum() == 24
        np.testing.assert_allclose(found, w, rtol=1e-5, atol=1e-6)
    assert changes > 4


def test_set_drops_by_sign_and_grows_elsewhere():
    zeta, interval = 0.4, 2
    start = sparse_start(params(), WHERE, sparsity=0.5, distribution="uniform", seed=1)
    optimizer = sparse_evolution(
        optax.sgd(RATE), WHERE, fraction=zeta, interval=interval, end=6, seed=3
    )
    w = np.asarray(start["w"])
    mask, grown = w != 0, []
    for step, (found, state) in enumerate(run(optimizer, start, 9)):
        w = np.where(mask, w - np.float32(RATE) * slope(w, step), 0)
        new = np.asarray(state.masks["w"])
        if step in (2, 4, 6):
            stays = mask.copy()
            for sign in (1, -1):
                size = np.where(mask & (sign * w > 0), sign * w, np.inf).ravel()
                stays.ravel()[np.argsort(size)[: int(zeta * np.isfinite(size).sum())]] = False
            assert stays.sum() < mask.sum() == new.sum() == 24
            assert new[stays].all()  # what stays, and as many others as went
            grown.append(np.flatnonzero(new & ~stays))
            w, mask = np.where(new & mask, w, 0), new
        np.testing.assert_array_equal(new, mask)
        np.testing.assert_allclose(found, w, rtol=1e-5, atol=1e-6)
    assert len({tuple(g) for g in grown}) == 3


def test_a_sparse_start_spends_by_erdos_renyi():
    start = {"big": jnp.ones((64, 64)), "small": jnp.ones((8, 8)), "pruned": jnp.eye(4)}
    where = dict.fromkeys(start, KERNEL)
    out = sparse_start(start, where, sparsity=0.8)
    density = {path: float((leaf != 0).mean()) for path, leaf in out.items()}
    kept = sum(int((out[p] != 0).sum()) for p in ("big", "small"))
    assert kept == 64 * 64 + 64 - int(0.8 * (64 * 64 + 64))
    assert density["small"] > 3 * density["big"]
    np.testing.assert_array_equal(out["pruned"], start["pruned"])


@pytest.mark.parametrize("control", ["none", "random", "reinit"])
@pytest.mark.parametrize("rewind", [0, 2])
def test_lottery_rewinds_to_step_k(rewind, control):
    steps, rounds = 5, 2
    optimizer = lottery(
        optax.sgd(lambda count: RATE / (1 + count), momentum=0.9), WHERE, sparsity=0.75,
        rounds=rounds, steps=steps, rewind=rewind, control=control,
    )  # fmt: skip
    start = params()
    w, velocity, mask, count, number = np.asarray(start["w"]), 0.0, np.ones((8, 6), bool), 0, 0
    early = (w, velocity)
    total = training_steps(steps, rounds, rewind)
    assert total == steps + rounds * (steps - rewind)
    state, now, update = optimizer.init(start), start, jax.jit(optimizer.update)
    for step in range(total):
        g = slope(w, step)
        updates, state = update({"w": jnp.asarray(g), "b": jnp.ones(3)}, state, now)
        now = optax.apply_updates(now, updates)
        velocity = 0.9 * velocity + np.where(mask, g, 0)
        w = np.where(mask, w - RATE / (1 + count) * velocity, 0)
        count += 1
        if count == rewind and number == 0:
            early = (w, velocity)
        if count == steps and number < rounds:
            number += 1
            order = np.argsort(np.where(mask, np.abs(w), -1).ravel())
            removed = int((1 - 0.25 ** (number / rounds)) * w.size)
            mask.ravel()[order[:removed]] = False
            w, velocity, count = np.where(mask, early[0], 0), early[1], rewind
            if control != "none" and number == rounds:
                break
        np.testing.assert_allclose(now["w"], w, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(now["w"]) == 0, ~mask)
    found = np.asarray(now["w"])
    assert (found == 0).sum() == 36
    if control == "random":
        assert ((found == 0) != ~mask).sum() > 5
        np.testing.assert_allclose(found[found != 0], early[0][found != 0], rtol=1e-4, atol=1e-6)
    if control == "reinit":
        np.testing.assert_array_equal(found == 0, ~mask)
        values = np.sort(early[0].ravel())
        near = np.abs(found[found != 0][:, None] - values).min(1)
        assert near.max() < 1e-5
        assert np.abs(found - early[0])[found != 0].max() > 0.1


def test_proximal_l1():
    strength = 0.4
    shrink = soft_threshold(WHERE)
    optimizer = proximal(optax.sgd(RATE), WHERE, shrink, strength=strength, rate=lambda _: RATE)
    w = np.asarray(params()["w"])
    for step, (found, _) in enumerate(run(optimizer, params(), 40)):
        moved = w - np.float32(RATE) * slope(w, step)
        w = np.sign(moved) * np.maximum(np.abs(moved) - np.float32(RATE * strength), 0)
        np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-6)
    assert 0 < (found == 0).sum() < found.size


@pytest.mark.parametrize(("groups", "shape"), [("rows", (8, 1)), ("columns", (1, 6))])
def test_proximal_groups(groups, shape):
    """A kernel is [in, out]: rows of the stored matrix are its columns."""
    shrink = group_threshold(WHERE, groups)
    w, threshold = params()["w"], 0.8
    found = np.asarray(shrink({"w": w}, jnp.float32(threshold))["w"])
    axis = 0 if groups == "rows" else 1
    norm = np.linalg.norm(w, axis=axis, keepdims=True)
    factor = np.maximum(1 - threshold * np.sqrt(np.shape(w)[axis]) / norm, 0)
    np.testing.assert_allclose(found, w * factor, rtol=1e-5, atol=1e-6)
    assert 0 < (factor == 0).sum() < factor.size


def test_proximal_blocks():
    found = np.asarray(group_threshold(WHERE, "block:3x4")(params(), jnp.float32(0.9))["w"]).T
    w = np.asarray(params()["w"]).T
    for r in (0, 3):
        for c in (0, 4):
            block = w[r : r + 3, c : c + 4]
            factor = max(0, 1 - 0.9 * 12**0.5 / np.linalg.norm(block))
            np.testing.assert_allclose(found[r : r + 3, c : c + 4], block * factor, atol=1e-6)


def test_the_proximal_step_is_the_minimum_of_its_objective():
    """Of 1/2 ||x - w||^2 + t ||x||: nothing around it is lower."""
    w = params()["w"]
    t = 0.5
    found = np.asarray(group_threshold({"w": KERNEL}, "columns")({"w": w}, jnp.float32(t))["w"])

    def objective(x):
        norms = np.sqrt(6) * np.linalg.norm(x, axis=1)
        return 0.5 * np.square(x - np.asarray(w)).sum() + t * norms.sum()

    rng = np.random.default_rng(0)
    for _ in range(50):
        assert objective(found) <= objective(found + 1e-3 * rng.normal(size=found.shape)) + 1e-6


@pytest.mark.parametrize("scan", [False, True])
def test_coupled_groups_go_as_one(scan):
    """A neuron's weights in gate, up and down have one factor; stacked layers have their own."""
    config = DecoderConfig(
        model_type="llama", vocab_size=40, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        scan_layers=scan,
    )  # fmt: skip
    model = build_model(config)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    where = targets(model, ids, include="layers/**/mlp/*/kernel")
    shrink = coupled_threshold(where, model, ids)
    rng = np.random.default_rng(0)
    scaled = jax.tree.map(lambda x: x * jnp.asarray(rng.uniform(0.5, 1.5, x.shape)), model.params)
    out = shrink(scaled, jnp.float32(0.02))

    def mlp(tree, layer):
        leaves = tree["layers"] if scan else tree["layers"][str(layer)]
        at = (lambda x: x[layer]) if scan else (lambda x: x)
        return [np.asarray(at(leaves["mlp"][n]["kernel"])) for n in ("gate_proj", "up_proj")] + [
            np.asarray(at(leaves["mlp"]["down_proj"]["kernel"])).T
        ]

    for layer in range(2):
        before, after = mlp(scaled, layer), mlp(out, layer)  # each [16, 24]
        norm = np.sqrt(sum(np.square(x).sum(0) for x in before))
        factor = np.maximum(1 - 0.02 * np.sqrt(3 * 16) / norm, 0)
        assert 0 < factor.min() < factor.max() < 1
        for x, y in zip(before, after, strict=True):
            np.testing.assert_allclose(y, x * factor, rtol=1e-4, atol=1e-6)


def test_iterative_takes_the_share_of_what_is_left():
    seen = []

    def prune(model, before, after):
        share = share_of_rest(before, after)
        seen.append(share)
        return model.replace(params=model.params * (1 - share))

    model = Model(lambda p, x: x, 1000.0)
    out = iterative(model, prune, lambda m, r: m, progression("geometric", 0.784, 3))
    np.testing.assert_allclose(seen, [0.4, 0.4, 0.4])
    np.testing.assert_allclose(out.params, 216.0)
    np.testing.assert_allclose(progression("linear", 0.6, 3), [0.2, 0.4, 0.6])
    assert progression("cubic", 0.6, 2)[0] == pytest.approx(0.6 * (1 - 0.125))


def test_greedy_takes_the_best_each_time_and_passes_over_what_cannot():
    def minus(amount, lowest=0):
        def remove(model):
            if model.params - amount < lowest:
                raise InputError("nothing left")
            return model.replace(params=model.params - amount)

        return remove

    candidates = {"a": minus(3, lowest=4), "b": minus(1)}
    model = Model(lambda p, x: x, 10)
    out = greedy(model, candidates, lambda m: abs(m.params - 3), rounds=3)
    assert out.params == 3  # 10, 7 (a), 4 (a), 3 (b): a would leave less than 4
    assert [note.split(" of")[0] for note in out.notes] == ["greedy: kept a"] * 2 + [
        "greedy: kept b"
    ]
    with pytest.raises(InputError, match="no candidate can go on; a: nothing left"):
        greedy(out, {"a": candidates["a"]}, lambda m: 0.0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: gradual(optax.sgd(1), WHERE, sparsity=1.0, begin=0, end=4, interval=1),
            "sparsity",
        ),
        (lambda: gradual(optax.sgd(1), WHERE, sparsity=0.5, begin=4, end=4, interval=1), "begin 4"),
        (
            lambda: gradual(
                optax.sgd(1), WHERE, sparsity=0.5, begin=0, end=4, interval=1, pattern="2:4"
            ),
            "pattern '2:4'",
        ),
        (lambda: lottery(optax.sgd(1), WHERE, sparsity=0.5, rounds=0, steps=4), "rounds 0"),
        (
            lambda: lottery(optax.sgd(1), WHERE, sparsity=0.5, rounds=1, steps=4, rewind=4),
            "rewind 4",
        ),
        (lambda: rigl(optax.sgd(1), WHERE, fraction=0.0, interval=1, end=4), "fraction 0"),
        (lambda: group_threshold(WHERE, "heads"), "groups 'heads'"),
        (lambda: progression("steep", 0.5, 2), "progression 'steep'"),
    ],
)
def test_what_is_wrong_is_refused(make, text):
    with pytest.raises(InputError, match=text):
        make()
