"""Round to nearest against NumPy in float64 and the properties a user relies on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.core.errors import InputError
from jaxcompress.quantization.rtn import rtn


def matrix(seed: int = 0, shape: tuple[int, ...] = (6, 64)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def brute(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> np.ndarray:
    """Float64, one group at a time."""
    out = np.empty(weight.shape)
    for row in range(weight.shape[0]):
        for at in range(0, weight.shape[1], group):
            part = weight[row, at : at + group].astype(np.float64)
            if symmetric:
                scale, zero = np.abs(part).max() / ((2**bits - 1) / 2), 2 ** (bits - 1)
            else:
                low, high = min(part.min(), 0), max(part.max(), 0)
                scale = (high - low) / (2**bits - 1)
                zero = np.round(-low / scale)
            u = np.clip(np.round(part / scale) + zero, 0, 2**bits - 1)
            out[row, at : at + group] = (u - zero) * scale
    return out


@given(st.integers(0, 99), st.sampled_from([2, 3, 4, 8]), st.sampled_from([16, 64]), st.booleans())
def test_equals_brute_force(seed, bits, group, symmetric):
    w = matrix(seed)
    got = np.array(rtn(w, bits=bits, group_size=group, symmetric=symmetric).dense())
    want = brute(np.array(w), bits, group, symmetric)
    step = np.abs(np.array(w)).max() / (2 ** (bits - 1))
    # A symmetric scale puts the largest weight of a group on a tie, which float32 may round the
    # other way: then the two differ by one step and err alike.
    differ = np.abs(got - want) > 1e-5
    assert differ.mean() <= 1 / group if symmetric else differ.mean() < 0.01
    assert np.abs(np.abs(got - np.array(w)) - np.abs(want - np.array(w))).max() < 1e-4 + 1e-3 * step


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searched_range_never_errs_more_and_mostly_less(bits, symmetric):
    w = matrix(3, (64, 128))
    errors = {
        how: float(
            jnp.square(
                rtn(w, bits=bits, group_size=64, symmetric=symmetric, range=how).dense() - w
            ).sum()
        )
        for how in ("minmax", "mse")
    }
    assert errors["mse"] < 0.97 * errors["minmax"]


def test_granularities_have_their_numbers_of_scales():
    w = matrix(0, (3, 6, 64))
    assert rtn(w, granularity="tensor").scale.shape == (3, 1, 1)
    assert rtn(w, granularity="channel").scale.shape == (3, 6, 1)
    assert rtn(w, group_size=16).scale.shape == (3, 6, 4)
    assert rtn(w, group_size=-1).scale.shape == (3, 6, 1)


@given(st.sampled_from([1, 2, 3, 4, 5, 8]), st.booleans(), st.sampled_from(["minmax", "mse"]))
def test_exact_zeros_stay_zero(bits, symmetric, how):
    w = jnp.where(matrix(1) > 0.3, 0, matrix(1))
    got = rtn(w, bits=bits, group_size=16, symmetric=symmetric, range=how).dense()
    np.testing.assert_array_equal(np.array(got)[np.array(w) == 0], 0)


def test_a_layer_axis_is_a_batch_of_matrices():
    w = matrix(5, (3, 4, 32))
    together = rtn(w, group_size=8).dense()
    np.testing.assert_array_equal(together[1], rtn(w[1], group_size=8).dense())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 9}, "1 to 8 bits"),
        ({"group_size": 48}, "use --group-size 64"),
        ({"group_size": 0}, "positive"),
        ({"granularity": "tensor", "range": "mse"}, "granularity"),
    ],
)
def test_bad_input_is_one_clear_line(options, words):
    with pytest.raises(InputError, match=words) as caught:
        rtn(matrix(), **options)
    assert "\n" not in str(caught.value)
