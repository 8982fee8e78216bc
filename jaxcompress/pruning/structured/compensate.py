"""What the removed indices contributed, made up for by what stays.

"bias": the mean of the removed inputs goes through their weights into the bias of the consumer,
where it has one (a subtracted mean, as of a batch norm, counts as one). "refit": the consumer's
kept columns are fitted anew to its old outputs, by least squares over the calibration data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import dense
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.core.readers.coupling import Group
from jaxcompress.core.readers.coupling.program import PARAMETER, Program, Record, Value
from jaxcompress.core.readers.coupling.semantics import PRODUCTS
from jaxcompress.core.readers.kept import KeptArrays
from jaxcompress.layerwise.batch import over_lead
from jaxcompress.layerwise.problem import StoredMatrix
from jaxcompress.pruning.structured.data import Seen
from jaxcompress.pruning.structured.importance import consumers
from jaxcompress.pruning.structured.roles import active_values

Compensate = Literal["none", "bias", "refit"]

DAMP = 1e-3  # ridge of the refit, as a share of the mean diagonal of the kept second moments

# Between a product and its bias: operations that leave every entry where it is.
_PASSING = frozenset(
    [
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "name",
        "optimization_barrier",
        "reshape",
        "sharding_constraint",
        "squeeze",
        "stop_gradient",
    ]
)


class Bias(NamedTuple):
    """The parameter that is added to the outputs of a weight, or subtracted (sign -1)."""

    path: str
    sign: int


def compensated(
    seen: Seen, program: Program, chosen: Sequence[Group], kept: KeptArrays, how: Compensate
) -> tuple[Any, list[str]]:
    """Parameters, at full size, that lose less when the indices not in `kept` go.

    Args:
      seen: the dense network and its calibration data.
      program: of the network.
      chosen: the groups that are cut.
      kept: what stays.
      how: see the module's text; "refit" moves the bias too, where there is one.

    Returns:
      (parameters, what was done, in words).
    """
    params = seen.model.params
    if how == "none":
        return params, []
    axes_of = {(m.path, m.axis) for group in chosen for m in consumers(seen, group)}
    leaves = dict(leaves_with_paths(params))
    sizes = {p: _moment_entries(seen, p, leaves[p].shape) for p, _ in sorted(axes_of)}
    biases = find_biases(program)
    needed = ["second_moment", "sum_x"] if how == "refit" else ["sum_x"]
    new: dict[str, Any] = {}
    done = 0
    for paths in seen.by_memory(sizes if how == "refit" else dict.fromkeys(sizes, 0)):
        for path, own in seen.activations(paths, needed).items():
            bias = _fitting(biases.get(path), leaves, path, seen)
            if how == "bias" and bias is None:
                continue
            stored = StoredMatrix.of(path, leaves[path], {path: seen.axes[path]})
            mask = _kept_columns(seen, path, leaves[path].shape, kept)
            matrix, shift = _made_up(dense(stored.matrix()), mask, own, how, bias is not None)
            if how == "refit":
                new[path] = stored.put_back(matrix.astype(stored.leaf.dtype))
            if bias is not None:
                old = new.get(bias.path, leaves[bias.path])
                moved = old + bias.sign * shift.reshape(old.shape)
                new[bias.path] = moved.astype(old.dtype)
            done += 1
    note = f"compensate {how}: {done} of {len(sizes)} weights that consume what was cut"
    return map_with_paths(lambda path, leaf: new.get(path, leaf), params), [note]


# ---------------------------------------------------------------------------- the arithmetic


def _made_up(
    matrix: jax.Array, mask: np.ndarray, own: Mapping[str, Any], how: str, has_bias: bool
) -> tuple[jax.Array, jax.Array]:
    """The consumer's matrix `[*lead, N, K]` and what its outputs are to be shifted by `[*lead, N]`.

    `mask` is True, `[*lead, K]` or `[K]`, where a column stays.
    """
    matrix = matrix.astype(jnp.float32)
    stays = jnp.broadcast_to(jnp.asarray(mask), (*matrix.shape[:-2], matrix.shape[-1]))
    mean = own["sum_x"] / jnp.maximum(own["count"], 1)[..., None]
    if how == "refit":
        moment = own["second_moment"] / jnp.maximum(own["count"], 1)[..., None, None]
        refit = _REFIT_CENTERED if has_bias else _REFIT
        fitted = over_lead(refit, matrix, stays, moment, mean)
    else:
        fitted = jnp.where(stays[..., None, :], matrix, 0)
    return fitted, jnp.einsum("...nk,...k->...n", matrix - fitted, mean, precision="highest")


def _refitted(
    matrix: jax.Array, mask: jax.Array, moment: jax.Array, mean: jax.Array, *, centered: bool
) -> jax.Array:
    """Least squares of the kept columns: W H P (P H P)^-1, P the kept columns.

    Where a bias takes the mean, deviations from it are fitted.
    """
    if centered:
        moment = moment - jnp.outer(mean, mean)
    both = mask[:, None] & mask[None, :]
    inside = jnp.where(both, moment, 0)
    ridge = DAMP * jnp.trace(inside) / jnp.maximum(mask.sum(), 1)
    ridge = jnp.maximum(ridge, jnp.finfo(jnp.float32).tiny)  # where nothing was ever active
    system = inside + jnp.diag(jnp.where(mask, ridge, 1.0))
    # The ridge draws towards the old columns, not towards zero.
    right = jnp.dot(matrix, jnp.where(mask[None, :], moment, 0), precision="highest")
    right = right + ridge * jnp.where(mask, matrix, 0)
    with jax.default_matmul_precision("highest"):
        factor = jax.scipy.linalg.cho_factor(system, lower=True)
        fitted = jax.scipy.linalg.cho_solve(factor, jnp.where(mask, right, 0).T).T
    return jnp.where(mask, fitted, 0)


# Made once, so that one shape compiles once.
_REFIT, _REFIT_CENTERED = partial(_refitted, centered=False), partial(_refitted, centered=True)


def _moment_entries(seen: Seen, path: str, shape: tuple[int, ...]) -> int:
    axes = seen.axes[path]
    columns = int(np.prod([shape[axis] for axis in axes], dtype=np.int64))
    return int(np.prod(shape[: axes.lead], dtype=np.int64)) * columns**2


def _kept_columns(seen: Seen, path: str, shape: tuple[int, ...], kept: KeptArrays) -> np.ndarray:
    """Which contracted columns of a weight stay, bool `[K]` or `[*lead, K]`."""
    axes = seen.axes[path]
    lead = shape[: axes.lead]
    sizes = [shape[axis] for axis in axes]
    mask = np.ones((*lead, *sizes), bool)
    for place, axis in enumerate(axes):
        if axis not in kept.get(path, {}):
            continue
        rows = np.atleast_2d(kept[path][axis])
        one = np.zeros((len(rows), shape[axis]), bool)
        np.put_along_axis(one, rows, True, axis=1)
        view = [1] * mask.ndim
        view[len(lead) + place] = shape[axis]
        if len(rows) > 1:
            view[0] = len(rows)
        mask &= one.reshape(view)
    return mask.reshape(*lead, -1)


# ---------------------------------------------------------------------------- biases


def find_biases(program: Program) -> dict[str, Bias]:
    """By weight, the parameter that is added to (or subtracted from) what its product gives.

    Only where each is the other's alone: a bias that several products share is none.
    """
    active = active_values(program)
    readers: dict[Value, list[Record]] = {}
    made_by: dict[Value, Record] = {}
    for record in program.records:
        made_by.update(dict.fromkeys(record.results, record))
        for value in dict.fromkeys(record.operands):
            readers.setdefault(value, []).append(record)
    found: dict[str, list[Bias | None]] = {}
    for record in program.records:
        if record.primitive not in PRODUCTS:
            continue
        weights = [v for v in record.operands[:2] if v not in active]
        if len(weights) == 1 and (path := _parameter(made_by, weights[0])):
            found.setdefault(path, []).append(_added(made_by, readers, record.results[0]))
    single = {path: b[0] for path, b in found.items() if len(b) == 1 and b[0] is not None}
    shared = [bias.path for bias in single.values()]
    return {path: bias for path, bias in single.items() if shared.count(bias.path) == 1}


def _parameter(
    made_by: Mapping[Value, Record],
    value: Value,
    readers: Mapping[Value, list[Record]] | None = None,
) -> str | None:
    """The parameter that a value is, seen through casts, slices of scans and transposes.

    With `readers`, only if nothing else reads it.
    """
    through = _PASSING | {"scan_slice", "transpose"}
    while readers is None or len(readers[value]) == 1:
        if value.kind == PARAMETER:
            return value.name
        record = made_by.get(value)
        if record is None or record.primitive not in through:
            return None
        value = record.operands[0]
    return None


def _added(
    made_by: Mapping[Value, Record], readers: Mapping[Value, list[Record]], value: Value
) -> Bias | None:
    """The parameter that is added to a value before anything else happens to it."""
    while len(readers.get(value, ())) == 1:
        record = readers[value][0]
        if record.primitive in _PASSING:
            value = record.results[0]
            continue
        if record.primitive in ("add", "add_any", "sub") and len(record.operands) == 2:
            first = record.operands[0] is value
            other = record.operands[1] if first else record.operands[0]
            path = _parameter(made_by, other, readers)
            if path is not None and (first or record.primitive != "sub"):
                return Bias(path, -1 if record.primitive == "sub" else 1)
        return None
    return None


def _fitting(bias: Bias | None, leaves: Mapping[str, Any], path: str, seen: Seen) -> Bias | None:
    """The bias, if it has one entry for each row of the weight's matrix, in their order."""
    if bias is None:
        return None
    axes, shape = seen.axes[path], leaves[path].shape
    rows = [n for k, n in enumerate(shape) if k >= axes.lead and k not in axes]
    fits = leaves[bias.path].shape in (
        (*shape[: axes.lead], *rows),
        (*shape[: axes.lead], int(np.prod(rows))),
    )
    return bias if fits else None
