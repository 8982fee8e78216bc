"""Sums over chunks of positions: those of the whole, with never more than a chunk of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr

from jaxcompress.core.losses import in_float32, sum_over_chunks

BATCH, SEQ, WIDTH, VOCAB = 2, 23, 8, 50


def drawn(dtype=np.float32):
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(WIDTH, VOCAB)).astype(dtype), "unused": np.ones(3, dtype)}
    states = rng.normal(size=(BATCH, SEQ, WIDTH)).astype(np.float32)
    return params, states, rng.integers(0, VOCAB, (BATCH, SEQ))


def cross_entropy(params, states, labels):
    logits = (states @ params["kernel"].astype(states.dtype)).astype(jnp.float32)
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
    return {"loss": (-found.sum(), jnp.float32(labels.size))}


def chunked(params, states, labels, chunk):
    sums = sum_over_chunks(cross_entropy, params, (states, labels), chunk=chunk)
    return sums["loss"][0], sums


@pytest.mark.parametrize("chunk", [1, 5, 8, 23, 100])
def test_values_and_gradients_are_those_of_the_whole(chunk):
    """Against float64; 5 and 8 leave a rest."""
    params, states, labels = drawn()
    slopes, sums = jax.jit(jax.grad(chunked, (0, 1), has_aux=True), static_argnums=3)(
        params, states, labels, chunk
    )
    w, x = params["kernel"].astype(np.float64), states.astype(np.float64)
    likely = np.exp(x @ w)
    likely /= likely.sum(-1, keepdims=True)
    one_hot = np.eye(VOCAB)[labels]
    np.testing.assert_allclose(
        sums["loss"][0], -np.log((likely * one_hot).sum(-1)).sum(), rtol=1e-5
    )
    assert float(sums["loss"][1]) == BATCH * SEQ
    np.testing.assert_allclose(
        slopes[0]["kernel"], np.einsum("bsd,bsv->dv", x, likely - one_hot), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(slopes[0]["unused"], 0)
    np.testing.assert_allclose(slopes[1], (likely - one_hot) @ w.T, rtol=1e-4, atol=1e-5)


def shapes_in(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: _body(x) is not None
        ):
            if _body(value) is not None:
                yield from shapes_in(_body(value))


def _body(x):
    x = getattr(x, "jaxpr", x)
    return x if isinstance(x, Jaxpr) else None


def test_only_a_chunk_of_logits_exists_forward_and_backward():
    params, states, labels = drawn()
    for chunk, whole in ((4, False), (SEQ, True)):
        traced = jax.make_jaxpr(
            jax.grad(lambda *a, chunk=chunk: chunked(*a, chunk), (0, 1), has_aux=True)
        )(params, states, labels)
        sizes = [np.prod(shape) for shape in shapes_in(traced.jaxpr) if VOCAB in shape]
        assert (max(sizes) >= BATCH * SEQ * VOCAB) == whole


def test_gradients_of_half_precision_are_summed_in_float32():
    """Each chunk adds 1 to a gradient of 1000, which bfloat16 rounds away."""
    params = {"w": jnp.ones((), jnp.bfloat16)}
    x = np.ones((1, 513, 1), np.float32)
    x[0, -1] = 1024  # the first that the backward pass adds

    def total(params, widen):
        def function(params, piece):
            assert params["w"].dtype == jnp.bfloat16
            return (params["w"] * piece.astype(jnp.bfloat16)).astype(jnp.float32).sum()

        if widen:
            function, params = in_float32(function, params)
        return sum_over_chunks(function, params, (x,), chunk=1)

    def slope(widen):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        return jax.grad(lambda w: total(jax.tree.map(lambda x: x.astype(jnp.bfloat16), w), widen))(
            wide
        )["w"]

    assert float(slope(widen=True)) == 1536
    assert float(slope(widen=False)) == 1024
