"""Low rank factors beside a frozen low-bit model, and their merging (LoRA, QLoRA, LoftQ).

ready = add_lora(compress(model, "rtn", bits=3), rank=8)
... train its "factors" alone: split(ready.params, "factors"), or train="factors" of a stage ...
small = merge_lora(trained)                # or left apart
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import (
    STORED,
    Array,
    CompressedArray,
    dense,
    is_compressed,
    to_matrix,
)
from jaxcompress.core.arrays.codebook import Codebook, encode_codebook
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.floats import Float
from jaxcompress.core.arrays.inputs import QuantizedInput
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.arrays.rounding import in_groups
from jaxcompress.core.arrays.views import canonical, with_dims
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.layerwise.low_rank import check_rank, compensated
from jaxcompress.models import linear_paths


def add_lora(
    quantized: Model, model: Model | None = None, *, rank: int = 16, seed: int = 0
) -> Model:
    """A quantized model with a low rank part beside each of its weights: W + A B.

    Train the kind "factors" (`core.partition`): codes and scales stay. Sources: Hu et al., "LoRA",
    arXiv:2106.09685, section 4.1 (the factor alpha / r is left to the learning rate); Dettmers et
    al., "QLoRA", arXiv:2305.14314, section 3. With `model`, A B is the nearest of its rank to what
    quantization lost: Li et al., "LoftQ", arXiv:2310.08659, algorithm 1, for a quantized part that
    is given. The method `loftq` makes both parts in turns.

    Args:
      quantized: by any method. Its compressed linear weights (of a model without config: all
        compressed weights) become a `Sum` of a `LowRank` and themselves.
      model: the model that was quantized; None: A is 0, and the model computes what it did.
      rank: of A B.
      seed: of B where A is 0: normal, of variance 1 / K.

    Raises:
      InputError: nothing is compressed, or a rank out of range.
    """
    leaves = dict(leaves_with_paths(quantized.params))
    given = {} if model is None else dict(leaves_with_paths(model.params))
    linear = linear_paths(quantized) or tuple(leaves)
    chosen = [path for path in linear if is_compressed(leaves.get(path))]
    if not chosen:
        raise InputError("lora: no weight is compressed; run a method such as rtn before")

    def change(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        key = jax.random.fold_in(jax.random.key(seed), chosen.index(path))
        start = to_matrix(dense(given[path]), leaf.dims) if path in given else None
        try:
            return _beneath(leaf, lambda base: _with_factors(base, start, rank, key))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    return quantized.replace(params=map_with_paths(change, quantized.params))


def merge_lora(model: Model, *, requantize: bool = False) -> Model:
    """Low rank parts added to what they stand beside.

    Args:
      model: with the sums of `add_lora`, `loftq`, `eora` and their kin.
      requantize: whether a sum is rounded to the format of its quantized part, with new scales,
        which loses some of what was trained; otherwise it becomes a dense array of the same bits.

    Raises:
      InputError: there are no such sums, or a part in a format that has no rounding of its own.
    """
    found: list[str] = []

    def change(path: str, leaf: Any) -> Any:
        inner = leaf.weight if isinstance(leaf, QuantizedInput) else leaf
        if not isinstance(inner, Sum) or not isinstance(inner.first, LowRank):
            return leaf
        found.append(path)
        if requantize:
            return _beneath(leaf, lambda part: _as_quantized(path, part))
        if inner is leaf:
            return leaf.dense()
        return leaf.replace(weight=inner.matrix())

    params = map_with_paths(change, model.params)
    if not found:
        raise InputError("merge_lora: no weight has a low rank part; run lora or loftq before")
    return model.replace(params=params)


def _beneath(leaf: Any, change: Callable[[CompressedArray], CompressedArray]) -> Any:
    """`change` of the array in the dims `[N, K]`, or of the weight below a rounded input."""
    if isinstance(leaf, QuantizedInput):
        return leaf.replace(weight=change(with_dims(leaf.weight, STORED)))
    return with_dims(change(with_dims(leaf, STORED)), leaf.dims)


def _with_factors(
    base: CompressedArray, start: Array | None, rank: int, key: Array
) -> CompressedArray:
    base = canonical(base)
    if start is not None:
        return compensated(start, base, rank)
    shape: Any = jax.ShapeDtypeStruct(base.shape, base.dtype)
    check_rank(rank, shape)
    *lead, rows, columns = base.shape
    a = jnp.zeros((*lead, rows, rank), base.dtype)
    b = jax.random.normal(key, (*lead, rank, columns)) / jnp.sqrt(columns)
    return Sum.of(LowRank(a, b.astype(base.dtype), STORED, (str(base.dtype),)), base)


def _as_quantized(path: str, part: Any) -> CompressedArray:
    """A sum in the format of its second part."""
    matrix, form = part.matrix(), canonical(part.second)
    if isinstance(form, (Affine, Float)):
        return form.encode(matrix)
    if isinstance(form, Codebook) and form.scale is not None and not is_compressed(form.scale):
        grouped = jnp.abs(in_groups(matrix, form.scale.shape[-1]))
        scale = grouped.max(-1).astype(form.scale.dtype)
        return encode_codebook(
            matrix, form.table, scale, bits=form.bits, dims=STORED, fixed=form.fixed
        )
    raise InputError(
        f"{path}: {type(form).__name__} has no scales to be found anew; leave requantize out"
    )
