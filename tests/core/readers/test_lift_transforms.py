"""lift under and over JAX's transformations; views; what is traced and what is static."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from lift_cases import affine, check, close, float_gradients, low_rank, normal

from jaxcompress.core.arrays.base import STORED, densify
from jaxcompress.core.readers.lift import lift, materialized

WEIGHTS = {
    "symmetric": lambda: affine(1, 16, 8),
    "asymmetric": lambda: affine(1, 16, 8, symmetric=False),
    "per tensor": lambda: affine(1, 16, 8, per_tensor=True),
    "3 bits": lambda: affine(1, 16, 8, bits=3),
    "low rank": lambda: low_rank(1, 8, 16),
}

X = normal(2, 5, 16)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_outputs_and_gradients(kind):
    w = WEIGHTS[kind]()
    check(lambda p, x: jnp.tanh(x @ p) @ p.T, w, X)


VIEWS = {
    "heads": lambda w, x: jnp.einsum("tk,khd->thd", x, w.reshape(16, 2, 4)),
    "twice transposed": lambda w, x: x @ w.T.T,
    "reshaped there and back": lambda w, x: x @ w.reshape(4, 4, 8).reshape(16, 8),
    "other axes": lambda w, x: jnp.einsum("kn,tk->nt", w, x),
    "expanded and taken": lambda w, x: x @ w[None][0],
    "broadcast": lambda w, x: jnp.stack([x, x]) @ jnp.broadcast_to(w, (2, 16, 8)),
    "over the rows": lambda w, x: (x @ w) @ w.T,
    "rows sliced": lambda w, x: x @ w[:, 2:6],
    "rows split": lambda w, x: sum(x @ part for part in jnp.split(w, 2, axis=1)),
    "rows with a stride": lambda w, x: x @ w[:, ::3],
    "rows at a traced place": lambda w, x: x @ lax.dynamic_slice(w, (0, jnp.int32(3)), (16, 4)),
    "concatenated rows": lambda w, x: x @ jnp.concatenate([w, w[:, :3]], axis=1),
    "stacked": lambda w, x: jnp.einsum("tk,lkn->ltn", x, jnp.stack([w, w])),
    "tiled rows": lambda w, x: jnp.einsum(
        "tk,krn->trn", x, jnp.broadcast_to(w[:, None], (16, 3, 8))
    ),
    "a product in bfloat16": lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(
        jnp.float32
    ),
    "vector": lambda w, x: x[0] @ w,
    "squeezed": lambda w, x: x @ jnp.squeeze(w[:, None, :], 1),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("kind", ["symmetric", "low rank"])
def test_views_stay_compressed(name, kind):
    w = WEIGHTS[kind]()
    factors_have_no_rows_to_join = kind == "low rank" and name == "concatenated rows"
    tol = 0.05 if "bfloat16" in name else 2e-5
    check(
        VIEWS[name],
        w,
        X,
        tol=tol,
        grad_tol=50 * tol,
        empty=not factors_have_no_rows_to_join,
        gradients="bfloat16" not in name,
    )


STACKED = {
    "batched": lambda p, x: jnp.einsum("tk,lkn->ltn", x, p),
    "batched by x": lambda p, x: jnp.einsum("ltk,lkn->ltn", jnp.stack([x, x, 2 * x]), p),
    "summed over": lambda p, x: jnp.einsum("ltk,lkn->tn", jnp.stack([x, x, 2 * x]), p),
    "leading axis in the middle": lambda p, x: jnp.einsum("tk,kln->tln", x, p.transpose(1, 0, 2)),
    "leading axis merged": lambda p, x: x @ p.transpose(1, 0, 2).reshape(16, 24),
    "one of them": lambda p, x: x @ p[1],
    "one at a traced place": lambda p, x: x @ p[jnp.int32(1)],
    "some of them": lambda p, x: jnp.einsum("tk,lkn->ltn", x, p[jnp.array([2, 0])]),
    "over rows": lambda p, x: jnp.einsum("tn,lkn->ltk", x[:, :8], p),
}


@pytest.mark.parametrize("name", STACKED)
def test_leading_axes_in_any_role(name):
    check(STACKED[name], affine(3, 3, 16, 8), X, tol=1e-4)


def test_a_leading_axis_of_factors_repeats_the_other_operand():
    a = jax.tree.map(lambda *x: jnp.stack(x), low_rank(1, 8, 16), low_rank(5, 8, 16))
    check(lambda p, x: jnp.einsum("tk,lkn->ltn", x, p), a, X, tol=1e-4)


def test_what_cannot_stay_compressed_is_recorded_with_its_line():
    records = materialized(lambda p, x: x @ jnp.sin(p))(affine(1, 16, 8), X)
    (record,) = records
    assert (record.primitive, record.shape, record.count) == ("sin", (16, 8), 1)
    assert "test_lift_transforms.py" in record.line
    assert "dense" in record.reason or "compressed" in record.reason


def test_materialized_needs_only_shapes():
    w = jax.eval_shape(lambda: affine(1, 16, 8))
    assert materialized(lambda p, x: x @ p)(w, jax.ShapeDtypeStruct((5, 16), jnp.float32)) == []


def test_jit_vmap_and_linearize():
    w, f = affine(1, 16, 16), lambda p, x: jnp.tanh(x @ p) @ p.T
    y = f(w.dense(), X)
    close(lift(jax.jit(f))(w, X), y)
    close(jax.vmap(lift(f), (None, 0))(w, X), y)
    close(lift(jax.vmap(f, (None, 0)))(w, X), y)
    _, tangent = jax.linearize(lambda x: lift(f)(w, x), X)
    close(tangent(X), jax.jvp(lambda x: f(w.dense(), x), (X,), (X,))[1], 1e-4)
    close(
        jax.jvp(lambda x: lift(f)(w, x), (X,), (X,))[1],
        jax.jvp(lambda x: f(w.dense(), x), (X,), (X,))[1],
        1e-4,
    )


def test_vmap_over_weights_inside_and_outside():
    ws, f = affine(4, 3, 16, 16), lambda p, x: jnp.tanh(x @ p) @ p.T
    expected = jax.vmap(f, (0, None))(ws.dense(), X)
    close(jax.vmap(lift(f), (0, None))(ws, X), expected, 1e-4)
    lifted = lift(jax.vmap(f, (0, None)))
    close(lifted(ws, X), expected, 1e-4)
    assert lifted.materialized() == []
    twice = affine(4, 3, 2, 16, 8)
    product = jax.vmap(jax.vmap(lift(lambda w, x: x @ w), (0, None)), (0, None))
    close(product(twice, X), jnp.einsum("tk,abkn->abtn", X, twice.dense()))


def test_lift_of_a_gradient():
    w = affine(1, 16, 16)

    def f(p, x):
        return jax.grad(lambda x: ((jnp.tanh(x @ p) @ p.T) ** 2).sum())(x)

    lifted = lift(f)
    close(lifted(w, X), f(w.dense(), X), 1e-3)
    assert lifted.materialized() == []

    def by_weight(p, x):
        return jax.grad(lambda p: ((x @ p) ** 2).sum())(p)

    close(lift(by_weight)(w, X), by_weight(w.dense(), X), 1e-3)


def test_second_derivatives():
    w, f = affine(1, 16, 16), lambda p, x: (jnp.tanh(x @ p) ** 2).sum()

    def hvp(f):
        return jax.jvp(jax.grad(f), (X,), (X,))[1]

    close(hvp(lambda x: lift(f)(w, x)), hvp(lambda x: f(w.dense(), x)), 1e-3)


def test_only_arrays_are_traced():
    seen = []

    def f(p, x, flag, name=None, act=jnp.tanh, n=3):
        seen.append((flag, name, n))
        return act(x @ p["w"]) * n if flag else (x, name is None, None, "s")

    w, lifted = affine(1, 16, 8), lift(f)
    params = {"w": w, "none": None}
    close(lifted(params, X, True, name="a", act=jnp.sin, n=2), jnp.sin(X @ w.dense()) * 2)
    lifted(params, X, True, name="a", act=jnp.sin, n=2)
    assert seen == [(True, "a", 2)]
    assert lifted(params, X, False)[1:] == (True, None, "s")
    lifted(params, X, 1)  # 1 == True, and yet another value
    assert seen[1:] == [(False, None, 3), (1, None, 3)]
    assert isinstance(seen[-1][0], int)
    assert not isinstance(seen[-1][0], bool)


def test_weak_types_keys_and_constants():
    constant, w = normal(5, 5, 8), affine(1, 16, 8)

    def f(p, x, s, key):
        assert jax.typeof(s).weak_type
        noise = jax.random.uniform(key, (5, 8), jnp.bfloat16)
        return (x @ p).astype(jnp.bfloat16) * s + noise + constant.astype(jnp.bfloat16)

    args = (X, jnp.asarray(2.0), jax.random.key(3))
    y = lift(f)(w, *args)
    assert y.dtype == jnp.bfloat16
    close(y, f(w.dense(), *args), 5e-2)
    old_style = jax.random.PRNGKey(0)
    close(
        lift(lambda p, k: jax.random.normal(k, (3, 16)) @ p)(w, old_style),
        jax.random.normal(old_style, (3, 16)) @ w.dense(),
    )


def test_closed_over_tracers():
    w = affine(1, 16, 8)

    def outer(y):
        return lift(lambda p: (y @ p) * y.sum())(w)

    def dense(y):
        return (y @ w.dense()) * y.sum()

    close(jax.jit(outer)(X), dense(X), 1e-4)
    close(jax.grad(lambda y: outer(y).sum())(X), jax.grad(lambda y: dense(y).sum())(X), 1e-4)
    lifted = lift(lambda p, z: z @ p)
    close(jax.vmap(lambda z: lifted(w, z))(X), X @ w.dense())


def test_closed_over_arrays_are_not_baked_in():
    """A second call with the same structure sees the arrays of its own trace."""
    w = affine(1, 16, 8)
    for c in (1.0, 2.0):
        constant = jnp.full((5, 8), c)
        close(lift(lambda p, x, constant=constant: x @ p + constant)(w, X), X @ w.dense() + c)


def test_numpy_leaves():
    w = affine(1, 16, 8)
    close(lift(lambda p, x: x @ p)(w, np.asarray(X)), X @ w.dense())


def test_compressed_outputs_and_arguments_by_keyword():
    w = affine(1, 16, 8)
    out = lift(lambda *, params, x: (params, x @ params))(params=w, x=X)
    close(out, (w, X @ w.dense()))
    assert jax.tree.structure(out[0]) == jax.tree.structure(w)


def test_float_gradients_of_a_stored_matrix():
    w = affine(1, 8, 16, dims=STORED)
    a = float_gradients(lift(lambda p, x: x @ p.T), w, X)
    b = float_gradients(lambda p, x: x @ densify(p).T, w, X)
    close(a, b, 1e-3)


def test_two_weights_multiplied_keep_the_larger_packed():
    a, b = affine(1, 16, 8), affine(2, 8, 4)
    lifted = lift(lambda p, x: x @ (p["a"] @ p["b"]))
    close(lifted({"a": a, "b": b}, X), X @ (a.dense() @ b.dense()), 1e-4)
    (record,) = lifted.materialized()
    assert record.shape == (8, 4)


def test_an_integer_weight_stays_exact():
    """The gradient of a function that does not touch a leaf is zero, not an error."""
    p = {"used": affine(1, 16, 8), "unused": affine(2, 16, 8)}
    grads = jax.grad(
        lambda s: lift(lambda p, x: (x @ p["used"]).sum())(
            {**p, "unused": p["unused"].replace(scale=s)}, X
        )
    )(p["unused"].scale)
    assert not np.asarray(grads).any()


@pytest.mark.parametrize("mode", ["clip", "fill"])
def test_embedding_reads_only_its_rows(mode):
    table = affine(1, 40, 16, dims=STORED)
    ids = jnp.array([[3, 0, 39], [7, 7, 41]])

    def f(p, x):
        return jnp.take(p, ids, axis=0, mode=mode)[..., :] * x.sum()

    lifted = lift(f)
    out, expected = lifted(table, X), f(table.dense(), X)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    close(jnp.nan_to_num(out), jnp.nan_to_num(expected))
    assert lifted.materialized() == []
    assert np.isnan(out).any() == (mode == "fill")


def test_embedding_gradient_and_indexing():
    table, ids = affine(1, 40, 16, dims=STORED), jnp.array([[3, 0, 39], [7, 7, -1]])
    check(lambda p, x: p[ids] * x[:3], table, X)
    lora = low_rank(3, 40, 16, dims=STORED)
    check(lambda p, x: p[ids] * x[:3], lora, X)
    fold = affine(1, 40, 4, 16, dims=(("n", -1), ("n", 4), ("k", -1)))
    check(lambda p, x: p[ids], fold, X)
