"""A quantized KV cache: written and read compressed, as argument, carry and output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from lift_cases import affine_of, close, low_rank, normal

from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import STORED, is_compressed
from jaxcompress.core.readers.lift import lift

B, T, H, D = 2, 8, 4, 32

# [batch, time, heads, features] and [batch, heads, time, features]
LAYOUTS = {
    "heads in rows": STORED,
    "time and heads in rows": (("n", -1), ("n", H), ("k", -1)),
    "all in rows": (("n", -1), ("n", T), ("n", H), ("k", -1)),
}


def empty(dims=STORED, symmetric=True):
    return affine_of(jnp.zeros((B, T, H, D)), dims, bits=8, groups=1, symmetric=symmetric)


def filled(dims, symmetric=True):
    return affine_of(normal(1, B, T, H, D), dims, bits=8, groups=2, symmetric=symmetric)


def write_slice(cache, k, t):
    return lax.dynamic_update_slice(cache, k[:, None], (0, t, 0, 0))


def write_at(cache, k, t):
    return cache.at[:, t].set(k)


def write_each(cache, k, t):
    return cache.at[jnp.arange(B), jnp.full(B, t)].set(k)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("write", [write_slice, write_at, write_each])
def test_writes_are_encoded_and_leave_the_rest_alone(write, layout):
    cache, k = filled(LAYOUTS[layout]), normal(2, B, H, D)
    lifted = lift(write)
    out = lifted(cache, k, jnp.int32(3))
    assert lifted.materialized() == []
    assert jax.tree.structure(out) == jax.tree.structure(cache)
    before, after = cache.dense(), out.dense()
    written = np.zeros((B, T, H, D), bool)
    written[:, 3] = True
    np.testing.assert_array_equal(np.asarray(after)[~written], np.asarray(before)[~written])
    # A fresh quantization of the update, row by row, is what is stored.
    fresh = affine_of(k, bits=8, groups=2, dims=STORED)
    np.testing.assert_array_equal(after[:, 3], fresh.dense())


def test_an_update_in_the_same_format_is_copied():
    cache, update = filled(STORED), affine_of(normal(3, B, 1, H, D), STORED, 8, 2)
    lifted = lift(lambda c, u: lax.dynamic_update_slice(c, u, (0, 5, 0, 0)))
    out = lifted(cache, update)
    np.testing.assert_array_equal(out.dense()[:, 5:6], update.dense())
    assert lifted.materialized() == []


def attention(cache, q):
    """Scores and values over [batch, time, heads, features]."""
    scores = jax.nn.softmax(jnp.einsum("bhd,bthd->bht", q, cache) / D**0.5)
    return jnp.einsum("bht,bthd->bhd", scores, cache)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_attention_reads_the_cache_compressed(layout, symmetric):
    cache, q = filled(LAYOUTS[layout], symmetric), normal(4, B, H, D)
    lifted = lift(attention)
    close(lifted(cache, q), attention(cache.dense(), q), 1e-4)
    assert lifted.materialized() == []

    def heads_first(cache, q):
        return jnp.einsum("bhqd,bhtd->bhqt", q[:, :, None], cache.transpose(0, 2, 1, 3))

    lifted = lift(heads_first)
    close(lifted(cache, q), heads_first(cache.dense(), q), 1e-4)
    assert lifted.materialized() == []


def test_grouped_query_attention():
    """Two query heads for each of the cache's: its heads are a batch axis of the product."""
    cache, q = filled(STORED), normal(5, B, H, 2, D)

    def f(cache, q):
        scores = jnp.einsum("bhgd,bthd->bhgt", q, cache)
        return jnp.einsum("bhgt,bthd->bhgd", scores, cache)

    lifted = lift(f)
    close(lifted(cache, q), f(cache.dense(), q), 1e-2)
    assert lifted.materialized() == []

    def repeated(cache, q):  # the other way to write it
        wide = jnp.repeat(cache, 2, axis=2)
        return jnp.einsum("bhd,bthd->bht", q.reshape(B, 2 * H, D), wide)

    lifted = lift(repeated)
    close(lifted(cache, q), repeated(cache.dense(), q), 1e-3)
    assert lifted.materialized() == []


def decode_step(cache, k, q, t):
    cache = write_slice(cache, k, t)
    return cache, attention(cache, q)


def test_a_donated_cache_through_a_jitted_step():
    lifted = lift(decode_step)
    step = jax.jit(lifted, donate_argnums=0)
    cache, dense = empty(), jnp.zeros((B, T, H, D))
    for t in range(3):
        k, q = normal(t, B, H, D), normal(t + 9, B, H, D)
        old = cache
        cache, out = step(cache, k, q, jnp.int32(t))
        assert isinstance(cache, Affine)
        assert old.codes.is_deleted()
        dense, expected = decode_step(dense, k, q, t)
        close(out, expected, 0.05)
    assert lifted.materialized() == []
    assert lifted.walk.traces["function"] == 1


def test_a_cache_as_a_carry_of_scan_and_while():
    ks = normal(7, 3, B, H, D)

    def generate(cache, ks):
        def step(carry, k):
            cache, t = carry
            return (write_slice(cache, k, t), t + 1), attention(cache, k).sum()

        return lax.scan(step, (cache, 0), ks)

    lifted = lift(generate)
    (cache, t), _ = lifted(empty(), ks)
    assert is_compressed(cache)
    assert lifted.materialized() == []
    (dense, _), _ = generate(jnp.zeros((B, T, H, D)), ks)
    close(cache, dense, 0.02)
    assert t == 3

    def loop(cache, ks):
        def body(carry):
            t, cache = carry
            return t + 1, write_slice(cache, ks[t], t)

        return lax.while_loop(lambda carry: carry[0] < 3, body, (0, cache))[1]

    lifted = lift(loop)
    np.testing.assert_array_equal(lifted(empty(), ks).dense(), cache.dense())
    assert lifted.materialized() == []


def test_formats_that_cannot_encode_go_dense_and_are_recorded():
    cache, update = low_rank(1, 8, 16, dims=STORED), normal(4, 1, 16)

    def f(cache, update):
        return lax.dynamic_update_slice(cache, update, (2, 0))

    lifted = lift(f)
    close(lifted(cache, update), f(cache.dense(), update))
    (record,) = lifted.materialized()
    assert record.primitive == "dynamic_update_slice"


def test_a_scale_shared_by_rows_is_not_overwritten():
    cache = affine_of(normal(1, 8, 32), STORED, bits=8, per_tensor=True)
    update = normal(2, 1, 32)

    def f(cache, update):
        return lax.dynamic_update_slice(cache, update, (2, 0))

    lifted = lift(f)
    close(lifted(cache, update), f(cache.dense(), update))
    assert len(lifted.materialized()) == 1
