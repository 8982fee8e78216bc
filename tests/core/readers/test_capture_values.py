"""capture: statistics against what NumPy makes of the activations themselves."""

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from lift_cases import affine, close, normal

from jaxcompress.core.errors import InputError
from jaxcompress.core.readers.capture import Statistic, capture, combine, histogram_edges, means

X, W = normal(1, 5, 16), normal(2, 16, 16)
XTX = np.asarray(X, np.float64).T @ np.asarray(X, np.float64)
ALL = ("second_moment", "mean_abs", "max_abs", "histogram", "zeros")


def distinct(found):
    return len({id(statistic) for statistic in found.values()})


def test_every_statistic():
    x = X.at[0, :3].set(0.0)
    found = capture(lambda p, x: x @ p["w"], ALL)({"w": W}, x)
    (s,) = found.values()
    assert list(found) == [("w", 0)]
    rows = np.asarray(x, np.float64)
    close(s["second_moment"], rows.T @ rows, 1e-5)
    close(s["mean_abs"], np.abs(rows).sum(0), 1e-5)
    close(s["max_abs"], np.abs(rows).max(0), 1e-6)
    np.testing.assert_array_equal(s["zeros"], (rows == 0).sum(0))
    assert s["count"] == 5
    nonzero = np.abs(rows[rows != 0])
    expected = np.histogram(nonzero, histogram_edges())[0]
    expected[0] += (rows == 0).sum()
    np.testing.assert_array_equal(s["histogram"], expected)
    mean = means(s)
    close(mean["mean_abs"], np.abs(rows).mean(0), 1e-5)
    close(mean["zeros"], (rows == 0).mean(0), 1e-6)
    close(mean["max_abs"], s["max_abs"])


def test_functions_and_statistics_of_ones_own():
    def fourth_moment(x, weight):
        return {"m4": (x**4 * weight[..., None]).sum(-2)}

    smallest = Statistic("peak", lambda x, weight: jnp.abs(x).max((-2, -1)), largest=True)
    (s,) = capture(lambda p, x: x @ p, [fourth_moment, smallest])(W, X).values()
    close(s["fourth_moment"]["m4"], (np.asarray(X) ** 4).sum(0), 1e-3)
    close(s["peak"], np.abs(X).max())


@pytest.mark.parametrize(
    "bad", ["no_such", ["mean_abs", "mean_abs"], [3], Statistic("count", lambda x, w: x)]
)
def test_unknown_statistics(bad):
    with pytest.raises(InputError, match="statistic"):
        capture(lambda p, x: x @ p, bad)


def test_outputs_and_the_names_of_nested_parameters():
    params = {"layers": [{"kernel": W}, {"kernel": W}]}

    def f(p, x):
        for layer in p["layers"]:
            x = jnp.tanh(x @ layer["kernel"])
        return x

    out, found = capture(f, "mean_abs", with_outputs=True)(params, X)
    close(out, f(params, X))
    assert sorted(found) == [("layers/0/kernel", 0), ("layers/1/kernel", 0)]
    chosen = capture(f, "mean_abs", include="layers/1/**")(params, X)
    assert list(chosen) == [("layers/1/kernel", 0)]
    assert list(capture(f, "mean_abs", exclude="layers/1/*")(params, X)) == [("layers/0/kernel", 0)]


def test_products_that_read_one_value_share_one_statistic():
    layer = jax.jit(lambda p, x: x @ p)

    def f(p, x):
        return layer(p["a"], x), layer(p["b"], x), x @ p["c"], x.reshape(1, 5, 16) @ p["d"]

    found = capture(f, "second_moment")(dict.fromkeys("abcd", W), X)
    assert [key[0] for key in found] == list("abcd")
    assert found["a", 0] is found["b", 0] is found["c", 0]
    close(found["a", 0]["second_moment"], XTX, 1e-4)

    def views(p, x):  # the same view, made twice
        return x.reshape(1, 5, 16) @ p["a"], x.reshape(1, 5, 16) @ p["b"]

    assert distinct(capture(views, "second_moment")(dict.fromkeys("ab", W), X)) == 1

    def computed(p, x):
        return x @ p["a"], (x + 0) @ p["b"], x @ p["a"]

    found = capture(computed, "second_moment")(dict.fromkeys("ab", W), X)
    assert sorted(found) == [("a", 0), ("a", 1), ("b", 0)]
    assert found["a", 0] is found["a", 1] is not found["b", 0]


def test_nested_calls_keep_one_body():
    layer = jax.jit(lambda p, x: jnp.tanh(x @ p))

    def f(ps, x):
        for p in ps:
            x = layer(p, x)
        return x

    run = capture(f, "second_moment")
    found = run([normal(i, 16, 16) for i in range(6)], X)
    assert len(found) == 6
    assert run.observed.walk.traces == {"function": 1, "body": 2}
    close(found["0", 0]["second_moment"], XTX, 1e-4)
    run([normal(i, 16, 16) for i in range(6)], X)
    assert run.observed.walk.traces == {"function": 1, "body": 2}


def test_scanned_weights_are_stacked_and_shared_ones_summed():
    params = {"shared": W, "layers": normal(3, 3, 16, 16)}

    def f(p, x):
        def body(c, q):
            return jnp.tanh(c @ q + c @ p["shared"]), c

        return lax.scan(body, x, p["layers"])

    (_, inputs), found = capture(f, ALL, with_outputs=True)(params, X)
    rows = np.asarray(inputs, np.float64)  # [3, 5, 16]
    layers, shared = found["layers", 0], found["shared", 0]
    close(layers["second_moment"], np.einsum("ltk,ltm->lkm", rows, rows), 1e-4)
    np.testing.assert_array_equal(layers["count"], [5, 5, 5])
    close(shared["second_moment"], np.einsum("ltk,ltm->km", rows, rows), 1e-4)
    assert shared["count"] == 15
    close(shared["max_abs"], np.abs(rows).max((0, 1)))
    close(layers["max_abs"], np.abs(rows).max(1))


def test_a_recurrent_state_that_starts_as_a_constant_is_observed():
    def rnn(p, xs):
        def step(h, x):
            return jnp.tanh(h @ p["hidden"] + x @ p["input"]), h

        return lax.scan(step, jnp.zeros((2, 16)), xs)

    xs = normal(4, 7, 2, 16)
    params = {"hidden": W, "input": normal(5, 16, 16)}
    (_, states), found = capture(rnn, "second_moment", with_outputs=True)(params, xs)
    h = np.asarray(states, np.float64).reshape(-1, 16)
    close(found["hidden", 0]["second_moment"], h.T @ h, 1e-4)
    assert found["hidden", 0]["count"] == found["input", 0]["count"] == 14


def test_layers_and_rows_that_a_loop_picks():
    """A picked layer is a weight; a picked row of a table is what weights multiply."""
    params = {"layers": normal(3, 3, 16, 16), "table": normal(4, 9, 16)}

    def f(p, i):
        row = p["table"][i]
        return lax.fori_loop(0, 3, lambda n, c: jnp.tanh(c @ p["layers"][n]), row)

    found = capture(f, "second_moment")(params, jnp.int32(2))
    assert list(found) == [("layers", 0)]
    assert found["layers", 0]["count"] == 3
    rows = [np.asarray(params["table"][2], np.float64)]
    for w in np.asarray(params["layers"], np.float64)[:2]:
        rows.append(np.tanh(rows[-1] @ w))
    close(found["layers", 0]["second_moment"], sum(np.outer(r, r) for r in rows), 1e-3)


def test_while_loops_accumulate_body_and_condition():
    def f(p, x):
        return lax.while_loop(
            lambda c: (c[0] < 3) & ((c[1] @ p["test"]).sum() < 1e9),
            lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["body"])),
            (0, x),
        )[1]

    found = capture(f, "second_moment")({"test": normal(6, 16, 2), "body": W}, X)
    rows = [np.asarray(X, np.float64)]
    for _ in range(3):
        rows.append(np.tanh(rows[-1] @ np.asarray(W, np.float64)))
    assert found["body", 0]["count"] == 15
    close(found["body", 0]["second_moment"], sum(r.T @ r for r in rows[:3]), 1e-3)
    assert found["test", 0]["count"] == 20  # before every step, and once more
    close(found["test", 0]["second_moment"], sum(r.T @ r for r in rows), 1e-3)


def test_branches_not_taken_count_nothing():
    def f(p, x):
        return lax.cond(x.sum() > 1e9, lambda: x @ p["a"], lambda: x @ p["b"])

    found = capture(f, "second_moment")({"a": W, "b": W}, X)
    assert found["a", 0]["count"] == 0
    assert not np.asarray(found["a", 0]["second_moment"]).any()
    close(found["b", 0]["second_moment"], XTX, 1e-4)


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x * 4) / 4


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (g,))


@jax.custom_vjp
def linear(x, w):
    return x @ w


linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda s, g: (7 * g @ s[1].T, 5 * s[0].T @ g))


def test_custom_rules_remat_and_gradients():
    def f(p, x):
        return jax.checkpoint(lambda p, x: linear(straight_through(x), p))(p, x)

    found = capture(f, "second_moment")(W, X)
    rounded = np.round(np.asarray(X) * 4) / 4
    close(found["", 0]["second_moment"], rounded.T @ rounded, 1e-4)

    def loss(x):
        return capture(f, "second_moment", with_outputs=True)(W, x)[0].sum()

    close(jax.grad(loss)(X), 7 * jnp.ones((5, 16)) @ W.T, 1e-3)


def test_values_behind_elementwise_functions_of_a_weight():
    """A mask, a fake quantizer, weight normalization: what they multiply is observed."""
    mask = jnp.ones((16, 16)).at[0].set(0)

    def f(p, x):
        clipped = jnp.clip(jnp.round(p["quantized"] / 0.1), -8, 7) * 0.1
        normed = p["normed"] / jnp.linalg.norm(p["normed"], axis=0)
        return x @ (p["masked"] * mask) + x @ straight_through(clipped) + x @ normed

    found = capture(f, "second_moment")(dict.fromkeys(("masked", "quantized", "normed"), W), X)
    assert {key[0] for key in found} == {"masked", "quantized", "normed"}
    assert distinct(found) == 1
    close(found["normed", 0]["second_moment"], XTX, 1e-4)


def test_activations_are_not_taken_for_weights():
    """A position table added to activations makes an activation."""

    def f(p, x):
        return (x + p["positions"]) @ p["w"]

    found = capture(f, "second_moment")({"positions": X, "w": W}, X)
    assert list(found) == [("w", 0)]
    close(found["w", 0]["second_moment"], 4 * XTX, 1e-3)


def test_concatenated_weights_are_each_observed():
    def f(p, x):
        return x @ jnp.concatenate([p["q"], p["k"]], axis=1)

    found = capture(f, "second_moment")({"q": W, "k": W}, X)
    assert sorted(found) == [("k", 0), ("q", 0)]
    assert distinct(found) == 1


def test_features_come_in_the_order_of_the_parameters_axes():
    """Heads and head_dim, whatever order the product names them in."""
    x, w = normal(7, 5, 2, 8), normal(8, 2, 8, 16)
    rows = np.asarray(x).reshape(5, 16)

    def by_einsum(p, x):
        return jnp.einsum("tdh,hde->te", x.transpose(0, 2, 1), p)

    def transposed(p, x):
        return jnp.einsum("tdh,dhe->te", x.transpose(0, 2, 1), p.transpose(1, 0, 2))

    def folded(p, x):
        return x.reshape(5, 16) @ p.reshape(16, 16)

    for f in (by_einsum, transposed, folded):
        close(capture(f, "second_moment")(w, x)["", 0]["second_moment"], rows.T @ rows, 1e-4)


def test_experts_have_statistics_of_their_own():
    x, w = normal(9, 3, 5, 16), normal(10, 3, 16, 8)
    s = capture(lambda p, x: jnp.einsum("etk,ekn->etn", x, p), "second_moment")(w, x)["", 0]
    close(s["second_moment"], np.einsum("etk,etm->ekm", x, x), 1e-4)
    np.testing.assert_array_equal(s["count"], [5, 5, 5])
    shared = capture(lambda p, x: jnp.einsum("tk,ekn->etn", x, p), "second_moment")(w, X)["", 0]
    close(shared["second_moment"], XTX, 1e-4)


CONVOLUTIONS = {
    "NHWC": (("NHWC", "HWIO", "NHWC"), (2, 6, 6, 4), (3, 3, 4, 8), {}),
    "strided": (("NHWC", "HWIO", "NHWC"), (2, 6, 6, 4), (3, 2, 4, 8), {"window_strides": (2, 1)}),
    "NCHW": (("NCHW", "OIHW", "NCHW"), (2, 4, 6, 6), (8, 4, 3, 3), {}),
    "grouped": (
        ("NHWC", "HWIO", "NHWC"),
        (2, 6, 6, 4),
        (3, 3, 2, 8),
        {"feature_group_count": 2},
    ),
    "depthwise": (
        ("NHWC", "HWIO", "NHWC"),
        (2, 6, 6, 4),
        (3, 3, 1, 8),
        {"feature_group_count": 4},
    ),
    "one axis, dilated": (("NWC", "WIO", "NWC"), (2, 9, 4), (3, 4, 8), {"rhs_dilation": (2,)}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_see_patches(name):
    """The truth: |conv(x, w)|^2 is w'(X'X)w for every kernel w."""
    layout, x_shape, w_shape, options = CONVOLUTIONS[name]
    spatial = len(x_shape) - 2
    options = {"window_strides": (1,) * spatial, "padding": "SAME", **options}
    x, w = normal(11, *x_shape), normal(12, *w_shape)

    def f(p, x):
        return lax.conv_general_dilated(x, p, dimension_numbers=layout, **options)

    y, found = capture(f, "second_moment", with_outputs=True)(w, x)
    s = found["", 0]
    out_axis = layout[1].index("O")
    groups = options.get("feature_group_count", 1)
    kernel = np.moveaxis(np.asarray(w, np.float64), out_axis, -1)
    kernel = kernel.reshape(-1, groups, kernel.shape[-1] // groups)  # K, groups, outputs of each
    moment = np.asarray(s["second_moment"]).reshape(groups, kernel.shape[0], kernel.shape[0])
    energy = np.einsum("kgo,gkm,mgo->go", kernel, moment, kernel).reshape(-1)
    outputs = np.moveaxis(np.asarray(y, np.float64), layout[2].index("C"), -1)
    close(energy, (outputs.reshape(-1, outputs.shape[-1]) ** 2).sum(0), 1e-2)
    assert np.ravel(s["count"])[0] == outputs.size // outputs.shape[-1]


def test_token_masks():
    x = normal(13, 2, 4, 16)
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 0]], bool)
    kept = np.asarray(x)[np.asarray(mask)]

    def f(p, x):
        hidden = jnp.tanh(x @ p["a"])
        folded = hidden.reshape(8, 16) @ p["b"]
        return folded, x[:, 0] @ p["pooled"], jnp.einsum("bth,hk->kbt", x, p["a"])

    params = {"a": W, "b": W, "pooled": W}
    found = capture(f, ("second_moment", "max_abs"))(params, x, token_mask=mask)
    close(found["a", 0]["second_moment"], kept.T @ kept, 1e-4)
    close(found["a", 0]["max_abs"], np.abs(kept).max(0))
    assert found["a", 0]["count"] == found["b", 0]["count"] == 5
    hidden = np.tanh(kept @ np.asarray(W))
    close(found["b", 0]["second_moment"], hidden.T @ hidden, 1e-4)
    assert found["pooled", 0]["count"] == 2
    jitted = jax.jit(lambda p, x, m: capture(f, "second_moment")(p, x, token_mask=m))
    close(jitted(params, x, mask)["a", 0]["second_moment"], kept.T @ kept, 1e-4)

    def layers(p, x):
        step = jax.jit(lambda c, q: jnp.tanh(c @ q))
        return lax.scan(jax.checkpoint(lambda c, q: (step(c, q), None)), x, p)[0]

    s = capture(layers, "second_moment")(normal(3, 3, 16, 16), x, token_mask=mask)["", 0]
    np.testing.assert_array_equal(s["count"], [5, 5, 5])
    close(s["second_moment"][0], kept.T @ kept, 1e-4)


def test_a_mask_that_fits_nothing_is_refused():
    with pytest.raises(InputError, match="token_mask of shape"):
        capture(lambda p, x: x.sum(0) @ p, "mean_abs")(
            W, normal(1, 2, 4, 16), token_mask=jnp.ones((2, 4))
        )


@settings(max_examples=10)
@given(st.sampled_from([(4, 6), (1, 5)]), st.integers(0, 2**24 - 1))
def test_a_mask_is_the_same_as_leaving_rows_out(shape, bits):
    batch, tokens = shape
    mask = np.array([(bits >> i) & 1 for i in range(batch * tokens)], bool).reshape(batch, tokens)
    x = np.asarray(normal(14, 4, 6, 8))[:batch, :tokens]
    (s,) = capture(lambda p, x: x @ p, ALL)(W[:8], x, token_mask=mask).values()
    rows = x[mask]
    close(s["second_moment"], rows.T @ rows, 1e-4)
    close(s["max_abs"], np.abs(rows).max(0, initial=0))
    assert s["count"] == len(rows)
    assert s["histogram"].sum() == rows.size


def test_names():
    def f(p, x):
        def body(c, q):
            c = jax.ad_checkpoint.checkpoint_name(jnp.tanh(c @ q), "hidden")
            return c, c

        x, hidden = lax.scan(body, x, p)
        return jax.ad_checkpoint.checkpoint_name(x, "last") + 0, hidden

    (_, hidden), found = capture(f, "mean_abs", names=["hidden", "last"], with_outputs=True)(
        normal(3, 3, 16, 16), X
    )
    assert set(found) == {("", 0), ("hidden", 0), ("last", 0)}
    close(found["hidden", 0]["mean_abs"], np.abs(hidden).sum(1), 1e-4)
    close(found["last", 0]["mean_abs"], np.abs(hidden[-1]).sum(0), 1e-4)

    def no_parameters_inside(p, x):
        inner = jax.jit(lambda x: jax.ad_checkpoint.checkpoint_name(x * 2, "inner"))
        return inner(x) @ p

    found = capture(no_parameters_inside, "mean_abs", names=["inner"])(W, X)
    close(found["inner", 0]["mean_abs"], 2 * np.abs(X).sum(0), 1e-4)


def test_memory_is_checked_beforehand():
    ran = []

    def f(p, x):
        jax.debug.callback(lambda: ran.append(1))
        return x @ p["small"], (x @ p["big"]) @ p["after"]

    params = {"small": normal(1, 16, 4), "big": normal(2, 16, 64), "after": normal(3, 64, 4)}
    need = 4 * (16 * 16 + 64 * 64 + 2) + 4 * 5 * 64
    with pytest.raises(InputError, match="after"):
        capture(f, "second_moment", limit_bytes=need - 1)(params, X)
    jax.effects_barrier()
    assert not ran
    assert len(capture(f, "second_moment", limit_bytes=need)(params, X)) == 3


def test_results_of_batches_are_combined():
    run = capture(lambda p, x: (x @ p["a"], x @ p["b"]), ALL)
    params = {"a": W, "b": W}
    whole = run(params, X)
    both = combine(run(params, X[:2]), run(params, X[2:]))
    close(both, whole, 1e-4)
    assert both["a", 0] is both["b", 0]
    with pytest.raises(InputError, match="b"):
        combine(whole, {("a", 0): whole["a", 0]})


def test_compressed_parameters_and_vmap():
    q = affine(1, 16, 8)
    out, found = capture(lambda p, x: x @ p, "second_moment", with_outputs=True)(q, X)
    close(out, X @ q.dense())
    close(found["", 0]["second_moment"], XTX, 1e-4)
    many = jax.vmap(capture(lambda p, x: x @ p, "second_moment"), (None, 0))
    s = many(W, jnp.stack([X, 2 * X]))["", 0]
    close(s["second_moment"], np.stack([XTX, 4 * XTX]), 1e-3)


def test_under_jit_and_with_constants_closed_over():
    c = jnp.float32(2.0)
    f = jax.jit(capture(lambda p, x: (x * c) @ p, "second_moment"))
    close(f(W, X)["", 0]["second_moment"], 4 * XTX, 1e-3)

    def outer(y):
        return capture(lambda p, x: (x + y) @ p, "second_moment")(W, X)["", 0]["second_moment"]

    close(jax.jit(outer)(X), 4 * XTX, 1e-3)
