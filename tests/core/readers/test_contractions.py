"""contractions: the contracted axes of every parameter, whatever the layout."""

import pickle

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from lift_cases import affine, normal

from jaxcompress.core.readers.contractions import ContractedAxes, contractions

X = normal(1, 5, 16)


def axes_of(fn, shape, x=X):
    found = contractions(fn)(jax.ShapeDtypeStruct(shape, jnp.float32), x)
    return (tuple(found[""]), found[""].lead) if found else None


CASES = {
    "[in, out]": (lambda p, x: x @ p, (16, 8), ((0,), 0)),
    "[out, in]": (lambda p, x: x @ p.T, (8, 16), ((1,), 0)),
    "[in, heads, dim]": (lambda p, x: jnp.einsum("te,ehd->thd", x, p), (16, 2, 4), ((0,), 0)),
    "[heads, dim, out]": (
        lambda p, x: jnp.einsum("thd,hde->te", x.reshape(5, 2, 8), p),
        (2, 8, 6),
        ((0, 1), 0),
    ),
    "[heads, in, dim]": (lambda p, x: jnp.einsum("te,hed->thd", x, p), (2, 16, 4), ((1,), 0)),
    "folded heads": (lambda p, x: x @ p.reshape(16, 8), (2, 8, 8), ((0, 1), 0)),
    "unfolded": (
        lambda p, x: jnp.einsum("tab,abn->tn", x.reshape(5, 4, 4), p.reshape(4, 4, 3)),
        (16, 3),
        ((0,), 0),
    ),
    "scanned": (
        lambda p, x: lax.scan(lambda c, q: (c @ q, None), x, p)[0],
        (3, 16, 16),
        ((1,), 1),
    ),
    "scanned, transposed": (
        lambda p, x: lax.scan(lambda c, q: (c @ q.T, None), x, p)[0],
        (3, 16, 16),
        ((2,), 1),
    ),
    "experts": (
        lambda p, x: jnp.einsum("etk,ekn->etn", jnp.stack([x] * 3), p),
        (3, 16, 4),
        ((1,), 1),
    ),
    "layers of experts": (
        lambda p, x: lax.scan(lambda c, q: (jnp.einsum("tk,ekn->etn", c, q).mean(0), None), x, p)[
            0
        ],
        (2, 3, 16, 16),
        ((2,), 1),
    ),
    "layers of batched experts": (
        lambda p, x: lax.scan(
            lambda c, q: (jnp.einsum("etk,ekn->etn", c, q), None), jnp.stack([x] * 3), p
        )[0],
        (2, 3, 16, 16),
        ((2,), 2),
    ),
    "vmap over the parameter": (
        lambda p, x: jax.vmap(lambda q: x @ q)(p),
        (3, 16, 4),
        ((1,), 0),
    ),
    "vmap over both": (
        lambda p, x: jax.vmap(lambda q, x: x @ q)(p, jnp.stack([x] * 3)),
        (3, 16, 4),
        ((1,), 1),
    ),
    "one layer": (lambda p, x: x @ p[1], (3, 16, 4), ((1,), 1)),
    "a layer at a traced place": (
        lambda p, x: lax.fori_loop(0, 3, lambda i, c: c @ p[i], x),
        (3, 16, 16),
        ((1,), 1),
    ),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(
            x.reshape(1, 4, 5, 4), p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (3, 2, 4, 6),
        ((0, 1, 2), 0),
    ),
    "convolution of PyTorch": (
        lambda p, x: lax.conv(x.reshape(1, 4, 4, 5), p, (1, 1), "SAME"),
        (6, 4, 2, 3),
        ((1, 2, 3), 0),
    ),
    "table": (lambda p, x: p[jnp.argmax(x, -1)], (16, 8), ((1,), 0)),
    "tied table": (lambda p, x: p[jnp.argmax(x, -1)] @ p.T, (16, 8), ((1,), 0)),
    "taken": (lambda p, x: jnp.take(p, jnp.argmax(x, -1), axis=1), (8, 16), ((0,), 0)),
    "in jit, remat and a custom rule": (
        jax.jit(jax.checkpoint(lambda p, x: jax.nn.relu(x @ jnp.abs(p).T))),
        (8, 16),
        ((1,), 0),
    ),
    "behind a mask": (lambda p, x: x @ jnp.where(p > 0, p, 0), (16, 8), ((0,), 0)),
    "returned by a call": (
        lambda p, x: x @ jax.jit(lambda p: jnp.swapaxes(p, 0, 1))(p),
        (8, 16),
        ((1,), 0),
    ),
    "a bias": (lambda p, x: x + p, (16,), None),
    "a gain": (lambda p, x: jnp.tanh(x * p), (16,), None),
    "a part of an axis": (lambda p, x: x[:, :8] @ p[:8], (16, 4), None),
}


@pytest.mark.parametrize("name", CASES)
def test_layouts(name):
    fn, shape, expected = CASES[name]
    assert axes_of(fn, shape) == expected


def test_paths_and_compressed_parameters():
    params = {"layers": [{"kernel": affine(1, 16, 16), "bias": jnp.ones(16)}]}

    def f(p, x):
        return x @ p["layers"][0]["kernel"] + p["layers"][0]["bias"]

    assert contractions(f)(params, X) == {"layers/0/kernel": (0,)}


def test_the_first_product_counts():
    both = contractions(lambda p, x: jnp.tanh(x @ p) @ p.T)(normal(2, 16, 8), X)
    assert both == {"": (0,)}


def test_nothing_is_computed():
    ran = []

    def f(p, x):
        jax.debug.callback(lambda: ran.append(1))
        return x @ p

    contractions(f)(normal(2, 16, 8), X)
    jax.effects_barrier()
    assert not ran


def test_the_tuple_is_one():
    axes = ContractedAxes((1, 2), lead=1)
    assert axes == (1, 2)
    assert hash(axes) == hash((1, 2))
    again = pickle.loads(pickle.dumps(axes))
    assert (again, again.lead) == ((1, 2), 1)
    assert repr(axes) == "ContractedAxes((1, 2), lead=1)"
