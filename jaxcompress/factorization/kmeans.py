"""Weight sharing: the weights of a matrix take few values, found by k-means."""

from __future__ import annotations

from jaxcompress.core.arrays.base import Array, CompressedArray, dense
from jaxcompress.core.arrays.codebook import Codebook
from jaxcompress.layerwise.kmeans import Init, Sharing, shared_values


def kmeans(
    weight: Array | CompressedArray,
    *,
    bits: int = 4,
    granularity: Sharing = "tensor",
    group_size: int = 128,
    init: Init = "optimal",
    steps: int = 200,
    random_seed: int = 0,
) -> Codebook:
    """Weight sharing: every weight becomes the mean of its cluster, by k-means.

    Source: Han et al., "Deep Compression", arXiv:1510.00149, section 3 (linear initialization:
    section 3.2); the best intervals: Wang and Song, "Ckmeans.1d.dp", The R Journal 2011.

    Args:
      weight: float `[*lead, N, K]`, N rows by K contracted columns.
      bits: of a code, 1 to 8: 2^bits shared values.
      granularity: what shares a table: "tensor", the matrix; "channel", each row; "group": the
        matrix, after every group of columns is divided by its largest absolute weight.
      group_size: contracted columns of a group; must divide K; -1: the whole row.
      init: where Lloyd's algorithm begins. "optimal": at the best intervals over all cuts, which
        errs least (up to 5 bits; beyond as "kmeans++"); "kmeans++": centers drawn one after the
        other, far from those before; "linear": evenly between the smallest and the largest weight,
        as the paper, which keeps large weights.
      steps: of Lloyd's algorithm at most; it ends where nothing changes.
      random_seed: of the draws of "kmeans++".

    Returns:
      The codes and the table, in the dims `[N, K]` with the dtype of `weight`. Where a matrix holds
      exact zeros, so does its table: a pruned model stays pruned.

    Raises:
      InputError: bits outside of 1..8, or a group size that does not divide K.
    """
    return shared_values(
        dense(weight),
        bits=bits,
        granularity=granularity,
        group_size=group_size,
        init=init,
        steps=steps,
        seed=random_seed,
    )
