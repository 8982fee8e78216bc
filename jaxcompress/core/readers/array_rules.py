"""Views and products by the primitive that asks for them: equations to the arrays' own rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import JaxprEqn

from jaxcompress.core.arrays import parallel, products, updates, views
from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.readers import unofficial
from jaxcompress.core.readers.walk import ArrayRule

Values = Sequence[Any]


def _one(leaf: Any | None) -> list[Any] | None:
    return None if leaf is None else [leaf]


def _dot_general(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    side = 0 if is_compressed(values[0]) else 1
    leaf, x = values[side], values[1 - side]
    p = eqn.params
    dtype = unofficial.aval(eqn.outvars[0]).dtype
    out = products.dot_general(leaf, x, p["dimension_numbers"], side, p["precision"], dtype)
    if out is not None and p["out_sharding"] is not None:
        out = jax.sharding.reshard(out, p["out_sharding"])
    return _one(out)


def _conv(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    x, kernel = values
    if is_compressed(x) or not is_compressed(kernel):
        return None
    return _one(
        products.conv_general_dilated(
            x, kernel, unofficial.aval(eqn.outvars[0]).dtype, **eqn.params
        )
    )


def _gather(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    leaf, indices = values
    if not is_compressed(leaf):
        return None
    p = eqn.params
    return _one(
        products.gather(
            leaf,
            indices,
            dimension_numbers=p["dimension_numbers"],
            slice_sizes=p["slice_sizes"],
            mode=p["mode"],
            fill_value=p["fill_value"],
        )
    )


def _transpose(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    return _one(views.transpose(values[0], eqn.params["permutation"]))


def _reshape(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    p = eqn.params
    if p["dimensions"] is not None or p["sharding"] is not None:
        return None
    return _one(views.reshape(values[0], p["new_sizes"]))


def _broadcast(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    p = eqn.params
    if p["sharding"] is not None or len(values) > 1:
        return None
    return _one(views.broadcast_in_dim(values[0], p["shape"], p["broadcast_dimensions"]))


def _convert(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    return _one(views.convert_element_type(values[0], eqn.params["new_dtype"]))


def _squeeze(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    return _one(views.squeeze(values[0], eqn.params["dimensions"]))


def _slice(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    p = eqn.params
    return _one(views.lax_slice(values[0], p["start_indices"], p["limit_indices"], p["strides"]))


def _split(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    return views.split(values[0], eqn.params["sizes"], eqn.params["axis"])


def _dynamic_slice(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    leaf, *starts = values
    if not is_compressed(leaf):
        return None
    return _one(views.dynamic_slice(leaf, starts, eqn.params["slice_sizes"]))


def _concatenate(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    if not all(map(is_compressed, values)):
        return None
    return _one(views.concatenate(values, eqn.params["dimension"]))


def _stack(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    if not all(map(is_compressed, values)):
        return None
    return _one(views.stack(values, eqn.params["axis"]))


def _dynamic_update_slice(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    leaf, update, *starts = values
    if not is_compressed(leaf):
        return None
    return _one(updates.dynamic_update_slice(leaf, update, starts))


def _scatter(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    leaf, indices, update = values
    p = eqn.params
    if not is_compressed(leaf) or is_compressed(indices) or p["update_jaxpr"] is not None:
        return None
    return _one(
        updates.scatter(
            leaf,
            indices,
            update,
            dimension_numbers=p["dimension_numbers"],
            indices_are_sorted=p["indices_are_sorted"],
            unique_indices=p["unique_indices"],
            mode=p["mode"],
        )
    )


def _optimization_barrier(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    return list(lax.optimization_barrier(tuple(values)))


def _sharding_constraint(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    return _one(parallel.constrain(values[0], eqn.params["sharding"]))


def _all_gather(eqn: JaxprEqn, values: Values) -> list[Any] | None:
    p = eqn.params
    if len(values) > 1 or not p["tiled"] or p["axis_index_groups"] is not None:
        return None
    return _one(parallel.all_gather(values[0], p["axis_name"], p["all_gather_dimension"]))


ARRAY_RULES: dict[str, ArrayRule] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "squeeze": _squeeze,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "concatenate": _concatenate,
    "stack": _stack,
    "dynamic_update_slice": _dynamic_update_slice,
    "scatter": _scatter,
    "optimization_barrier": _optimization_barrier,
    "sharding_constraint": _sharding_constraint,
    "all_gather": _all_gather,
}
