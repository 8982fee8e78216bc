"""A function cut between the weights that it reads computes, part after part, what it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.core.readers.lift import lift
from jaxcompress.core.readers.parts import parts

RNG = np.random.default_rng(0)


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape) / 3, jnp.float32)


PARAMS = {
    "q": drawn(8, 8),
    "k": drawn(8, 8),
    "o": drawn(8, 8),
    "up": drawn(16, 8),
    "down": drawn(8, 16),
    "gain": drawn(8),
}
GROUPS = [("q", "k"), ("o",), ("up",), ("down",)]


def block(params, inputs):
    """Attention and two products behind it; `shift` goes in at the start and at the end."""
    h, shift = inputs["h"], inputs["shift"]
    past = jnp.tril(jnp.ones((h.shape[1],) * 2)) * params["gain"].sum()
    x = h * params["gain"]
    scores = jnp.einsum("btk,bsk->bts", x @ params["q"].T, x @ params["k"].T)
    h = h + (jax.nn.softmax(scores + past) @ x) @ params["o"].T
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w.T))(params["up"], h + shift)
    out = jax.checkpoint(lambda w, x: x @ w.T)(params["down"], inner)
    return {"h": h + out, "shift": shift, "name": "block"}


def inputs():
    return {"h": drawn(2, 5, 8), "shift": jnp.float32(0.5)}


def run(cut, params, values):
    for part in cut:
        values = lift(part.function)(params, values)
    return values


@pytest.mark.parametrize("function", [block, jax.jit(lambda p, x: block(p, x) | {"name": None})])
def test_the_parts_are_the_function(function):
    given = inputs()
    cut = parts(function, PARAMS, given, GROUPS)
    assert [part.groups for part in cut] == [(0,), (1,), (2,), (3,)]
    found, expected = run(cut, PARAMS, given), function(PARAMS, given)
    assert found.pop("name") == expected.pop("name")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_a_part_reads_its_own_weights_alone():
    given = inputs()
    values = given
    for part, group in zip(parts(block, PARAMS, given, GROUPS), GROUPS, strict=True):
        spoilt = {
            n: leaf if n in (*group, "gain") else leaf * jnp.nan for n, leaf in PARAMS.items()
        }
        values = part.function(spoilt, values)
    np.testing.assert_allclose(values["h"], block(PARAMS, given)["h"], rtol=1e-6)


def test_nothing_is_computed_twice():
    """All parts together multiply as often as the function, and what follows from parameters
    alone is not handed on."""
    values = inputs()
    products = 0
    for part in parts(lambda p, x: block(p, x)["h"], PARAMS, values, GROUPS):
        products += str(jax.make_jaxpr(part.function)(PARAMS, values)).count("dot_general")
        values = part.function(PARAMS, values)
        assert all(leaf.shape in [(2, 5, 8), (2, 5, 16), ()] for leaf in jax.tree.leaves(values))
    assert products == 7


def test_compressed_weights_go_through():
    given = inputs()
    model = jc.Model(lambda params, h: block(params, {"h": h, "shift": 0.5})["h"], PARAMS)
    small = jc.compress(model, "rtn", include=["[qko]", "up", "down"], group_size=8)
    found = run(parts(block, PARAMS, given, GROUPS), small.params, given)
    expected = lift(block)(small.params, given)
    np.testing.assert_allclose(found["h"], expected["h"], rtol=1e-5)


def twice(params, x):
    """The first weight is read again behind the second."""
    h = jnp.tanh(x @ params["q"].T)
    h = jnp.tanh(h @ params["k"].T)
    h = jnp.tanh(h @ params["q"].T)
    return h @ params["o"].T


def in_one_loop(params, x):
    def step(h, _):
        return jnp.tanh(jnp.tanh(h @ params["q"].T) @ params["k"].T), None

    return jax.lax.scan(step, x, None, length=3)[0] @ params["o"].T


@pytest.mark.parametrize("function", [twice, in_one_loop])
def test_groups_that_cannot_be_told_apart_stay_together(function):
    x = drawn(3, 8)
    cut = parts(function, PARAMS, x, [("q",), ("k",), ("o",)])
    assert [part.groups for part in cut] == [(0, 1), (2,)]
    np.testing.assert_allclose(run(cut, PARAMS, x), function(PARAMS, x), rtol=1e-6)
