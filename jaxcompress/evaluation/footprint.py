"""Bytes and effective bits of a parameter tree."""

from __future__ import annotations

from typing import Any

import jax

from jaxcompress.core.paths import leaves_with_paths


def footprint(params: Any) -> dict[str, Any]:
    """Bytes in memory and bits per weight, scales and zero points counted.

    Returns:
      `bytes`: of all buffers; `parameters`: entries of the dense arrays; `bits_per_weight`:
      8 * bytes / parameters.
    """
    leaves = [leaf for _, leaf in leaves_with_paths(params) if hasattr(leaf, "shape")]
    parameters = sum(int(leaf.size) for leaf in leaves)
    total = sum(x.size * x.dtype.itemsize for leaf in leaves for x in jax.tree.leaves(leaf))
    return {
        "bytes": int(total),
        "parameters": parameters,
        "bits_per_weight": 8 * total / max(parameters, 1),
    }
