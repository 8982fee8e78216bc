"""Rules of pass 1 (see `rules`): indexing by position."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jax.lax import GatherScatterMode

from .atoms import Axis, axis_size
from .program import Record
from .rules import Shapes, pin_operand, pinned_result, rule

if TYPE_CHECKING:
    from .trace import Tracer


@rule("gather")
def _gather(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    numbers, sizes = record.params["dimension_numbers"], record.params["slice_sizes"]
    operand, indices = record.operands[0].axes, record.operands[1].axes
    batching = list(numbers.operand_batching_dims)
    offsets = list(numbers.offset_dims)
    out: dict[int, Axis] = {}
    windows = [
        k for k in range(len(operand)) if k not in {*numbers.collapsed_slice_dims, *batching}
    ]
    filled = record.params["mode"] == GatherScatterMode.FILL_OR_DROP
    for k in numbers.start_index_map:
        # A window as wide as its axis starts at 0 (`table[i]` with one index, under `vmap`).
        if filled or k not in windows or sizes[k] != axis_size(operand[k]):
            pin_operand(tracer, record, 0, k, f"gather looks axis {k} up by position")
    for k, o in zip(windows, offsets):
        if sizes[k] == axis_size(operand[k]):
            out[o] = operand[k]
            record.move(0, k, 0, o)
        else:
            pin_operand(tracer, record, 0, k, "gather window")
            out[o] = pinned_result(tracer, record, (0, o), sizes[k], "gather window")
    looked_up = [o for o in range(len(shapes[0])) if o not in offsets]
    for j, o in enumerate(looked_up):
        out[o] = indices[j]
        if j in numbers.start_indices_batching_dims:
            k = batching[numbers.start_indices_batching_dims.index(j)]
            tracer.unify(operand[k], indices[j], record, "batch of a gather")
            record.move(0, k, 0, o)
            record.move(1, j, 0, o)
        else:
            record.pinned_operands.add((1, j))
            record.pinned_results.add((0, o))
    pin_operand(tracer, record, 1, len(indices) - 1, "gather index vector")
    return [[out[k] for k in range(len(out))]]


@rule("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
def _scatter(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    numbers, name = record.params["dimension_numbers"], record.primitive
    operand, indices, updates = (value.axes for value in record.operands)
    batching = list(numbers.operand_batching_dims)
    indexed = set(numbers.scatter_dims_to_operand_dims)
    for k in range(len(operand)):
        record.move(0, k, 0, k)
    for k in indexed:
        pin_operand(tracer, record, 0, k, f"{name} writes axis {k} by position")
        record.pinned_results.add((0, k))
    windows = [
        k for k in range(len(operand)) if k not in {*numbers.inserted_window_dims, *batching}
    ]
    for k, u in zip(windows, numbers.update_window_dims):
        if k not in indexed and axis_size(operand[k]) == axis_size(updates[u]):
            tracer.unify(operand[k], updates[u], record)
            record.move(2, u, 0, k)
        else:
            pin_operand(tracer, record, 0, k, f"{name} window")
            pin_operand(tracer, record, 2, u, f"{name} window")
    rows = [u for u in range(len(updates)) if u not in numbers.update_window_dims]
    for j, u in enumerate(rows):
        if j in numbers.scatter_indices_batching_dims:
            k = batching[numbers.scatter_indices_batching_dims.index(j)]
            tracer.unify(operand[k], updates[u], record, f"batch of a {name}")
            tracer.unify(operand[k], indices[j], record, f"batch of a {name}")
            record.move(2, u, 0, k)
        else:
            pin_operand(tracer, record, 1, j, f"{name} by position")
            pin_operand(tracer, record, 2, u, f"{name} by position")
    pin_operand(tracer, record, 1, len(indices) - 1, f"{name} index vector")
    return [list(operand)]


@rule("dynamic_slice")
def _dynamic_slice(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    out = []
    for k, size in enumerate(record.params["slice_sizes"]):
        axis = record.operands[0].axes[k]
        if size == axis_size(axis):
            record.move(0, k, 0, k)
            out.append(axis)
        else:
            pin_operand(tracer, record, 0, k, "dynamic_slice")
            out.append(pinned_result(tracer, record, (0, k), size, "dynamic_slice"))
    return [out]


@rule("dynamic_update_slice")
def _dynamic_update_slice(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    operand, update = record.operands[0].axes, record.operands[1].axes
    for k in range(len(operand)):
        record.move(0, k, 0, k)
        if axis_size(operand[k]) == axis_size(update[k]):
            tracer.unify(operand[k], update[k], record)
            record.move(1, k, 0, k)
        else:
            pin_operand(tracer, record, 0, k, "dynamic_update_slice")
            pin_operand(tracer, record, 1, k, "dynamic_update_slice")
            record.pinned_results.add((0, k))
    return [list(operand)]
