"""What the tests of packed formats share: random leaves, tensors in memory."""

import hashlib

import jax.numpy as jnp
import numpy as np

from jaxcompress.checkpoints.tensors import TensorInfo
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import STORED


class Tensors(dict):
    """A `TensorSource` in memory."""

    def info(self, name):
        return TensorInfo(self[name].shape, self[name].dtype)

    def read(self, name):
        return np.array(self[name])

    def read_rows(self, name, start, stop):
        return self[name][start:stop]

    def keys(self):
        return list(super().keys())


def stream(u, bits):
    """The bitstream of `u` [rows, n], one bit at a time, the lowest first."""
    each_bit = ((u[..., None] >> np.arange(bits)) & 1).reshape(len(u), -1).astype(np.uint8)
    return np.packbits(each_bit, axis=1, bitorder="little").view("<i4")


def affine(bits, symmetric, rows=64, columns=96, groups=3, dtype="float16"):
    """A leaf of random codes, scales and zeros; and these: [N, K], [N, groups] and the same."""
    rng = np.random.default_rng(bits)
    u = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    scale = rng.uniform(0.5, 1, (rows, groups)).astype(np.float16)
    zero = None if symmetric else rng.integers(0, 2**bits, (rows, groups)).astype(np.uint8)
    leaf = Affine(
        jnp.asarray(stream(u, bits)), jnp.asarray(scale),
        None if zero is None else jnp.asarray(zero), bits, 0, STORED, (dtype,),
    )  # fmt: skip
    return leaf, u, scale, np.full_like(scale, 2 ** (bits - 1), np.uint8) if symmetric else zero


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
