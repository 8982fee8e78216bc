"""Weights and the float64 NumPy reference that the tests of wna16 share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import packing, wna16
from pallas_kernels.wna16_reference import Spec


@dataclasses.dataclass(frozen=True)
class Weight:
    """A random weight [n, k] in ``bits`` bits, with its operands as JAX arrays."""

    n: int
    k: int
    bits: int
    groups: int = 1
    dtype: str = "float32"  # of the scale
    asymmetric: bool = False
    per_tensor: bool = False
    seed: int = 0

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        rows = 1 if self.per_tensor else self.n
        u = rng.integers(0, 2**self.bits, (self.n, self.k), dtype=np.uint8)
        scale = jnp.asarray(rng.normal(size=(rows, self.groups)) / self.k**0.5, self.dtype)
        zero = rng.integers(0, 2**self.bits, scale.shape, dtype=np.uint8)
        object.__setattr__(self, "u", u)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "codes", jax.jit(packing.pack, static_argnums=1)(u, self.bits))
        object.__setattr__(self, "zero", jnp.asarray(zero) if self.asymmetric else None)

    def centred(self) -> np.ndarray:
        """u - z, [n, k], float64."""
        zero = 2 ** (self.bits - 1) if self.zero is None else self._columns(self.zero)
        return self.u.astype(np.float64) - zero

    def dense(self) -> np.ndarray:
        """The weight [n, k], float64; equal to decoding in the scale's dtype, rounding apart."""
        return self.centred() * self._columns(self.scale)

    def _columns(self, values) -> np.ndarray:
        values = np.repeat(np.asarray(values, np.float64), self.k // self.groups, axis=1)
        return np.broadcast_to(values, (self.n, self.k))

    def matmul(self, x, layout="canonical", scale=None, **options):
        """``wna16_matmul`` of this weight, its operands reordered for ``layout``."""
        codes, scale, zero = self.codes, self.scale if scale is None else scale, self.zero
        if layout == "tpu":
            codes = wna16.to_tpu_layout(codes, bits=self.bits)
            scale = wna16.scale_to_kernel_layout(scale, self.n)
            zero = None if zero is None else wna16.scale_to_kernel_layout(zero, self.n)
        return wna16.wna16_matmul(
            x, codes, scale, zero, bits=self.bits, contracted=self.k, layout=layout, **options
        )

    def spec(self, **changes) -> Spec:
        """The static part of ``x @ W^T`` in float32, for calling an implementation directly."""
        options = {
            "bits": self.bits, "k": self.k, "layout": "canonical", "casts": (), "transpose": False,
            "out_dtype": "float32", "precision": None, "implementation": None,
            "partitioned": None, "interpret": False,
        }  # fmt: skip
        return Spec(**(options | changes))

    def batch_of_one(self) -> tuple:
        """(scale, codes, zero point if any), as the implementations take them."""
        quantities = [self.scale] if self.zero is None else [self.scale, self.zero]
        scale, *zero = (jnp.broadcast_to(v, (1, self.n, self.groups)) for v in quantities)
        return scale, self.codes[None], *zero

    def operands(self) -> tuple:
        return (self.codes, self.scale, self.zero)


def assert_close(actual, expected, tolerance, magnitude=None):
    """Compares relative to the largest expected entry, or magnitude: errors are those of sums."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape
    top = np.abs(expected if magnitude is None else magnitude).max(initial=1e-30)
    np.testing.assert_allclose(actual / top, expected / top, rtol=0, atol=tolerance)
