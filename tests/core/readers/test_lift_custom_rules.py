"""The user's own derivatives hold under lift: custom_jvp and custom_vjp."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from lift_cases import affine, check, close, float_gradients, low_rank, normal

from jaxcompress.core.arrays.base import densify
from jaxcompress.core.readers import unofficial
from jaxcompress.core.readers.lift import lift

X = normal(3, 5, 16)
WEIGHTS = {
    "symmetric": affine(1, 16, 8),
    "asymmetric": affine(1, 16, 8, symmetric=False),
    "low rank": low_rank(1, 8, 16),
}


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x * 4) / 4


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (g,))


@jax.custom_jvp
def sign(x):
    return jnp.sign(x)


sign.defjvp(lambda primals, tangents: (sign(*primals), tangents[0] * 3))


@jax.custom_vjp
def linear(x, w):
    return x @ w


# Wrong on purpose: these gradients can come from nowhere else.
linear.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda saved, g: (7 * g @ saved[1].T, 5 * saved[0].T @ g)
)


@jax.custom_jvp
def linear_jvp(x, w):
    return x @ w


linear_jvp.defjvp(lambda p, t: (linear_jvp(*p), 7 * t[0] @ p[1] + 5 * p[0] @ t[1]))


def symbolic(x, w):
    return x @ w


symbolic_vjp = jax.custom_vjp(symbolic)


def symbolic_forward(x, w):
    return x.value @ w.value, (x.value, w.value, x.perturbed, w.perturbed)


symbolic_vjp.defvjp(
    symbolic_forward,
    lambda saved, g: (7 * g @ saved[1].T, 5 * saved[0].T @ g),
    symbolic_zeros=True,
)

CASES = {
    "straight-through weight": lambda p, x: x @ straight_through(p),
    "straight-through input": lambda p, x: straight_through(x @ p),
    "custom_jvp of the weight": lambda p, x: x @ sign(p),
    "custom_jvp of the input": lambda p, x: sign(x @ p),
    "custom_vjp product": lambda p, x: linear(x, p),
    "custom_jvp product": lambda p, x: linear_jvp(x, p),
    "relu of both": lambda p, x: jax.nn.relu(x) @ jax.nn.relu(p),
    "in remat": jax.checkpoint(lambda p, x: straight_through(linear(x, p))),
    "in jit": jax.jit(lambda p, x: linear(straight_through(x), p)),
    "in scan": lambda p, x: lax.scan(
        lambda c, _: (c + linear(x, p), None), jnp.zeros((5, 8)), None, length=3
    )[0],
    "in vmap": lambda p, x: jax.vmap(lambda x: linear(x[None], p)[0])(x),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_users(name):
    w = WEIGHTS["symmetric"]
    check(CASES[name], w, X, grad_tol=2e-3, empty=False)
    close(
        float_gradients(jax.jit(lift(CASES[name])), w, X),
        float_gradients(lambda p, x: CASES[name](densify(p), x), w, X),
        2e-3,
    )


@pytest.mark.parametrize("kind", ["asymmetric", "low rank"])
@pytest.mark.parametrize("name", ["custom_vjp product", "custom_jvp product", "in remat"])
def test_other_formats(name, kind):
    check(CASES[name], WEIGHTS[kind], X, grad_tol=2e-3, empty=False)


def test_forward_and_backward_rules_stay_packed():
    w, lifted = WEIGHTS["symmetric"], lift(CASES["custom_vjp product"])
    gradient = jax.grad(lambda x: (lifted(w, x) ** 2).sum())(X)
    close(gradient, 7 * 2 * (X @ w.dense()) @ w.dense().T, 1e-3)
    assert lifted.materialized() == []


def test_rules_of_an_unknown_layout_fall_back_to_the_equation(monkeypatch):
    monkeypatch.setattr(unofficial, "has_custom_vjp_rules", lambda eqn: False)
    for name in ("custom_vjp product", "straight-through weight", "in jit", "in scan"):
        check(CASES[name], WEIGHTS["symmetric"], X, grad_tol=2e-3, empty=False)


def test_a_closed_over_constant_is_not_perturbed():
    def f(p, x):
        c = jnp.cos(x).sum()

        @jax.custom_vjp
        def h(x, w):
            return x @ w + 0 * c

        # A forward rule that closes over c fails under plain jit and grad, too.
        h.defvjp(lambda x, w: (x @ w, (x, w)), lambda s, g: (7 * g @ s[1].T, s[0].T @ g))
        return h(jnp.ones((5, 16)), p)

    w = WEIGHTS["symmetric"]
    ours = jax.grad(lambda s: (lift(f)(w.replace(scale=s), X) ** 2).sum())(w.scale)

    def dense(s):
        return jax.jit(lambda w: (f(w, X) ** 2).sum())(w.replace(scale=s).dense())

    close(ours, jax.grad(dense)(w.scale), 1e-3)


def test_residuals_that_are_operands_after_constants():
    """Positions of forwarded residuals count the hoisted constants."""

    def f(p, x):
        c = jnp.sin(x)  # a tracer of the function being lifted: a hoisted constant

        @jax.custom_vjp
        def h(w):
            return c @ w

        h.defvjp(lambda w: (jnp.ones((5, 16)) @ w, w), lambda w, g: (3.0 * w,))
        return h(p)

    w = WEIGHTS["symmetric"]
    ours = jax.grad(lambda s: lift(f)(w.replace(scale=s), X).sum())(w.scale)
    pulled = jax.vjp(lambda s: w.replace(scale=s).dense(), w.scale)[1](3.0 * w.dense())[0]
    close(ours, pulled, 1e-3)


def test_symbolic_zeros():
    w = WEIGHTS["symmetric"]
    check(lambda p, x: symbolic_vjp(x, p), w, X, grad_tol=2e-3)
    close(
        jax.grad(lambda x: lift(lambda p, x: symbolic_vjp(x, p))(w, x).sum())(X),
        7 * jnp.ones((5, 8)) @ w.dense().T,
        1e-3,
    )


def test_tangents_of_custom_jvp():
    w = WEIGHTS["symmetric"]
    ours = jax.jvp(lambda x: lift(CASES["custom_jvp product"])(w, x), (X,), (X,))
    close(ours, jax.jvp(lambda x: linear_jvp(x, w.dense()), (X,), (X,)))


def test_vmap_of_lift_and_lift_of_vmap():
    stack = affine(1, 3, 16, 8)

    def one(q, x):
        return linear(straight_through(x), q)

    def many(p, x):
        return jax.vmap(one, (0, None))(p, x)

    check(many, stack, X, grad_tol=5e-3, empty=False)
    outside = jax.vmap(lift(one), (0, None))
    close(
        float_gradients(outside, stack, X),
        float_gradients(lambda p, x: many(densify(p), x), stack, X),
        5e-3,
    )


def test_integer_outputs_of_a_custom_vjp():
    @jax.custom_vjp
    def f(x, w):
        return x @ w, jnp.argmax(x @ w, -1)

    f.defvjp(lambda x, w: (f(x, w), w), lambda w, g: (2 * g[0] @ w.T, jnp.zeros_like(w)))
    w = WEIGHTS["symmetric"]
    gradient = jax.grad(lambda x: lift(lambda p, x: f(x, p))(w, x)[0].sum())(X)
    close(gradient, 2 * jnp.ones((5, 8)) @ w.dense().T, 1e-3)
