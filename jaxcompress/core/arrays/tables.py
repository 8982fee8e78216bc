"""Fixed tables of values: NF4, FP4, and the dynamic map of 8-bit scales."""

from __future__ import annotations

import numpy as np

# Dettmers et al., "QLoRA", arXiv:2305.14314, appendix E: quantiles of a normal distribution.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Floats of 3 bits of exponent and no mantissa, the largest 1, as bitsandbytes' `fp4`; zero has two
# codes, and no sign.
FP4_SIZES = (0.0, 0.0052083334885537624, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0)
FP4 = (*(0.0 - size for size in reversed(FP4_SIZES)), *FP4_SIZES)

TABLES = {"nf4": NF4, "fp4": FP4}


def dynamic_map(bits: int) -> np.ndarray:
    """Values in -1 .. 1, as finely spaced relative to their size as codes allow; float32 ascending.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861,
    section 2 and figure 2: a decimal exponent of any number of bits, then a fraction linear in
    0.1 .. 1. Together with 0 and 1.

    Args:
      bits: of a code, 2 to 8.
    """
    values = [0.0, 1.0]
    for exponent in range(bits - 1):
        ends = _linspace(0.1, 1.0, 2**exponent + 1)
        means = (ends[:-1] + ends[1:]) / np.float32(2)
        sizes = np.float32(10.0 ** (exponent - (bits - 2))) * means
        values += [*sizes, *-sizes]
    return np.sort(np.asarray(values, np.float32))


def _linspace(first: float, last: float, count: int) -> np.ndarray:
    """Evenly spaced float32, each half counted from its own end and rounded once, as PyTorch's."""
    start, stop = np.float32(first), np.float32(last)
    step = np.float64((stop - start) / np.float32(count - 1))
    at = np.arange(count)
    ends = np.where(at < count // 2, start + at * step, stop - (count - 1 - at) * step)
    return ends.astype(np.float32)
