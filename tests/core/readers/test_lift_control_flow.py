"""lift through scan, while, cond, remat, nested jit and custom_vmap."""

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from lift_cases import affine, check, close, equations, normal, primitives

from jaxcompress.core.arrays.base import STORED, densify
from jaxcompress.core.readers.lift import Lifted, lift, materialized

X = normal(2, 5, 16)
ONE = affine(2, 16, 16)
STACK = affine(1, 3, 16, 16)


def scan3(body, init):
    return lax.scan(body, init, None, length=3)


PLACES = {
    "scanned over": (lambda p, x: lax.scan(lambda c, q: (jnp.tanh(c @ q), c.sum()), x, p), STACK),
    "a constant of a scan": (lambda p, x: scan3(lambda c, _: (jnp.tanh(c @ p), c.sum()), x), ONE),
    "a carry of a scan": (
        lambda p, x: scan3(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), c[0].sum()), (x, p)),
        ONE,
    ),
    "an output of a scan, in reverse": (
        lambda p, x: lax.scan(lambda c, q: (c, q), x, p, reverse=True),
        STACK,
    ),
    "scanned over rows": (
        lambda p, x: lax.scan(lambda c, row: (c, x @ row), 0.0, p)[1],
        affine(3, 8, 16, dims=STORED),
    ),
    "indexed in a fori_loop": (
        lambda p, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p[i]), x),
        STACK,
    ),
    "a carry of a while": (
        lambda p, x: lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]), c[2]), (0, x, p)
        ),
        ONE,
    ),
    "in the condition of a while": (
        lambda p, x: lax.while_loop(lambda c: (c @ p).sum() < -1e9, lambda c: c + 1, x),
        ONE,
    ),
    "in both branches": (
        lambda p, x: lax.cond(x.sum() > 0, lambda p, x: x @ p, lambda p, x: x @ p.T, p, x),
        ONE,
    ),
    "an output of a switch": (lambda p, x: lax.switch(2, [lambda p, x: (p, x)] * 3, p, x), ONE),
    "platform dependent": (
        lambda p, x: lax.platform_dependent(
            p, x, cpu=lambda p, x: x @ p, default=lambda p, x: 2 * x @ p
        ),
        ONE,
    ),
    "a scan in a scan": (
        lambda p, x: scan3(
            lambda c, _: (lax.scan(lambda c, q: (jnp.tanh(c @ q), None), c, p)[0], None), x
        ),
        STACK,
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_places(name):
    fn, w = PLACES[name]
    check(fn, w, X, tol=1e-4, gradients=False)


@pytest.mark.parametrize(
    "name",
    ["scanned over", "a constant of a scan", "scanned over rows", "in both branches"],
)
def test_gradients(name):
    fn, w = PLACES[name]
    check(lambda p, x: jax.tree.leaves(fn(p, x))[0], w, X, tol=1e-4)


CHANGES = {
    "scan": lambda p, x: scan3(lambda c, _: ((c[0] @ c[1], c[1] * 0.5), None), (x, p))[0],
    "while": lambda p, x: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 0.5), (0, p)
    ),
    "cond": lambda p, x: lax.cond(x.sum() > 0, lambda p: p, lambda p: p * 2, p),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_type_that_changes_goes_dense_and_is_recorded(name):
    lifted = lift(CHANGES[name])
    close(lifted(ONE, X), CHANGES[name](ONE.dense(), X))
    assert any("type" in record.reason for record in lifted.materialized())


def test_carries_that_depend_on_each_other_settle():
    """Making one carry dense makes another change its type: settled in two rounds."""

    def f(p, x):
        return scan3(lambda c, _: ((c[1], c[0] * 0.5), None), (p, p))[0]

    close(lift(f)(ONE, X), f(ONE.dense(), X))


def test_a_scan_of_length_zero():
    def f(p, x):
        return lax.scan(lambda c, q: (c @ q, None), x, p[:0])[0]

    close(lift(f)(STACK, X), X)


def test_remat_keeps_its_parameters():
    """Policies survive; so does differentiated=True, in the jaxpr of a gradient."""
    policy = jax.checkpoint_policies.save_only_these_names("kept")

    def body(p, x):
        return jnp.sin(jax.ad_checkpoint.checkpoint_name(jnp.sin(x @ p) @ p, "kept"))

    f = jax.checkpoint(body, policy=policy)
    check(f, ONE, X, grad_tol=5e-3)

    def gradient(p, x):
        return jax.grad(lambda x: f(p, x).sum())(x)

    lifted = lift(gradient)
    close(lifted(ONE, X), gradient(ONE.dense(), X), 1e-3)
    assert lifted.materialized() == []

    def remats(fn, p):
        found = equations(jax.make_jaxpr(fn)(p, X).jaxpr)
        remats = [e.params for e in found if e.primitive.name == "remat2"]
        return [params for params in remats if params["policy"] is policy]  # products have theirs

    ours, theirs = remats(lift(gradient), ONE), remats(gradient, ONE.dense())
    assert [e["differentiated"] for e in ours] == [e["differentiated"] for e in theirs]
    assert any(e["differentiated"] for e in ours)


def test_scan_of_remat_inside_and_outside():
    def f(p, x):
        return jnp.tanh(x @ p) @ p.T

    def inside(p, x):
        return scan3(jax.checkpoint(lambda c, _: (f(p, c), None)), x)[0]

    check(inside, ONE, X, grad_tol=1e-2)

    def outside(w, x):
        return scan3(jax.checkpoint(lambda c, _: (lift(f)(w, c), None)), x)[0]

    close(outside(ONE, X), inside(ONE.dense(), X), 1e-4)
    close(
        jax.grad(lambda x: outside(ONE, x).sum())(X),
        jax.grad(lambda x: inside(ONE.dense(), x).sum())(X),
        1e-3,
    )


def test_untouched_parts_are_bound_as_traced(capfd):
    """Remat policies, donation, names, shardings, and effects that fire once."""
    policy = jax.checkpoint_policies.save_only_these_names("kept")
    named = jax.jit(lambda x: jnp.sin(x), donate_argnums=(0,))

    def f(p, x):
        x = jax.checkpoint(
            lambda x: jnp.sin(jax.ad_checkpoint.checkpoint_name(jnp.cos(x), "kept")), policy=policy
        )(x)
        jax.debug.print("ONE {}", x.sum(), ordered=True)
        jax.debug.print("TWO {}", x.sum())
        x = named(x)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        x = lax.with_sharding_constraint(x, place)

        def body(c, _):
            jax.debug.print("IN {}", c.sum())
            return c @ p, None

        return lax.scan(body, x, None, length=2)[0]

    ours = jax.make_jaxpr(lift(f))(ONE, X)
    theirs = jax.make_jaxpr(f)(ONE.dense(), X)

    def params(closed, name):
        found = [e.params for e in closed.jaxpr.eqns if e.primitive.name == name]
        if name == "jit":
            found = [p for p in found if p["name"] == "<lambda>"]
        return [{k: str(v) for k, v in p.items() if k != "fmt"} for p in found]

    for name in ("remat2", "jit", "sharding_constraint"):
        assert params(ours, name) == params(theirs, name)
        assert params(ours, name)
    assert ours.effects == theirs.effects
    jax.jit(lift(f))(ONE, X).block_until_ready()
    jax.effects_barrier()
    printed = capfd.readouterr().out
    assert [printed.count(word) for word in ("ONE", "TWO", "IN")] == [1, 1, 2]


def layers(n, d=16):
    return [{"a": affine(i, d, 2 * d), "b": affine(i + 30, 2 * d, d)} for i in range(n)]


def test_equal_layers_are_lifted_once_and_a_second_call_traces_nothing():
    traced = []

    @jax.jit
    def layer(p, x):
        traced.append("layer")
        return x + jnp.tanh(x @ p["a"]) @ p["b"]

    def f(ps, x):
        traced.append("function")
        for p in ps:
            x = layer(p, x)
        return x

    ps, lifted = layers(8), lift(f)
    y = lifted(ps, X)
    assert traced == ["function", "layer"]
    assert lifted.walk.traces == {"function": 1, "body": 2}  # the whole, and one layer
    close(lifted(ps, X), y)
    assert traced == ["function", "layer"]
    assert lifted.walk.traces == {"function": 1, "body": 2}
    calls = [e for e in jax.make_jaxpr(lifted)(ps, X).eqns if e.primitive.name == "jit"]
    calls = [e for e in calls if e.params["name"] == "layer"]
    assert len(calls) == 8
    assert len({id(e.params["jaxpr"]) for e in calls}) == 1
    close(y, f(densify(ps), X), 1e-3)


def test_transformations_share_one_trace():
    traced = []

    def f(p, x):
        traced.append(x.shape)
        return jnp.tanh(x @ p)

    lifted = lift(f)

    @jax.jit
    def loss(w, x):
        return scan3(jax.checkpoint(lambda c, _: (lifted(w, c), None)), x)[0].sum()

    loss(ONE, X)
    jax.grad(loss, 1)(ONE, X)
    jax.vmap(lambda x: lifted(ONE, x))(X)
    jax.jit(lifted)(ONE, X)
    lifted(ONE, X)
    assert traced == [(5, 16), (16,)]


def test_the_cache_of_bodies_is_bounded():
    lifted = lift(lambda p, x: jax.jit(lambda p, x: x @ p)(p, x))
    lifted.walk.bodies.limit = 3
    for n in range(1, 6):
        lifted(ONE, normal(n, n, 16))
    assert len(lifted.walk.bodies) == 3


def test_donation_and_names_of_a_nested_jit_are_kept():
    f = jax.jit(lambda p, x: x @ p, donate_argnums=1)
    eqns = jax.make_jaxpr(lift(lambda p, x: f(p, x)))(ONE, X).eqns
    (call,) = [e for e in eqns if e.primitive.name == "jit"]
    assert call.params["donated_invars"] == (False, False, True)
    assert call.params["name"] == "<lambda>"


def test_custom_vmap():
    @jax.custom_batching.custom_vmap
    def product(p, x):
        return x @ p

    rules = []

    @product.def_vmap
    def rule(size, batched, p, x):
        rules.append(tuple(batched))
        assert batched == [False, True]
        return jnp.einsum("bk,kn->bn", x, p) * 3, True

    close(lift(product)(ONE, X), X @ ONE.dense())

    def f(p, x):
        return jax.vmap(lambda x: product(p, x))(x)

    close(lift(f)(ONE, X), f(ONE.dense(), X))
    close(jax.vmap(lambda x: lift(product)(ONE, x))(X), 3 * X @ ONE.dense())
    assert rules


def test_without_a_compressed_leaf_the_function_itself_runs():
    def f(p, x):
        return jnp.tanh(x @ p)

    called = []

    def spy(*args):
        called.append(args)
        return f(*args)

    dense = ONE.dense()
    lift(spy)(dense, X)
    assert called[0][0] is dense  # not a tracer: the user's own call
    texts = [
        jax.jit(g).lower(dense, X).compile().as_text().count(" = ")
        for g in (f, lift(f), Lifted(f, always=True))
    ]
    assert texts[0] == texts[1] == texts[2]
    for g in (lift(f), Lifted(f, always=True)):
        np.testing.assert_array_equal(jax.jit(g)(dense, X), jax.jit(f)(dense, X))


def test_the_forced_walk_keeps_operation_counts_of_control_flow():
    def f(p, x):
        y = lax.scan(jax.checkpoint(lambda c, q: (jnp.tanh(c @ q), c.sum())), x, p)
        return lax.cond(y[1].sum() > 0, lambda: y[0], lambda: jax.jit(jnp.sin)(y[0]))

    dense = STACK.dense()
    ours = jax.jit(Lifted(f, always=True)).lower(dense, X).compile().as_text()
    theirs = jax.jit(f).lower(dense, X).compile().as_text()
    assert ours.count(" = ") == theirs.count(" = ")
    assert primitives(jax.make_jaxpr(Lifted(f, always=True))(dense, X).jaxpr) == primitives(
        jax.make_jaxpr(f)(dense, X).jaxpr
    )


def test_unknown_calls_go_dense_with_a_record():
    def f(p, x):
        return jax.pure_callback(lambda p: np.asarray(p) * 2, jax.typeof(p), p)

    (record,) = materialized(f)(ONE, X)
    assert record.primitive == "pure_callback"
    close(lift(f)(ONE, X), 2 * ONE.dense())
