"""Look at values inside a function while it runs: a program evaluated whole, with watched values.

`capture` observes what weights multiply, and what the function itself has named. Here any value
of the program that pass 1 has read can be observed, such as the attention probabilities, which no
weight multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import lax
from jax.extend import core as jex

from jaxcompress.core.readers import unofficial

from .evaluate import REMAT, Evaluator
from .program import Frame, Program, Value
from .trace import CALLS


class Watcher(Evaluator):
    """Runs a program at full size and gives functions of chosen values.

    Values inside a scan come stacked along a leading axis of its steps. Those inside a branch or a
    while loop, where it is not known whether or how often they exist, are left out.

    Args:
        program: the function as traced.
        watched: by value, the function of it that is wanted. A value is seen where an equation
            reads it.
    """

    def __init__(self, program: Program, watched: Mapping[Value, Callable[[Any], Any]]):
        super().__init__(program, {})
        self.watched = watched
        self._seen: dict[Value, Any] = {}

    def observe(self, arrays: Sequence[Any]) -> dict[Value, Any]:
        """The functions of the watched values, for flat parameters and inputs."""
        self._seen = {}
        self(arrays)
        return self._seen

    def _equation(
        self,
        equation: jex.JaxprEqn,
        operands: list[Any],
        values: list[Value | None],
        outs: list[Value],
    ) -> list[Any]:
        for operand, value in zip(operands, values, strict=True):
            if value is not None and value in self.watched and value not in self._seen:
                self._seen[value] = self.watched[value](operand)
        return super()._equation(equation, operands, values, outs)

    def _call(self, equation: jex.JaxprEqn, operands: list[Any], frame: Frame) -> list[Any]:
        name = equation.primitive.name
        if name not in REMAT:
            return super()._call(equation, operands, frame)
        # Nothing is differentiated here, and what is seen has to come out.
        return self._body(equation.params[CALLS[name]], frame)(*operands)

    def _nested(
        self, equation: jex.JaxprEqn, operands: list[Any], frames: list[Frame]
    ) -> list[Any]:
        if equation.primitive.name not in ("cond", "while"):
            return super()._nested(equation, operands, frames)
        before = dict(self._seen)
        results = super()._nested(equation, operands, frames)
        self._seen = before
        return results

    def _scan(self, params: Mapping[str, Any], operands: list[Any], frame: Frame) -> list[Any]:
        n_consts, n_carry = unofficial.scan_counts(params)
        consts, init = operands[:n_consts], operands[n_consts : n_consts + n_carry]
        body, outside = self._body(params["jaxpr"], frame), self._seen
        order: list[Value] = []

        def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], tuple[Any, Any]]:
            self._seen = {}
            out = body(*consts, *carry, *slices)
            order[:] = list(self._seen)
            return out[:n_carry], (out[n_carry:], [self._seen[value] for value in order])

        keep = {key: params[key] for key in ("length", "reverse", "unroll")}
        final, (stacked, seen) = lax.scan(step, init, operands[n_consts + n_carry :], **keep)
        self._seen = {**outside, **dict(zip(order, seen, strict=True))}
        return [*final, *stacked]
