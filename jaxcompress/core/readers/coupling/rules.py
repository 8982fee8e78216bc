"""What each primitive does to axes: one rule per primitive, in `RULES`.

A rule takes the tracer, the record under construction (primitive, operands and params are set)
and the shapes of the results. It returns the axes of every result and notes in the record how
operand axes move to results, which are contracted or reduced, and which are pinned. A primitive
without a rule pins every axis it meets, with its line.

Here are elementwise operations, reductions and shapes; products and indexing have their own files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from .atoms import Axis, Mismatch, axis_size, concatenated, cut_axis, fresh, split_axis, take_range
from .program import Record
from .semantics import names

if TYPE_CHECKING:
    from .trace import Tracer

Shapes = Sequence[tuple[int, ...]]
Rule = Callable[["Tracer", Record, Shapes], list[list[Axis]]]
RULES: dict[str, Rule] = {}

ELEMENTWISE = names(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil
    clamp clz complex conj convert_element_type copy copy_p cos cosh device_put digamma div eq
    eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow
    is_finite le le_to lgamma log log1p logistic lt lt_to max min mul mulhi name ne neg nextafter
    not optimization_barrier or polygamma population_count pow pvary real reduce_precision
    regularized_incomplete_beta rem round rsqrt select_n sharding_constraint shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh
    xor zeta"""
)
# Reductions that leave out whole axes.
REDUCTIONS = names(
    """argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
    reduce_xor"""
)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of the primitives named."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def opaque(tracer: Tracer, record: Record, shapes: Shapes, why: str) -> list[list[Axis]]:
    """Pin every axis of every operand and result."""
    for i, operand in enumerate(record.operands):
        for k, axis in enumerate(operand.axes):
            tracer.pin(axis, f"{why} (axis {k} of operand {i})", record.source)
            record.pinned_operands.add((i, k))
    out = [[fresh(n) for n in shape] for shape in shapes]
    for i, axes in enumerate(out):
        for k, axis in enumerate(axes):
            tracer.pin(axis, f"{why} (axis {k} of result {i})", record.source)
            record.pinned_results.add((i, k))
    return out


def pin_operand(tracer: Tracer, record: Record, operand: int, axis: int, why: str) -> None:
    """Pin one axis of one operand."""
    tracer.pin(record.operands[operand].axes[axis], why, record.source)
    record.pinned_operands.add((operand, axis))


def pinned_result(tracer: Tracer, record: Record, at: tuple[int, int], size: int, why: str) -> Axis:
    """A new axis of a result that can be neither cut nor transformed."""
    axis = fresh(size)
    tracer.pin(axis, why, record.source)
    record.pinned_results.add(at)
    return axis


@rule(*ELEMENTWISE)
def _elementwise(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    if record.primitive in ("optimization_barrier", "device_put"):
        for i, operand in enumerate(record.operands):
            for k in range(len(operand.axes)):
                record.move(i, k, i, k)
        return [list(operand.axes) for operand in record.operands]
    record.elementwise = True
    (shape,) = shapes
    out: list[Axis | None] = [None] * len(shape)
    for i, operand in enumerate(record.operands):
        if len(operand.axes) != len(shape):
            continue  # a scalar
        for k, axis in enumerate(operand.axes):
            if shape[k] == 1 or axis_size(axis) != shape[k]:
                continue  # broadcast
            record.move(i, k, 0, k)
            known = out[k]
            if known is None:
                out[k] = axis
            else:
                tracer.unify(known, axis, record)
    return [[fresh(n) if axis is None else axis for axis, n in zip(out, shape)]]


@rule("bitcast_convert_type")
def _bitcast(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    if record.operands[0].shape != shapes[0]:
        return opaque(tracer, record, shapes, "bitcast_convert_type changes the shape")
    return _elementwise(tracer, record, shapes)


def _kept(record: Record, kept: Iterable[int], operand: int = 0, result: int = 0) -> list[Axis]:
    """Result axes that are operand axes `kept`, in that order."""
    out = []
    for o, k in enumerate(kept):
        record.move(operand, k, result, o)
        out.append(record.operands[operand].axes[k])
    return out


@rule("transpose")
def _transpose(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    return [_kept(record, record.params["permutation"])]


@rule("squeeze")
def _squeeze(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    rank = len(record.operands[0].axes)
    gone = {d % rank for d in record.params["dimensions"]}
    return [_kept(record, [k for k in range(rank) if k not in gone])]


@rule(*REDUCTIONS)
def _reduce(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    axes = set(record.params["axes"])
    for k in axes:
        record.reduced.add((0, k))
        if record.primitive in ("argmax", "argmin"):
            pin_operand(tracer, record, 0, k, f"{record.primitive} returns positions")
    return [_kept(record, [k for k in range(len(record.operands[0].axes)) if k not in axes])]


@rule("psum", "pmax", "pmin")
def _reduce_mapped(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    """Under vmap a collective is a reduction over array axes; named mesh axes are not entered."""
    axes = record.params["axes"]
    if record.params.get("axis_index_groups") or not all(isinstance(a, int) for a in axes):
        return opaque(tracer, record, shapes, f"{record.primitive} over a mesh axis")
    out = []
    for i, operand in enumerate(record.operands):
        record.reduced.update((i, k) for k in axes)
        kept = [k for k in range(len(operand.axes)) if k not in axes]
        out.append(_kept(record, kept, operand=i, result=i))
    return out


@rule("broadcast_in_dim")
def _broadcast(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    (shape,) = shapes
    operand = record.operands[0]
    out: list[Axis | None] = [None] * len(shape)
    for k, o in enumerate(record.params["broadcast_dimensions"]):
        if axis_size(operand.axes[k]) == shape[o]:
            out[o] = operand.axes[k]
            record.move(0, k, 0, int(o))
    record.uniform = {(0, o) for o, axis in enumerate(out) if axis is None}
    return [[fresh(n) if axis is None else axis for axis, n in zip(out, shape)]]


@rule("reshape")
def _reshape(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    operand = record.operands[0]
    rest: Axis = tuple(atom for axis in operand.axes for atom in axis)
    out: list[Axis] = []
    try:
        for size in reversed(shapes[0]):
            rest, axis = split_axis(rest, size)
            out.insert(0, axis)
    except Mismatch as mismatch:
        text = f"reshape {operand.shape} -> {shapes[0]}: {mismatch}"
        return opaque(tracer, record, shapes, text)
    record.reshapes = True
    return [out]


def _along(
    tracer: Tracer, record: Record, shapes: Shapes, dims: set[int], why: str
) -> list[list[Axis]]:
    """An operation whose value depends on the order along `dims`; the other axes pass."""
    operand = record.operands[0]
    for i in range(len(record.operands)):
        for k in dims & set(range(len(record.operands[i].axes))):
            pin_operand(tracer, record, i, k, why)
    out = []
    for o, shape in enumerate(shapes):
        axes = []
        for k, size in enumerate(shape):
            if k in dims:
                axes.append(pinned_result(tracer, record, (o, k), size, why))
            else:
                axes.append(operand.axes[k])
                record.move(0, k, o, k)
        out.append(axes)
    return out


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    why = f"{record.primitive} depends on the order"
    return _along(tracer, record, shapes, {record.params["axis"]}, why)


@rule("rev")
def _rev(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    return _along(tracer, record, shapes, set(record.params["dimensions"]), "rev reorders")


@rule("fft")
def _fft(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    rank = len(shapes[0])
    dims = set(range(rank - len(record.params["fft_lengths"]), rank))
    return _along(tracer, record, shapes, dims, "fft mixes positions")


@rule("top_k", "approx_top_k")
def _top_k(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    rank = len(record.operands[0].axes)
    axis = record.params.get("axis", record.params.get("reduction_dimension", -1)) % rank
    return _along(tracer, record, shapes, {axis}, f"{record.primitive} selects by value")


@rule("sort")
def _sort(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    dimension = record.params["dimension"]
    out = _along(tracer, record, shapes, {dimension}, "sort reorders")
    first = record.operands[0]
    for i, operand in enumerate(record.operands[1:], 1):
        for k, axis in enumerate(operand.axes):
            if k != dimension:
                tracer.unify(first.axes[k], axis, record)
                record.move(i, k, i, k)
    return out


@rule("iota")
def _iota(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    out = [fresh(n) for n in shapes[0]]
    dimension = record.params["dimension"]
    record.positional = (out[dimension],)
    record.uniform = {(0, k) for k in range(len(out)) if k != dimension}
    return [out]


@rule("random_bits")
def _random_bits(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    out = [fresh(n) for n in shapes[0]]
    record.positional = tuple(out)
    return [out]


@rule("concatenate")
def _concatenate(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    dimension = record.params["dimension"]
    first = record.operands[0]
    start = 0
    for i, operand in enumerate(record.operands):
        for k, axis in enumerate(operand.axes):
            if k != dimension:
                tracer.unify(first.axes[k], axis, record)
            record.move(i, k, 0, k, shift=start if k == dimension else 0)
        start += axis_size(operand.axes[dimension])
    out = list(first.axes)
    out[dimension] = concatenated([operand.axes[dimension] for operand in record.operands])
    return [out]


@rule("stack")
def _stack(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    new = record.params["axis"] % len(shapes[0])
    first = record.operands[0]
    for i, operand in enumerate(record.operands):
        for k, axis in enumerate(operand.axes):
            tracer.unify(first.axes[k], axis, record)
            record.move(i, k, 0, k + (k >= new))
    out = list(first.axes)
    size = len(record.operands)
    out.insert(new, pinned_result(tracer, record, (0, new), size, "a stack of separate values"))
    return [out]


@rule("unstack")
def _unstack(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    operand = record.operands[0]
    gone = record.params["axis"] % len(operand.axes)
    pin_operand(tracer, record, 0, gone, "unstack takes each index apart")
    kept = [k for k in range(len(operand.axes)) if k != gone]
    return [_kept(record, kept, result=i) for i in range(len(shapes))]


@rule("tile")
def _tile(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    out = []
    for k, (axis, copies) in enumerate(zip(record.operands[0].axes, record.params["reps"])):
        out.append((*fresh(copies), *axis))
        for copy in range(copies):
            record.move(0, k, 0, k, shift=copy * axis_size(axis))
    return [out]


def _pick(
    tracer: Tracer, record: Record, at: tuple[int, int], start: int, stop: int, stride: int
) -> Axis | None:
    """Axis of `operand[..., start:stop:stride]`, result and axis `at`; None where it mixes."""
    result, k = at
    axis = record.operands[0].axes[k]
    size = axis_size(axis)
    line = f"slice {start}:{stop}:{stride} @ {record.source}"
    try:
        if stride == 1:
            record.move(0, k, result, k, start=start, stop=stop)
            whole = (start, stop) == (0, size)
            return axis if whole else take_range(axis, start, stop, line)
        if size % stride or start >= stride or (stop - start - 1) // stride + 1 != size // stride:
            raise Mismatch("strided slice of a part")
        # one index of every block: x[..., start::stride]
        major, minor = split_axis(axis, stride)
        cut_axis(minor, start, line)
        cut_axis(minor, start + 1, line)
        record.move(0, k, result, k, block=stride)
        return major
    except Mismatch as mismatch:
        pin_operand(tracer, record, 0, k, f"slice {start}:{stop}:{stride}: {mismatch}")
        return None


@rule("slice")
def _slice(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    params = record.params
    strides = params["strides"] or (1,) * len(shapes[0])
    out = []
    for k, picked in enumerate(zip(params["start_indices"], params["limit_indices"], strides)):
        axis = _pick(tracer, record, (0, k), *picked)
        if axis is None:
            axis = pinned_result(tracer, record, (0, k), shapes[0][k], "slice")
        out.append(axis)
    return [out]


@rule("split")
def _split(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    dimension = record.params["axis"]
    out, start = [], 0
    for i, size in enumerate(map(int, record.params["sizes"])):
        axes = list(record.operands[0].axes)
        part = _pick(tracer, record, (i, dimension), start, start + size, 1)
        if part is None:
            part = pinned_result(tracer, record, (i, dimension), size, "split")
        axes[dimension] = part
        for k in range(len(axes)):
            if k != dimension:
                record.move(0, k, i, k)
        out.append(axes)
        start += size
    return out


@rule("pad")
def _pad(tracer: Tracer, record: Record, shapes: Shapes) -> list[list[Axis]]:
    out = []
    for k, (low, high, interior) in enumerate(record.params["padding_config"]):
        axis = record.operands[0].axes[k]
        if interior or low < 0 or high < 0:
            why = "interior or negative padding"
            pin_operand(tracer, record, 0, k, why)
            out.append(pinned_result(tracer, record, (0, k), shapes[0][k], why))
            continue
        record.move(0, k, 0, k, shift=low)
        parts = [fresh(low)] * bool(low) + [axis] + [fresh(high)] * bool(high)
        out.append(concatenated(parts))
    return [out]
