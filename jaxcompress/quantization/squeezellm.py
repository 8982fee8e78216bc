"""SqueezeLLM: tables of values that err least where the loss feels it, and a few weights apart."""

from __future__ import annotations

from decimal import Decimal

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import STORED, Array, CompressedArray, dense
from jaxcompress.core.arrays.codebook import Codebook
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.csr import CSR
from jaxcompress.core.errors import InputError
from jaxcompress.layerwise.kmeans import Sharing, shared_values
from jaxcompress.layerwise.lowest import lowest

SENSITIVE = 1 / 9  # of the weights kept apart: 0.05 % of 0.45 % in the paper


def squeezellm(
    weight: Array | CompressedArray,
    squared_gradient: Array,
    *,
    bits: int = 4,
    granularity: Sharing = "channel",
    group_size: int = 128,
    sparse: float = 0.0,
    random_seed: int = 0,
) -> Codebook | Sum:
    """SqueezeLLM: k-means in which an error counts as much as the loss feels it.

    The values of a table minimize sum F (w - value)^2, F the diagonal of the Fisher matrix. Source:
    Kim et al., "SqueezeLLM", arXiv:2306.07629, section 4.1 (equation 4); dense and sparse: section
    4.2.

    Args:
      weight: float `[*lead, N, K]`, N rows by K contracted columns.
      squared_gradient: F in the shape of `weight`. A table of which no weight counts is made as if
        all did.
      bits: of a code, 1 to 8: 2^bits values.
      granularity: what shares a table: "channel", each row, as in the paper; "tensor", the matrix;
        "group": the matrix, after every group of columns is divided by its largest absolute weight.
      group_size: contracted columns of a group; must divide K; -1: the whole row.
      sparse: share of a matrix's weights that are kept apart as they are: the largest, and, one in
        nine of them, those of the largest F (the paper: 0.0045).
      random_seed: of the draws of the first values, from 6 bits on.

    Returns:
      A `Codebook`, in the dims `[N, K]` with the dtype of `weight`; with `sparse` its `Sum` with a
      `CSR`.

    Raises:
      InputError: bits outside of 1..8, a share outside of [0, 1), or a group size that does not
        divide K.
    """
    matrix = dense(weight)
    if not 0 <= sparse < 1:
        raise InputError(f"sparse {sparse}: must be a share in [0, 1), such as 0.0045")
    apart, inside = None, matrix
    if sparse:
        apart = _apart(matrix, squared_gradient, sparse)
        # Out of the way of the tables: their error costs nothing there, and they widen no range.
        squared_gradient = jnp.where(apart, 0, squared_gradient)
        most = jnp.max(jnp.where(apart, 0, jnp.abs(matrix)), axis=-1, keepdims=True)
        inside = jnp.clip(matrix, -most, most)
    rest = shared_values(
        inside,
        squared_gradient,
        bits=bits,
        granularity=granularity,
        group_size=group_size,
        seed=random_seed,
    )
    if apart is None:
        return rest
    missing = (matrix.astype(jnp.float32) - rest.matrix().astype(jnp.float32)).astype(matrix.dtype)
    return Sum.of(CSR.from_mask(missing, apart, dims=STORED), rest)


def _apart(matrix: Array, importance: Array, share: float) -> Array:
    """The weights that are kept apart, bool `[*lead, N, K]`."""
    *lead, rows, columns = matrix.shape
    count = int(Decimal(repr(share)) * rows * columns)
    sensitive = int(count * SENSITIVE)

    def of_one(matrix: Array, importance: Array) -> Array:
        felt = ~lowest(importance.astype(jnp.float32), jnp.int32(rows * columns - sensitive))
        size = jnp.where(felt, 0, jnp.abs(matrix.astype(jnp.float32)))
        return felt | ~lowest(size, jnp.int32(rows * columns - count + sensitive))

    flat = (jnp.reshape(x, (-1, rows, columns)) for x in (matrix, importance))
    return jax.lax.map(lambda pair: of_one(*pair), tuple(flat)).reshape(*lead, rows, columns)
