"""Clipped ranges against a brute force in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.quantization.clip import clip
from jaxcompress.quantization.rtn import rtn

RNG = np.random.default_rng(0)
X = RNG.standard_normal((200, 32)) @ RNG.standard_normal((32, 32))
MOMENT = X.T @ X
WEIGHT = RNG.standard_t(3, (12, 4, 8)).astype(np.float32)
# Negative weights stay within half the range: at its ends lie ties, which float32 breaks at random.
LARGEST = np.take_along_axis(WEIGHT, np.abs(WEIGHT).argmax(-1)[..., None], -1)
WEIGHT = (WEIGHT * np.sign(LARGEST)).reshape(12, 32)
WEIGHT[WEIGHT < 0] *= 0.4


def brute_force(weight, moment, bits, group, symmetric):
    """Per row and group: every shrunk range, the least d' H d; float64."""
    out = np.zeros(weight.shape)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for row, start in np.ndindex(len(weight), weight.shape[1] // group):
        at = slice(start * group, (start + 1) * group)
        w, best = weight[row, at].astype(np.float64), np.inf
        for shrink in np.linspace(1, 0.5, 11):
            limit = np.abs(w).max() * shrink
            part = np.clip(w, -limit, limit)
            if symmetric:
                scale, zero = np.abs(part).max() / ((2**bits - 1) / 2), 0
            else:
                bottom, top = min(part.min(), 0), max(part.max(), 0)
                scale = (top - bottom) / (2**bits - 1)
                zero = np.clip(np.round(low - bottom / scale), low, high)
            made = (np.clip(np.round(w / scale + zero), low, high) - zero) * scale
            loss = (made - w) @ moment[at, at] @ (made - w)
            if loss < best - 1e-9:
                best, out[row, at] = loss, made
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [8, 32])
def test_equals_the_brute_force(symmetric, group):
    small = clip(
        jnp.asarray(WEIGHT),
        jnp.asarray(MOMENT, jnp.float32),
        bits=3,
        group_size=group,
        symmetric=symmetric,
    )
    expected = brute_force(WEIGHT, MOMENT, 3, group, symmetric)
    np.testing.assert_allclose(jc.densify(small), expected, atol=1e-4)


def test_errs_less_than_round_to_nearest():
    def error(small):
        d = np.asarray(jc.densify(small)) - WEIGHT
        return np.einsum("nk,kl,nl->", d, MOMENT, d)

    moment = jnp.asarray(MOMENT, jnp.float32)
    clipped = clip(jnp.asarray(WEIGHT), moment, bits=3, group_size=-1)
    assert error(clipped) < 0.95 * error(rtn(jnp.asarray(WEIGHT), bits=3, group_size=-1))


def test_leading_axes_one_by_one():
    weights = jnp.stack([jnp.asarray(WEIGHT), 2 * jnp.asarray(WEIGHT[::-1])])
    moments = jnp.stack([jnp.asarray(MOMENT, jnp.float32), jnp.eye(32)])
    both = jc.densify(clip(weights, moments, group_size=16))
    for i in range(2):
        alone = jc.densify(clip(weights[i], moments[i], group_size=16))
        np.testing.assert_array_equal(both[i], alone)


def test_group_size_must_divide():
    with pytest.raises(InputError):
        clip(jnp.asarray(WEIGHT), jnp.asarray(MOMENT, jnp.float32), group_size=24)
