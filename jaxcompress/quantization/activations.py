"""Activations rounded before the product: a quantized model made W8A8, W4A8 or FP8 W8A8."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.arrays.inputs import (
    INTEGERS,
    QuantizedInput,
    check_input_dtype,
    scale_of_range,
)
from jaxcompress.core.deferred import Deferred, as_shapes
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.core.readers.capture import capture
from jaxcompress.core.readers.contractions import contractions
from jaxcompress.layerwise.problem import Problem, StoredMatrix
from jaxcompress.layerwise.walk import Settings, walk
from jaxcompress.models import linear_paths
from jaxcompress.models.families import name_map_of
from jaxcompress.quantization.observers import STATISTICS, observed_range

GROUP_SIZE = 128  # columns of a token that share a scale, as of compressed-tensors' FP8_BLOCK


def activations(
    model: Model,
    paths: Collection[str] | None = None,
    *,
    calibration: Any = None,
    activations: Literal["int8", "int7", "int6", "int5", "int4", "fp8", "fp8_e5m2"] = "int8",
    activation_scaling: Literal["dynamic", "static"] = "dynamic",
    activation_symmetric: bool = True,
    activation_granularity: Literal["token", "group", "tensor"] = "token",
    activation_range: Literal["minmax", "moving", "percentile", "entropy", "mse"] = "minmax",
    activation_percentile: float = 99.99,
    activation_sequential: bool = False,
    dense_weights: bool = False,
) -> Model:
    """Round what the compressed weights multiply.

    Dynamic scales are found anew for every token, or for every input as a whole; static ones, one
    per matrix, from calibration data. Matrices that read the same values get the same scale.
    Sources: Jacob et al., "Quantization and training of neural networks for efficient
    integer-arithmetic-only inference", arXiv:1712.05877; Yao et al., "ZeroQuant",
    arXiv:2206.01861, section 4 (scales per token).

    Args:
      model: its compressed weights are told how to treat their input; nothing else changes.
      paths: of the weights; None: every compressed weight that is multiplied with (of a reference
        model: not the embeddings).
      calibration: array or tuple of arrays of inputs, `[samples, ...]`; where scales are static.
      activations: the format of activations. int7, per tensor and with a zero point, is what
        PyTorch's dynamic quantization computes with on x86.
      activation_scaling: "dynamic": scales from each input itself; "static": from calibration data.
      activation_symmetric: of integers: no zero point.
      activation_granularity: of dynamic scales: one per "token", per "group" of 128 columns of a
        token (beside FP8 weights in blocks), or per input ("tensor").
      activation_range: of static scales: what of the values seen is covered: "minmax" all,
        "moving" the moving average of the batches' extremes, "percentile", "entropy" (integers),
        "mse" the least squared error.
      activation_percentile: for the range of that name, % of the values (of each side where there
        is a zero point).
      activation_sequential: whether the values seen in a block come from blocks whose activations
        are rounded already.
      dense_weights: without `paths`: whether linear and convolutional weights that are not
        compressed are chosen too.

    Returns:
      The model with `QuantizedInput` leaves.

    Raises:
      InputError: nothing to wrap, options that do not go together, or no calibration data.
    """
    check_input_dtype(activations)
    static = activation_scaling == "static"
    if static and calibration is None:
        raise InputError("activations: static scales need calibration data; or use dynamic ones")
    if activations not in INTEGERS and not activation_symmetric:
        raise InputError(f"activations {activations}: has no zero point; keep it symmetric")
    how: dict[str, Any] = {
        "input_dtype": activations,
        "symmetric": activation_symmetric,
        "granularity": "tensor" if static else activation_granularity,
    }
    if how["granularity"] == "group":
        how["group_size"] = GROUP_SIZE
    leaves = dict(leaves_with_paths(model.params))
    inputs, axes = (), None
    if calibration is not None:
        inputs = _without_labels(calibration)
        axes = _multiplied(model, inputs)
    chosen = _chosen(model, leaves, axes, dense_weights) if paths is None else list(paths)
    unknown = [path for path in chosen if path not in leaves]
    if unknown or not chosen:
        what = f"the model has no parameter {unknown[0]!r}" if unknown else "no weight is quantized"
        raise InputError(f"activations: {what}; run a method such as rtn before")
    if not static:
        wrapped = {path: _wrapped(path, leaves[path], axes, how) for path in chosen}
        params = map_with_paths(lambda path, leaf: wrapped.get(path, leaf), model.params)
        return model.replace(params=params)
    observe = partial(_static, how=how, observer=activation_range, percentile=activation_percentile)
    settings = Settings(
        STATISTICS[activation_range], sequential="block" if activation_sequential else "none"
    )
    found = walk(
        _unwrapped(model, chosen),
        {path: {} for path in chosen},
        inputs,
        lambda problems: [observe(problem) for problem in problems],
        settings,
        what="activations",
    )
    return model.replace(params=found.params, notes=(*model.notes, *found.notes))


def _chosen(
    model: Model,
    leaves: Mapping[str, Any],
    axes: Mapping[str, Any] | None,
    dense_weights: bool,
) -> list[str]:
    """Paths of the weights that are multiplied with.

    Where there are no data to tell by, of a model that is not ours every compressed array: if it
    is only gathered from, an input to round never comes.
    """
    compressed = {path for path, leaf in leaves.items() if is_compressed(_like(leaf))}
    if model.config is not None:
        heads = {row.path for row in name_map_of(model.config).of_kind("head")}
        linear = linear_paths(model)
        wanted = compressed & {*linear, *heads} | (set(linear) if dense_weights else set())
    elif not dense_weights:
        wanted = compressed if axes is None else compressed & set(axes)
    elif axes is None:
        raise InputError("dense_weights: of this model, calibration data tell which are weights")
    else:
        wanted = set(axes)
    return [path for path in leaves if path in wanted]


def _like(leaf: Any) -> Any:
    return leaf.like if isinstance(leaf, Deferred) else leaf


def _wrapped(path: str, leaf: Any, axes: Mapping[str, Any] | None, how: dict[str, Any]) -> Any:
    """A leaf with dynamic scales."""

    def wrap(leaf: Any) -> Any:
        if isinstance(leaf, QuantizedInput):
            leaf = leaf.bare()
        stored = StoredMatrix.of(path, leaf, axes)
        return stored.put_back(QuantizedInput.of(stored.matrix(), **how))

    if isinstance(leaf, Deferred):
        return Deferred(lambda: wrap(leaf.read()), jax.eval_shape(wrap, leaf.like))
    return wrap(leaf)


def _static(
    problem: Problem, *, how: dict[str, Any], observer: str, percentile: float
) -> QuantizedInput:
    """A matrix with the static scale of what it was seen to multiply."""
    dtype, symmetric = how["input_dtype"], how["symmetric"]
    statistics = jax.device_get(dict(problem.statistics))
    low, high = observed_range(
        statistics, observer, input_dtype=dtype, symmetric=symmetric, percentile=percentile
    )
    matrix = problem.matrix
    # In the dtype of the model, in which it is stored: the grid is one of such a scale.
    ends = [jnp.asarray(x, matrix.dtype)[..., None, None] for x in (low, high)]
    scale, zero = scale_of_range(ends[0], ends[1], dtype, symmetric)
    return QuantizedInput.of(matrix, input_scale=scale, input_zero_point=zero, **how)


def _unwrapped(model: Model, chosen: Collection[str]) -> Model:
    """The model in which the inputs of the chosen weights are not rounded."""
    wanted = set(chosen)

    def plain(path: str, leaf: Any) -> Any:
        return leaf.bare() if path in wanted and isinstance(leaf, QuantizedInput) else leaf

    return model.replace(params=map_with_paths(plain, model.params))


def _without_labels(calibration: Any) -> tuple[Any, ...]:
    """The inputs; labels, int `[samples]`, may come as the last of several arrays."""
    inputs = calibration if isinstance(calibration, tuple) else (calibration,)
    last = inputs[-1]
    labels = len(inputs) > 1 and last.ndim == 1 and np.issubdtype(last.dtype, np.integer)
    return inputs[:-1] if labels else inputs


def _multiplied(model: Model, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Contracted axes of the parameters that a product reads, by path."""
    one = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in inputs]
    params = as_shapes(model.params)
    read: set[str] = set()

    def trace(params: Any, *inputs: Any) -> None:
        read.update(path for path, _ in capture(model.apply, ())(params, *inputs))

    jax.eval_shape(trace, params, *one)
    axes = contractions(model.apply)(params, *one)  # of tables that are gathered from, too
    return {path: axes[path] for path in axes if path in read}
