"""Size of a parameter tree: bytes, effective bits, and how many entries are not zero."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import dense, is_compressed
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.evaluation.running import Placement


def footprint(params: Any) -> dict[str, Any]:
    """Bytes in memory and bits per weight, scales and zero points counted.

    Returns:
      `bytes`: of all buffers; `parameters`: entries of the dense arrays; `bits_per_weight`:
      8 * bytes / parameters.
    """
    leaves = [leaf for _, leaf in leaves_with_paths(params) if hasattr(leaf, "shape")]
    parameters = sum(int(leaf.size) for leaf in leaves)
    total = sum(bytes_of(leaf) for leaf in leaves)
    return {
        "bytes": total,
        "parameters": parameters,
        "bits_per_weight": 8 * total / max(parameters, 1),
    }


def bytes_of(leaf: Any) -> int:
    """Bytes of all buffers of a leaf, over all devices each entry counted once."""
    return sum(int(x.size) * x.dtype.itemsize for x in jax.tree.leaves(leaf))


def nonzero(params: Any) -> dict[str, int]:
    """How many entries of each parameter are not zero, by path; exact.

    Of a compressed leaf one matrix at a time is made dense: that of one layer, of one expert.
    """
    return {
        path: nonzero_of(leaf) for path, leaf in leaves_with_paths(params) if hasattr(leaf, "shape")
    }


def nonzero_of(leaf: Any) -> int:
    """How many entries of the dense array of a leaf are not zero."""
    program = _program(Placement.of(leaf).everywhere)
    # Counts of rows fit 32 bits, their sum over a stack of layers may not.
    return sum(int(np.asarray(program(leaf, i)).sum(dtype=np.int64)) for i in matrices(leaf))


def matrices(*leaves: Any) -> Iterator[tuple[np.int32, ...]]:
    """Indices of the leading axes that the compressed ones among `leaves` have in common."""
    leads = [leaf.lead for leaf in leaves if is_compressed(leaf)]
    shortest = min(leads, key=len, default=())
    for index in itertools.product(*(range(n) for n in shortest)):
        # Traced, so that one program serves all of them.
        yield tuple(np.int32(i) for i in index)


def taken(leaf: Any, index: tuple[Any, ...]) -> jax.Array:
    """The dense array at an index of the leading axes, `[..., columns]` of at least one axis."""
    part = jax.tree.map(lambda buffer: buffer[index], leaf) if index else leaf
    return jnp.atleast_1d(dense(part))


@functools.cache
def _program(everywhere: Any) -> Any:
    return jax.jit(
        lambda leaf, index: jnp.count_nonzero(taken(leaf, index), axis=-1), out_shardings=everywhere
    )
