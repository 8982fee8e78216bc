"""Quantization-aware training: a quantized model in the form that trains, and back.

    ready = prepare_qat(compress(model, "rtn", bits=3), model)   # or gptq, activations, ...
    ... train `ready` as any model ...
    small = convert(ready)                                       # computes the same, bit for bit

What was quantized is full weights again, rounded on their way into the model. Gradients pass
straight through the rounding (Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2018,
arXiv:1712.05877, section 3), and the steps of the grid are learned (LSQ: Esser et al. 2020,
arXiv:1902.08153). Inputs that are rounded stay so, and a static scale of theirs trains too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import Array, dense, is_compressed, to_matrix
from jaxcompress.core.arrays.codebook import Codebook
from jaxcompress.core.arrays.floats import Float
from jaxcompress.core.arrays.inputs import QuantizedInput
from jaxcompress.core.arrays.training import FakeEncoded, FakeQuantized, FixedTable, Masked
from jaxcompress.core.arrays.views import canonical
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.training.masks import is_pruned


def prepare_qat(quantized: Model, model: Model | None = None, *, keep_zeros: bool = True) -> Model:
    """A quantized model in the form in which it trains; it computes what it computed.

    Args:
      quantized: by any method. Its integers become `FakeQuantized`, its narrow floats and tables
        `FakeEncoded`, also where they are the weights of rounded inputs, the values of n:m sparse
        arrays or the rest beside low rank parts.
      model: the model that was quantized. Training begins with its weights wherever they round to
        the quantized ones; elsewhere, and without it, with the quantized ones.
      keep_zeros: pruned entries of `model`'s matrices (see `training.masks.hold_zeros`) stay 0.

    Raises:
      InputError: nothing is quantized, or `model` is of other shapes.
    """
    given = {} if model is None else dict(leaves_with_paths(model.params))
    found: list[str] = []

    def change(path: str, leaf: Any) -> Any:
        if not is_compressed(leaf):
            return leaf
        start = None
        if path in given:
            start = dense(given[path])
            if start.shape != leaf.shape:
                raise InputError(f"{path}: has shape {leaf.shape}, in the model {start.shape}")
        made = _trainable(leaf, start, keep_zeros)
        if made is not leaf:
            found.append(path)
        return made

    params = map_with_paths(change, quantized.params)
    if not found:
        raise InputError("prepare_qat: no weight is quantized; run a method such as rtn before")
    return quantized.replace(params=params)


def convert(model: Model) -> Model:
    """A model that was trained in the form of `prepare_qat` as it is stored.

    Everything has the values, bit for bit, that the model saw while it trained.
    """

    def change(leaf: Any) -> Any:
        if isinstance(leaf, FakeQuantized):
            return leaf.to_affine()
        if isinstance(leaf, FakeEncoded):
            return leaf.to_stored()
        return _within(leaf, change) if is_compressed(leaf) else leaf

    return model.replace(params=jax.tree.map(change, model.params, is_leaf=is_compressed))


def _trainable(leaf: Any, start: Array | None, keep_zeros: bool) -> Any:
    """A compressed leaf in the form that trains; `start`: the dense array to begin with."""
    if isinstance(leaf, QuantizedInput):
        if not is_compressed(leaf.weight):
            return leaf
        inner = _trainable(leaf.weight.replace(dims=leaf.dims), start, keep_zeros)
        return leaf.replace(weight=inner.replace(dims=leaf.weight.dims))
    if not isinstance(leaf, (Affine, Float, Codebook)):
        return _within(leaf, lambda part: _trainable(part, None, keep_zeros))
    leaf = canonical(leaf)
    made = _with_weight(leaf, leaf.matrix())
    if start is None:
        return made
    matrix = to_matrix(start, leaf.dims).astype(leaf.dtype)
    same = _with_weight(leaf, matrix).matrix() == leaf.matrix()
    weight: Any = jnp.where(same, matrix, leaf.matrix())
    if keep_zeros and is_pruned(start):
        weight = Masked(weight, matrix != 0, leaf.dims, leaf.casts)
    return made.replace(weight=weight)


def _with_weight(leaf: Affine | Float | Codebook, weight: Array) -> FakeQuantized | FakeEncoded:
    if not isinstance(leaf, Affine):
        form: Any = leaf
        if isinstance(leaf, Codebook) and leaf.scale is not None:
            form = FixedTable(**{f.name: getattr(leaf, f.name) for f in fields(cast(Any, leaf))})
        return FakeEncoded(weight, form, dims=leaf.dims, casts=leaf.casts)
    return FakeQuantized(
        weight,
        leaf.scale,
        leaf.zero_point,
        leaf.bits,
        dims=leaf.dims,
        casts=leaf.casts,
        width=leaf.width,
    )


def _within(leaf: Any, change: Callable[[Any], Any]) -> Any:
    """`leaf` with its buffers changed that are compressed arrays; itself where none changes."""
    inner = {name: x for name, x in leaf.buffers.items() if is_compressed(x)}
    made = {name: change(x) for name, x in inner.items()}
    return leaf.replace(**made) if any(made[n] is not inner[n] for n in inner) else leaf
