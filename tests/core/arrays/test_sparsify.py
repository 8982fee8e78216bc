"""Every way to keep a pruned matrix, from one function, and how small each is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.checkpoints.native import encode_leaf
from jaxcompress.core.arrays.affine import Affine, encode_affine, minmax_range
from jaxcompress.core.arrays.base import STORED, is_compressed
from jaxcompress.core.arrays.block_sparse import BlockSparse
from jaxcompress.core.arrays.csr import CSR
from jaxcompress.core.arrays.sparse import NMSparse, UnstructuredSparse
from jaxcompress.core.arrays.sparsify import store
from jaxcompress.core.arrays.training import Masked
from jaxcompress.core.errors import InputError

N, K = 16, 96
RNG = np.random.default_rng(0)
W = RNG.normal(size=(N, K)).astype(np.float32)
ANY = np.abs(W) > 0.8
TWO_OF_FOUR = (np.argsort(np.argsort(np.abs(W).reshape(N, -1, 4))) >= 2).reshape(N, K)
BLOCKS = np.repeat(np.repeat(RNG.random((N // 4, K // 8)) < 0.3, 4, 0), 8, 1)


@pytest.mark.parametrize(
    ("kind", "pattern", "mask", "made"),
    [
        ("zeros", "unstructured", ANY, jax.Array),
        ("masked", "2:4", TWO_OF_FOUR, Masked),
        ("sparse", "unstructured", ANY, UnstructuredSparse),
        ("sparse", "2:4", TWO_OF_FOUR, NMSparse),
        ("sparse", "block:4x8", BLOCKS, BlockSparse),
        ("bitmask", "2:4", TWO_OF_FOUR, UnstructuredSparse),
        ("csr", "unstructured", ANY, CSR),
        ("csr", "block:4x8", BLOCKS, CSR),
    ],
)
def test_every_form_is_the_masked_matrix(kind, pattern, mask, made):
    weight = jnp.asarray(W, jnp.bfloat16)
    leaf = store(weight, mask, kind, pattern)
    assert isinstance(leaf, made)
    assert (leaf.dtype, leaf.shape) == (weight.dtype, W.shape)
    dense = leaf.dense() if is_compressed(leaf) else leaf
    np.testing.assert_array_equal(dense, jnp.where(mask, weight, 0))
    traced = jax.eval_shape(lambda m: store(weight, m, kind, pattern), jnp.asarray(mask))
    assert type(traced) is type(leaf) or made is jax.Array
    assert traced.shape == leaf.shape


def quantized(groups, symmetric=True, bits=4):
    scale, zero = minmax_range(jnp.asarray(W), bits=bits, groups=groups, symmetric=symmetric)
    return encode_affine(jnp.asarray(W), scale, zero, bits=bits, dims=STORED)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("kind", "pattern", "mask", "groups"),
    [
        ("zeros", "unstructured", ANY, 3),
        ("sparse", "2:4", TWO_OF_FOUR, 3),
        ("sparse", "unstructured", ANY, 1),
        ("sparse", "block:4x8", BLOCKS, 1),
        ("csr", "unstructured", ANY, 1),
    ],
)
def test_a_quantized_matrix_keeps_its_codes(kind, pattern, mask, groups, symmetric):
    leaf = quantized(groups, symmetric)
    pruned = store(leaf, mask, kind, pattern)
    assert isinstance(pruned if kind == "zeros" else pruned.values, Affine)
    np.testing.assert_array_equal(pruned.dense(), jnp.where(mask, leaf.dense(), 0))
    np.testing.assert_array_equal(
        pruned.scale if kind == "zeros" else pruned.values.scale, leaf.scale
    )


def test_two_of_four_and_int4_take_three_bits_a_weight():
    pruned = store(quantized(3), TWO_OF_FOUR, "sparse", "2:4")
    codes, positions = 4 * K // 2 // 8, 2 * K // 2 // 8
    # 48 codes fill up to 64 in a row of words.
    assert pruned.nbytes == N * ((codes + positions) * 64 // 48 + 3 * 4)
    assert pruned.size == N * K


def on_disk(leaf):
    return sum(t.nbytes for name, t in encode_leaf("w", leaf).items() if not name.endswith("spec"))


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95, 0.99])
def test_bytes_on_disk(sparsity):
    """A bitmask is the smallest up to 94 % of zeros, columns beyond; dense is never smaller."""
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(64, 1024)), jnp.bfloat16)
    scores = np.abs(np.asarray(weight, np.float32))
    mask = scores > np.quantile(scores, sparsity)
    kept, entries = int(mask.sum()), mask.size
    sizes = {kind: on_disk(store(weight, mask, kind)) for kind in ("bitmask", "csr")}
    assert sizes == {"bitmask": 2 * kept + entries // 8, "csr": 4 * kept + 4 * 64}
    assert (sizes["csr"] < sizes["bitmask"]) == (sparsity > 0.94)
    assert min(sizes.values()) < 2 * entries


def test_what_does_not_fit_is_refused():
    w = jnp.asarray(W)
    with pytest.raises(InputError, match="store 'ell': use one of zeros, masked"):
        store(w, ANY, "ell")
    with pytest.raises(InputError, match=r"mask: keeps [34] of 4"):
        store(w, ANY, "sparse", "2:4")
    with pytest.raises(InputError, match="blocks of 5x8: they do not tile"):
        store(w, ANY, "sparse", "block:5x8")
    with pytest.raises(InputError, match="do not fall into groups of 32"):
        store(quantized(3), ANY, "bitmask")
    with pytest.raises(InputError, match="not trained"):
        store(quantized(3), ANY, "masked")
