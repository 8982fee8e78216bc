"""Evaluate a function's own jaxpr with some indices of its axes removed.

This is right for any function. Sizes written into the jaxpr (of a reshape, a broadcast, a slice)
are computed anew from the atoms; what depends on positions (an iota, a constant, random bits) is
made at full size and then taken from. Tracing the function again on smaller parameters would be
silently wrong for all of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from jaxcompress.core.readers import unofficial

from .atoms import Atom, Axis, axis_size, labels
from .custom_gradient import with_own_gradient
from .flow import Fixed
from .program import Frame, Program, Value
from .trace import CALLS, body_of

REMAT = frozenset({"remat", "remat2", "checkpoint"})


class Evaluator:
    """Runs a program with `kept` indices of some leaves, all others whole.

    Args:
        program: the function as traced at full size.
        kept: leaf -> sorted kept indices `[k]`.
        means: "keep" leaves the divisor of a mean over a cut axis at the full count (what a
            masked network computes); "kept" divides by the number of indices kept.
    """

    def __init__(self, program: Program, kept: Mapping[Atom, np.ndarray], means: str = "keep"):
        self.program, self.kept, self.means = program, kept, means
        self._numbers = Fixed(program)
        self._indices: dict[Axis, np.ndarray | None] = {}
        self._counts: dict[Value, tuple[int, int]] = {}  # sums over cut axes: (full, kept) terms

    def __call__(self, arrays: Sequence[Any]) -> list[Any]:
        """Results for sliced parameters and inputs, flat, in the order of the traced arguments."""
        self._counts.clear()
        closed, root = self.program.closed, self.program.root
        consts = self._constants(closed.jaxpr, closed.consts, root)
        return self._run(closed.jaxpr, consts, list(arrays), root)

    # ------------------------------------------------------------------ axes

    def indices(self, axis: Axis) -> np.ndarray | None:
        """Kept positions of an axis, None if all are."""
        if axis not in self._indices:
            found = None
            if any(atom in self.kept for atom in self.program.places(axis)):
                mask = np.ones(axis_size(axis), bool)
                for atom, _, index in labels(axis):
                    if atom in self.kept:
                        mask &= (index < 0) | np.isin(index, self.kept[atom])
                found = np.flatnonzero(mask)
            self._indices[axis] = found
        return self._indices[axis]

    def size(self, axis: Axis) -> int:
        """Number of kept positions of an axis."""
        found = self.indices(axis)
        return axis_size(axis) if found is None else len(found)

    def shape(self, value: Value) -> tuple[int, ...]:
        """Shape of an array after the cut."""
        return tuple(self.size(axis) for axis in value.axes)

    def take(self, array: Any, value: Value) -> Any:
        """The kept part of a full-size array."""
        for k, axis in enumerate(value.axes):
            found = self.indices(axis)
            if found is not None:
                array = jnp.take(array, found, axis=k)
        return array

    # ------------------------------------------------------------------ the walk

    def _constants(self, jaxpr: jex.Jaxpr, consts: Sequence[Any], frame: Frame) -> list[Any]:
        return [self.take(c, frame.values[v]) for v, c in zip(jaxpr.constvars, consts)]

    def _run(
        self, jaxpr: jex.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], frame: Frame
    ) -> list[Any]:
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts))
        known.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else known[atom]

        for number, equation in enumerate(jaxpr.eqns):
            operands = [read(atom) for atom in equation.invars]
            children = frame.children.get(number)
            if children is not None:
                results = self._nested(equation, operands, children)
            else:
                values = [
                    None if isinstance(atom, jex.Literal) else frame.values[atom]
                    for atom in equation.invars
                ]
                outs = [frame.values[v] for v in equation.outvars]
                results = self._equation(equation, operands, values, outs)
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _body(self, body: Any, frame: Frame) -> Callable[..., list[Any]]:
        jaxpr, consts = body_of(body)
        return lambda *args: self._run(jaxpr, self._constants(jaxpr, consts, frame), args, frame)

    def _nested(
        self, equation: jex.JaxprEqn, operands: list[Any], frames: list[Frame]
    ) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            return self._call(equation, operands, frames[0])
        if name == "scan":
            return self._scan(params, operands, frames[0])
        if name == "cond":
            bodies = [self._body(b, f) for b, f in zip(params["branches"], frames)]
            return list(lax.switch(operands[0], bodies, *operands[1:]))
        split = params["cond_nconsts"]
        start = split + params["body_nconsts"]
        condition = self._body(params["cond_jaxpr"], frames[0])
        body = self._body(params["body_jaxpr"], frames[1])
        return lax.while_loop(
            lambda carry: condition(*operands[:split], *carry)[0],
            lambda carry: body(*operands[split:start], *carry),
            operands[start:],
        )

    def _call(self, equation: jex.JaxprEqn, operands: list[Any], frame: Frame) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        # A custom_jvp is differentiated through its body: its own rule is for full shapes.
        body = self._body(params[CALLS[name]], frame)
        if name in REMAT:
            keep = {"policy": params["policy"], "prevent_cse": params["prevent_cse"]}
            return jax.checkpoint(body, **keep)(*operands)
        if name == "custom_vjp_call":
            same = all(self.shape(value) == value.shape for value in frame.values.values())
            if same:
                return bind(equation, operands)
            return with_own_gradient(equation, body)(*operands)
        return body(*operands)

    def _scan(self, params: Mapping[str, Any], operands: list[Any], frame: Frame) -> list[Any]:
        n_consts, n_carry = unofficial.scan_counts(params)
        consts, init = operands[:n_consts], operands[n_consts : n_consts + n_carry]
        body = self._body(params["jaxpr"], frame)

        def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            out = body(*consts, *carry, *slices)
            return out[:n_carry], out[n_carry:]

        keep = {key: params[key] for key in ("length", "reverse", "unroll")}
        final, stacked = lax.scan(step, init, operands[n_consts + n_carry :], **keep)
        return [*final, *stacked]

    # ------------------------------------------------------------------ one equation

    def _equation(
        self,
        equation: jex.JaxprEqn,
        operands: list[Any],
        values: list[Value | None],
        outs: list[Value],
    ) -> list[Any]:
        cut = any(self.shape(v) != v.shape for v in (*outs, *(v for v in values if v)))
        resize = _RESIZED.get(equation.primitive.name) if cut else None
        if resize is not None:
            results = resize(self, equation, operands, values, outs)
        elif cut and equation.primitive.name in _POSITIONAL:
            results = [self.take(r, v) for r, v in zip(bind(equation, operands), outs)]
        else:
            results = bind(equation, operands)
        if self.means == "kept":
            results = self._remean(equation, operands, values, outs, results)
        return results

    def _remean(
        self,
        equation: jex.JaxprEqn,
        operands: list[Any],
        values: list[Value | None],
        outs: list[Value],
        results: list[Any],
    ) -> list[Any]:
        """Correct the divisor where a sum over a cut axis is divided by the number of its terms."""
        name, first = equation.primitive.name, values[0] if values else None
        if first is None:
            return results
        if name == "reduce_sum":
            axes = [first.axes[k] for k in equation.params["axes"]]
            full = math.prod(map(axis_size, axes))
            kept = math.prod(map(self.size, axes))
            if full != kept:
                self._counts[outs[0]] = (full, kept)
        elif first in self._counts:
            full, kept = self._counts[first]
            if name in ("broadcast_in_dim", "reshape", "convert_element_type"):
                self._counts[outs[0]] = (full, kept)
            elif name in ("div", "mul"):
                number = self._number(equation.invars[1], values[1])
                count = number if name == "div" else 1 / number if number else None
                if count is not None and math.isclose(count, full, rel_tol=1e-6):
                    return [operands[0] / kept]
        return results

    def _number(self, atom: Any, value: Value | None) -> float | None:
        if isinstance(atom, jex.Literal):
            return float(atom.val) if np.ndim(atom.val) == 0 else None
        return self._numbers.number(value) if value is not None else None


def bind(equation: jex.JaxprEqn, operands: Sequence[Any], **changed: Any) -> list[Any]:
    """Apply an equation's primitive to other operands, in the context it was traced in."""
    if changed:
        equation = equation.replace(params={**equation.params, **changed})
    with unofficial.context_of(equation):
        return unofficial.bind_as_traced(equation, operands)


# ---------------------------------------------------------------------------- sizes in params

_Resize = Callable[[Evaluator, jex.JaxprEqn, list[Any], list[Value | None], list[Value]], list[Any]]
# Values that depend on the position: made at full size, then taken from.
_POSITIONAL = frozenset({"iota", "random_bits"})


def _reshape(ev: Evaluator, eqn: jex.JaxprEqn, xs: Any, values: Any, outs: Any) -> list[Any]:
    return [jnp.reshape(xs[0], ev.shape(outs[0]))]


def _broadcast(ev: Evaluator, eqn: jex.JaxprEqn, xs: Any, values: Any, outs: Any) -> list[Any]:
    return [lax.broadcast_in_dim(xs[0], ev.shape(outs[0]), eqn.params["broadcast_dimensions"])]


def _tile(ev: Evaluator, eqn: jex.JaxprEqn, xs: Any, values: Any, outs: Any) -> list[Any]:
    copies = [n // m for n, m in zip(ev.shape(outs[0]), jnp.shape(xs[0]))]
    return [jnp.tile(xs[0], copies)]


def _slice(ev: Evaluator, eqn: jex.JaxprEqn, xs: Any, values: Any, outs: Any) -> list[Any]:
    x = xs[0]
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    ranges = zip(starts, stops, eqn.params["strides"] or (1,) * x.ndim)
    for k, (start, stop, stride) in enumerate(ranges):
        axis = values[0].axes[k]
        kept = ev.indices(axis)
        if kept is None:
            x = lax.slice_in_dim(x, start, stop, stride, axis=k)
        else:
            inside = (kept >= start) & (kept < stop) & ((kept - start) % stride == 0)
            x = jnp.take(x, np.flatnonzero(inside), axis=k)
    return [x]


def _split(ev: Evaluator, eqn: jex.JaxprEqn, xs: Any, values: Any, outs: Any) -> list[Any]:
    axis = eqn.params["axis"]
    ends = np.cumsum([ev.size(out.axes[axis]) for out in outs])
    return jnp.split(xs[0], ends[:-1], axis=axis)


def _pad(ev: Evaluator, eqn: jex.JaxprEqn, xs: Any, values: Any, outs: Any) -> list[Any]:
    config = []
    for axis, (low, high, interior) in zip(outs[0].axes, eqn.params["padding_config"]):
        kept = ev.indices(axis)
        if kept is not None:
            end = axis_size(axis) - high
            low, high = int((kept < low).sum()), int((kept >= end).sum())
        config.append((low, high, interior))
    return [lax.pad(xs[0], xs[1], config)]


def _conv(ev: Evaluator, eqn: jex.JaxprEqn, xs: Any, values: Any, outs: Any) -> list[Any]:
    numbers = eqn.params["dimension_numbers"]
    features = xs[0].shape[numbers.lhs_spec[1]] // xs[1].shape[numbers.rhs_spec[1]]
    return bind(eqn, xs, feature_group_count=features)


def _slice_sizes(ev: Evaluator, eqn: jex.JaxprEqn, values: Any) -> tuple[int, ...]:
    sizes = zip(eqn.params["slice_sizes"], values[0].axes)
    return tuple(ev.size(axis) if n == axis_size(axis) else n for n, axis in sizes)


def _gather(ev: Evaluator, eqn: jex.JaxprEqn, xs: Any, values: Any, outs: Any) -> list[Any]:
    return bind(eqn, xs, slice_sizes=_slice_sizes(ev, eqn, values))


def _dynamic_slice(ev: Evaluator, eqn: jex.JaxprEqn, xs: Any, values: Any, outs: Any) -> list[Any]:
    return [lax.dynamic_slice(xs[0], xs[1:], _slice_sizes(ev, eqn, values))]


_RESIZED: dict[str, _Resize] = {
    "broadcast_in_dim": _broadcast,
    "conv_general_dilated": _conv,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "tile": _tile,
}
