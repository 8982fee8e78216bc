"""Blocks read off a function with one top-level scan compute what the function does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.core.readers.scan_blocks import scan_blocks

RNG = np.random.default_rng(0)


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape) / 3, jnp.float32)


PARAMS = {
    "table": drawn(11, 8),
    "body": {"up": drawn(3, 16, 8), "down": drawn(3, 8, 16), "bias": drawn(3, 16)},
    "gain": drawn(8),
}


def model(params, ids, shift=0.5):
    """Steps see their number, a constant made before, and the inputs come back after the scan."""
    h = params["table"][ids]
    past = jnp.arange(ids.shape[1], dtype=jnp.float32)[:, None]

    def step(carry, layer):
        own, number = layer
        h, total = carry
        inner = jnp.tanh(h @ own["up"].T + own["bias"] * number)
        return (h + inner @ own["down"].T + 0.01 * past, total + h.sum()), None

    numbers = jnp.linspace(0.5, 1.5, 3)
    (h, total), _ = jax.lax.scan(step, (h, 0.0), (params["body"], numbers))
    return {"logits": h * params["gain"] @ params["table"].T + shift, "sum": total + ids.sum()}


@pytest.mark.parametrize("shape", [(2, 5), (1, 9)])
@pytest.mark.parametrize("function", [model, jax.jit(model)])
def test_the_walk_is_the_function(function, shape):
    blocks = scan_blocks(function, PARAMS, np.zeros((2, 5), np.int32))
    assert blocks is not None
    assert blocks.where == "body"
    ids = RNG.integers(0, 11, shape).astype(np.int32)
    expected = model(PARAMS, ids)
    found = blocks.run(PARAMS, ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    assert len(blocks.of(PARAMS)) == 3


def test_a_wrapper_that_does_something_is_kept():
    class Owner:
        shift = 2.0

        @functools.wraps(model)
        def apply(self, params, ids):
            return model(params, ids, self.shift)

    ids = RNG.integers(0, 11, (2, 5)).astype(np.int32)
    for function in (Owner().apply, jax.jit(Owner().apply)):
        blocks = scan_blocks(function, PARAMS, ids)
        expected = model(PARAMS, ids, 2.0)["logits"]
        np.testing.assert_allclose(blocks.run(PARAMS, ids)["logits"], expected, rtol=1e-5)


def nothing_scanned(params, ids):
    return params["table"][ids]


def backwards(params, ids):
    return jax.lax.scan(
        lambda h, w: (h + w["bias"].sum(), None), 0.0, params["body"], reverse=True
    )[0]


def stacked_outputs(params, ids):
    h, every = jax.lax.scan(lambda h, w: (h + w["bias"].sum(), h * 2), 0.0, params["body"])
    return h + every.sum()


def two_scans(params, ids):
    step = lambda h, w: (h + w["bias"].sum(), None)  # noqa: E731
    h, _ = jax.lax.scan(step, 0.0, params["body"])
    return jax.lax.scan(step, h, params["body"])[0]


def part_of_the_stack(params, ids):
    return jax.lax.scan(lambda h, w: (h + w.sum(), None), 0.0, params["body"]["bias"])[0]


@pytest.mark.parametrize(
    "function", [nothing_scanned, backwards, stacked_outputs, two_scans, part_of_the_stack]
)
def test_what_cannot_be_walked(function):
    assert scan_blocks(function, PARAMS, np.zeros((2, 5), np.int32)) is None


def test_compress_walks_by_it():
    """The second block's inputs come from the first one compressed: else the masks differ."""
    ids = RNG.integers(0, 11, (8, 6)).astype(np.int32)

    def logits(params, ids):
        return model(params, ids)["logits"]

    stranger = jc.Model(logits, PARAMS)
    small = jc.compress(stranger, "sparsegpt", include="body/{up,down}", calibration=ids)
    assert not any("captured whole" in note for note in small.notes)
    for name in ("up", "down"):
        assert np.all((np.asarray(small.params["body"][name]) == 0).sum((1, 2)) == 64)
    walked = jc.Model(logits, PARAMS, blocks=scan_blocks(logits, PARAMS, ids))
    again = jc.compress(walked, "sparsegpt", include="body/{up,down}", calibration=ids)
    jax.tree.map(np.testing.assert_array_equal, small.params, again.params)
    dense_inputs = jc.compress(
        stranger, "sparsegpt", include="body/{up,down}", calibration=ids, sequential="none"
    )
    assert np.any(small.params["body"]["up"][1] != dense_inputs.params["body"]["up"][1])
