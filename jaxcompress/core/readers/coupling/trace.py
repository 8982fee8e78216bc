"""Pass 1: read a function's jaxpr into a `Program`, unifying axes as each equation asks.

It does not follow the order of execution: a scan needs no fixed point, because its carry-in has
the axes of the initial value and its carry-out is unified with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers import unofficial

from . import rules_indexing, rules_products  # noqa: F401  (they register their rules)
from .atoms import Axis, Mismatch, fresh, unify
from .program import (
    CONSTANT,
    INPUT,
    LITERAL,
    PARAMETER,
    Frame,
    Pin,
    Program,
    Record,
    Scan,
    Value,
)
from .rules import RULES, opaque

# Primitives that only call a jaxpr, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
    "composite": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}

_LIBRARIES = (os.path.join(os.path.dirname(jax.__file__), ""), "/flax/", "/einops/")


def source_line(equation: jex.JaxprEqn) -> str:
    """`file.py:line` of the innermost frame outside JAX and Flax, `?` where there is none."""
    frames = getattr(equation.source_info.traceback, "frames", ())
    for frame in frames:
        name = frame.file_name
        if not name.startswith("<") and not any(part in name for part in _LIBRARIES):
            return f"{os.path.basename(name)}:{frame.line_num}"
    return "?"


def body_of(closed_or_open: Any) -> tuple[jex.Jaxpr, Sequence[Any]]:
    """(jaxpr, constants) of a parameter that holds either kind."""
    if hasattr(closed_or_open, "consts"):
        return closed_or_open.jaxpr, closed_or_open.consts
    return closed_or_open, ()


def is_array(leaf: Any) -> bool:
    """True for what is traced: arrays, their shapes, and compressed arrays."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def partition(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The array leaves of `tree`, and a function that puts others in their place."""
    flat, treedef = jax.tree.flatten(tree, is_leaf=is_compressed)
    where = [i for i, leaf in enumerate(flat) if is_array(leaf)]

    def rebuild(arrays: Sequence[Any]) -> Any:
        new = list(flat)
        for i, array in zip(where, arrays, strict=True):
            new[i] = array
        return jax.tree.unflatten(treedef, new)

    return [flat[i] for i in where], rebuild


def shape_struct(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array leaf; of a compressed one, those of its dense form."""
    weak = getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=bool(weak))


def shapes_of(tree: Any) -> Any:
    """`tree` with `jax.ShapeDtypeStruct` for arrays; other leaves stay."""
    arrays, rebuild = partition(tree)
    return rebuild([shape_struct(array) for array in arrays])


def read_program(fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> Program:
    """Trace `fn(params, *inputs)` on shapes alone and read its axes.

    Args:
        fn: a pure function of a parameter pytree and further arguments.
        params: pytree of arrays, shapes or compressed arrays. Other leaves are static.
        inputs: the further arguments, likewise; their axes cannot be cut.
    """
    arrays, rebuild_params = partition(params)
    input_arrays, rebuild_inputs = partition(inputs)
    rebuild_outputs: list[Callable[[Sequence[Any]], Any]] = []

    def flat_fn(*flat: Any) -> list[Any]:
        new_params = rebuild_params(flat[: len(arrays)])
        out = fn(new_params, *rebuild_inputs(flat[len(arrays) :]))
        flat_out, rebuild = partition(out)
        rebuild_outputs[:] = [rebuild]
        return flat_out

    closed = jax.make_jaxpr(flat_fn)(*map(shape_struct, [*arrays, *input_arrays]))
    # A slice that nothing reads, such as of `make_causal_mask(x[..., 0])`, is to tie no axis.
    program = Program(unofficial.without_dead_equations(closed), rebuild_outputs[0])
    names = [path for path, leaf in leaves_with_paths(params) if is_array(leaf)]
    Tracer(program).trace(names)
    return program


class Tracer:
    """Walks a jaxpr and fills a `Program`."""

    def __init__(self, program: Program):
        self.program = program
        self.sites: list[str] = []
        self.scans: list[int] = []

    def trace(self, parameter_names: list[str]) -> None:
        program = self.program
        jaxpr = program.closed.jaxpr
        for number, variable in enumerate(jaxpr.invars):
            parameter = number < len(parameter_names)
            at = number - len(parameter_names)
            value = Value([fresh(n) for n in variable.aval.shape])
            value.kind = PARAMETER if parameter else INPUT
            value.name = parameter_names[number] if parameter else f"input[{at}]"
            (program.parameters if parameter else program.inputs).append(value)
            if not parameter:
                for k, axis in enumerate(value.axes):
                    self.pin(axis, f"axis {k} of {value.name}", "argument")
        constants = self.constants(jaxpr, program.closed.consts)
        arguments = [*program.parameters, *program.inputs]
        program.outputs = self.run(jaxpr, constants, arguments, program.root)
        for number, value in enumerate(program.outputs):
            for k, axis in enumerate(value.axes):
                self.pin(axis, f"axis {k} of output[{number}]", "result")

    # ------------------------------------------------------------------ what rules call

    def pin(self, axis: Axis, reason: str, source: str) -> None:
        """Record that an axis cannot be cut, and why."""
        self.program.pins.append(Pin(axis, reason, source))

    def unify(self, one: Axis, other: Axis, record: Record, what: str = "") -> None:
        """Declare two axes equal; where that fails both are pinned."""
        try:
            unify(one, other)
        except Mismatch as mismatch:
            for axis in (one, other):
                self.pin(axis, f"{what or record.primitive}: {mismatch}", record.source)

    # ------------------------------------------------------------------ the walk

    def constants(self, jaxpr: jex.Jaxpr, consts: Sequence[Any]) -> list[Value]:
        values = []
        for variable, _ in zip(jaxpr.constvars, consts, strict=True):
            axes = [fresh(n) for n in getattr(variable.aval, "shape", ())]
            values.append(Value(axes, CONSTANT, "constant"))
        self.program.constants += values
        return values

    def literal(self, literal: jex.Literal) -> Value:
        number = np.asarray(literal.val)
        if number.ndim == 0 and number.dtype.kind in "biuf":
            return Value([], LITERAL, number=float(number))
        value = Value([fresh(n) for n in number.shape], CONSTANT, "constant")
        self.program.constants.append(value)
        return value

    def run(
        self, jaxpr: jex.Jaxpr, constants: list[Value], arguments: list[Value], frame: Frame
    ) -> list[Value]:
        known = frame.values
        known.update(zip(jaxpr.constvars, constants, strict=True))
        known.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Value:
            return self.literal(atom) if isinstance(atom, jex.Literal) else known[atom]

        for number, equation in enumerate(jaxpr.eqns):
            operands = [read(atom) for atom in equation.invars]
            results = self.equation(equation, operands, frame, number)
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def source(self, equation: jex.JaxprEqn) -> str:
        # jit caches traces, so an inner line may be its first caller's: the site says which call.
        line = source_line(equation)
        if not self.sites or self.sites[-1] == line:
            return line
        return self.sites[-1] if line == "?" else f"{self.sites[-1]} > {line}"

    def equation(
        self, equation: jex.JaxprEqn, operands: list[Value], frame: Frame, number: int
    ) -> list[Value]:
        name, source = equation.primitive.name, self.source(equation)
        if name in CALLS:
            return self.call(equation, CALLS[name], operands, frame, number, source)
        if name == "scan":
            return self.scan(equation, operands, frame, number, source)
        if name == "while":
            return self.while_loop(equation, operands, frame, number, source)
        if name == "cond":
            return self.cond(equation, operands, frame, number, source)
        record = Record(name, source, operands, [], equation.params, scans=tuple(self.scans))
        shapes = [tuple(getattr(v.aval, "shape", ())) for v in equation.outvars]
        rule = RULES.get(name)
        if rule is None:
            axes = opaque(self, record, shapes, f"{name} is not understood")
        else:
            axes = rule(self, record, shapes)
        record.results = [Value(list(result)) for result in axes]
        self.program.records.append(record)
        return record.results

    def join(self, name: str, source: str, *operands: Value, like: Value) -> Value:
        """A value that is one of the operands (a carry, the result of a branch)."""
        record = Record(name, source, list(operands), [], scans=tuple(self.scans))
        record.elementwise = True
        for number, operand in enumerate(operands):
            for k, axis in enumerate(operand.axes):
                self.unify(like.axes[k], axis, record, name.replace("_", " "))
                record.move(number, k, 0, k)
        record.results = [Value(list(like.axes))]
        self.program.records.append(record)
        return record.results[0]

    def inner_source(self, source: str, body: Callable[[], list[Value]]) -> list[Value]:
        self.sites.append(source)
        out = body()
        self.sites.pop()
        return out

    def call(
        self,
        equation: jex.JaxprEqn,
        key: str,
        operands: list[Value],
        frame: Frame,
        number: int,
        source: str,
    ) -> list[Value]:
        jaxpr, consts = body_of(equation.params[key])
        child = Frame()
        frame.children[number] = [child]
        values = self.constants(jaxpr, consts)
        return self.inner_source(source, lambda: self.run(jaxpr, values, operands, child))

    def branch(self, body: Any, operands: list[Value], frame: Frame, number: int) -> list[Value]:
        jaxpr, consts = body_of(body)
        child = Frame()
        frame.children.setdefault(number, []).append(child)
        return self.run(jaxpr, self.constants(jaxpr, consts), operands, child)

    def cond(
        self, equation: jex.JaxprEqn, operands: list[Value], frame: Frame, number: int, source: str
    ) -> list[Value]:
        branches = [
            self.branch(body, operands[1:], frame, number) for body in equation.params["branches"]
        ]
        return [self.join("branches", source, *values, like=values[0]) for values in zip(*branches)]

    def while_loop(
        self, equation: jex.JaxprEqn, operands: list[Value], frame: Frame, number: int, source: str
    ) -> list[Value]:
        params = equation.params
        split = params["cond_nconsts"]
        start = split + params["body_nconsts"]
        carry = [self.join("carry_in", source, x, like=x) for x in operands[start:]]
        self.branch(params["cond_jaxpr"], [*operands[:split], *carry], frame, number)
        body = [*operands[split:start], *carry]
        outs = self.branch(params["body_jaxpr"], body, frame, number)
        return [self.join("carry_out", source, c, o, like=c) for c, o in zip(carry, outs)]

    def scan(
        self, equation: jex.JaxprEqn, operands: list[Value], frame: Frame, number: int, source: str
    ) -> list[Value]:
        params = equation.params
        n_consts, n_carry = unofficial.scan_counts(params)
        consts, init = operands[:n_consts], operands[n_consts : n_consts + n_carry]
        stacked = operands[n_consts + n_carry :]
        scan = Scan(source, params["length"], stacked)
        self.program.scans.append(scan)
        self.scans.append(len(self.program.scans) - 1)
        step = fresh(scan.length)
        carry = [self.join("carry_in", source, x, like=x) for x in init]
        slices = [self.scan_slice(x, step, source) for x in stacked]
        outs = self.branch(params["jaxpr"], [*consts, *carry, *slices], frame, number)
        finals = [self.join("carry_out", source, c, o, like=c) for c, o in zip(carry, outs)]
        results = [self.scan_stack(x, step, source) for x in outs[n_carry:]]
        self.scans.pop()
        scan.boundary = [*consts, *carry, *finals, *results]
        return [*finals, *results]

    def scan_slice(self, stacked: Value, step: Axis, source: str) -> Value:
        record = Record("scan_slice", source, [stacked], [], scans=tuple(self.scans))
        self.unify(stacked.axes[0], step, record, "scan length")
        self.pin(stacked.axes[0], "the axis a scan runs over", source)
        record.pinned_operands.add((0, 0))
        for k in range(1, len(stacked.axes)):
            record.move(0, k, 0, k - 1)
        record.results = [Value(stacked.axes[1:])]
        self.program.records.append(record)
        return record.results[0]

    def scan_stack(self, value: Value, step: Axis, source: str) -> Value:
        record = Record("scan_stack", source, [value], [], scans=tuple(self.scans))
        for k in range(len(value.axes)):
            record.move(0, k, 0, k + 1)
        record.results = [Value([step, *value.axes])]
        self.program.records.append(record)
        return record.results[0]
