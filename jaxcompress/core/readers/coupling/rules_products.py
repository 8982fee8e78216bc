"""Rules of pass 1 (see `rules`): products, convolutions and windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .atoms import Axis, axis_size, fresh
from .program import Pair, Record
from .rules import Shapes, opaque, pin_operand, pinned_result, rule

if TYPE_CHECKING:
    from .trace import Tracer


@rule("dot_general")
def _dot_general(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    (contract, batch) = record.params["dimension_numbers"]
    return [_dot(tracer, record, contract, batch, skip=())]


def _dot(
    tracer: Tracer,
    record: Record,
    contract: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    skip: Sequence[int],
) -> list[Axis]:
    left, right = record.operands[0].axes, record.operands[1].axes
    for a, b in zip(*contract):
        tracer.unify(left[a], right[b], record, "contraction")
        record.contracted.append(Pair(0, a, 1, b))
    out: list[Axis] = []
    for a, b in zip(*batch):
        tracer.unify(left[a], right[b], record, "batch of a product")
        record.batched.append(Pair(0, a, 1, b))
        record.move(0, a, 0, len(out))
        record.move(1, b, 0, len(out))
        out.append(left[a])
    for operand, axes, used in (
        (0, left, {*contract[0], *batch[0]}),
        (1, right, {*contract[1], *batch[1], *skip}),
    ):
        for k, axis in enumerate(axes):
            if k not in used:
                record.move(operand, k, 0, len(out))
                out.append(axis)
    return out


@rule("ragged_dot_general")
def _ragged_dot(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    numbers = record.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    ragged, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if not groups or {*ragged} & {*contract[0], *batch[0]}:
        return opaque(tracer, record, shapes, "ragged_dot over a ragged contraction or batch")
    out = _dot(tracer, record, contract, batch, skip=groups)
    why = "ragged_dot: which rows meet which group is data"
    for k in ragged:
        pin_operand(tracer, record, 0, k, why)
    for k in groups:
        pin_operand(tracer, record, 1, k, why)
    for k in range(len(record.operands[2].axes)):
        pin_operand(tracer, record, 2, k, why)
    return [out]


@rule("conv_general_dilated")
def _conv(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    numbers, groups = record.params["dimension_numbers"], record.params["feature_group_count"]
    if record.params["batch_group_count"] != 1:
        return opaque(tracer, record, shapes, "convolution with batch groups")
    left, right = record.operands[0].axes, record.operands[1].axes
    batch, features, *space = numbers.lhs_spec
    out_features, in_features, *window = numbers.rhs_spec
    result_batch, result_features, *result_space = numbers.out_spec
    out: dict[int, Axis] = {result_batch: left[batch], result_features: right[out_features]}
    record.move(0, batch, 0, result_batch)
    record.move(1, out_features, 0, result_features)
    if groups > 1:
        # features are (group, input of the group) on the left, (group, output of it) on the right
        group = fresh(groups)
        inputs, outputs = axis_size(right[in_features]), shapes[0][result_features] // groups
        tracer.unify(left[features], (*group, *right[in_features]), record, "group inputs")
        tracer.unify(right[out_features], (*group, *fresh(outputs)), record, "group outputs")
        how = {"block": inputs, "result_block": outputs}
        record.move(0, features, 0, result_features, **how)
    else:
        tracer.unify(left[features], right[in_features], record, "input features")
    if axis_size(right[in_features]) > 1 or groups == 1:
        record.contracted.append(Pair(0, features, 1, in_features))
    for a, b, o in zip(space, window, result_space):
        pin_operand(tracer, record, 0, a, "convolution window")
        pin_operand(tracer, record, 1, b, "convolution window")
        out[o] = pinned_result(tracer, record, (0, o), shapes[0][o], "convolution window")
    return [[out[k] for k in range(len(out))]]


@rule("reduce_window_max", "reduce_window_min", "reduce_window_sum")
def _reduce_window(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    params, (shape,) = record.params, shapes
    ones = (1,) * len(shape)
    settings = zip(
        params["window_dimensions"],
        params.get("window_strides") or ones,
        params.get("base_dilation") or ones,
        params.get("padding") or ((0, 0),) * len(shape),
    )
    out: list[Axis] = []
    for k, (window, stride, dilation, padding) in enumerate(settings):
        if (window, stride, dilation) == (1, 1, 1) and tuple(padding) == (0, 0):
            record.move(0, k, 0, k)
            out.append(record.operands[0].axes[k])
        else:
            why = f"{record.primitive} window"
            pin_operand(tracer, record, 0, k, why)
            out.append(pinned_result(tracer, record, (0, k), shape[k], why))
    return [out]
