"""Pass 2: is masking an index the same as removing it?

With every parameter of the group set to 0 at an index, which arrays are exactly 0 there? A
contraction or a sum over zeros is exact: leaving the terms out changes nothing. A maximum, a
product, or a sum of something that zero does not make zero (the squared distance to the mean) is
not: there the cut network differs from the masked one.
"""

from __future__ import annotations

from typing import NamedTuple

from .flow import Fixed, Flow, Spot, Step
from .program import Record, Value
from .semantics import (
    EXTREMA,
    JOINS,
    LINEAR_THROUGH,
    ORDERED_THROUGH,
    PRODUCTS,
    SUM_REDUCTIONS,
    SUMS,
    ZERO_TO_ZERO,
    pads_other_axes,
)

Key = tuple[Value, Spot]


class Crossing(NamedTuple):
    """One contraction or reduction that sums over a group's axis.

    Attributes:
        primitive: name of the primitive.
        source: call site and line.
        exact: masked indices contribute nothing, so masking equals removing.
    """

    primitive: str
    source: str
    exact: bool


def crossings(flow: Flow, fixed: Fixed) -> list[Crossing]:
    """Every contraction and reduction over the group, in order of execution."""
    steps = flow.steps
    not_zero: set[Key] = set()  # carries that start as zeros but do not stay so
    while True:
        walk = _Walk(flow, fixed, not_zero)
        found = [crossing for step in steps for crossing in walk.step(step)]
        if walk.turned <= not_zero:
            return list(dict.fromkeys(found))
        not_zero |= walk.turned


class _Walk:
    def __init__(self, flow: Flow, fixed: Fixed, not_zero: set[Key]):
        self.fixed, self.not_zero = fixed, not_zero
        self.zero: set[Key] = {(v, spot) for v in flow.parameters for spot in flow.spots(v)}
        self.turned: set[Key] = set()

    def is_zero(self, value: Value, spot: Spot) -> bool:
        return (value, spot) in self.zero or self.fixed.zero(value)

    def step(self, step: Step) -> list[Crossing]:
        if step.record.elementwise:
            self._elementwise(step)
            return []
        return self._through(step)

    def _elementwise(self, step: Step) -> None:
        record = step.record
        for value, spots in zip(record.results, step.results):
            for spot in spots:
                zeros = [self.is_zero(operand, spot) for operand in record.operands]
                key = (value, spot)
                if key not in self.not_zero and self._zero_result(record, zeros):
                    self.zero.add(key)
                if record.primitive == "carry_out" and zeros[0] and not zeros[1]:
                    self.turned.add((record.operands[0], spot))

    def _through(self, step: Step) -> list[Crossing]:
        record, name = step.record, step.record.primitive
        arrived: dict[tuple[int, Spot], list[bool]] = {}
        found = []
        for hop in step.hops:
            value = record.operands[hop.operand]
            zero = self.is_zero(value, hop.spot)
            for target in hop.targets:
                arrived.setdefault(target, []).append(zero)
            if hop.partners:
                partners = (self.is_zero(record.operands[o], s) for o, s in hop.partners)
                exact = zero or any(partners)
                found.append(Crossing(name, record.source, exact))
            elif hop.reduced:
                found.append(Crossing(name, record.source, zero and name in SUM_REDUCTIONS))
        keeps_zero = name in LINEAR_THROUGH or name in ORDERED_THROUGH
        for (result, spot), zeros in arrived.items():
            padded = (
                name == "pad"
                and pads_other_axes(record, {axis for axis, _, _ in spot})
                and not self.fixed.zero(record.operands[1])
            )
            every = any(zeros) if name in PRODUCTS else all(zeros)
            if keeps_zero and every and not padded:
                self.zero.add((record.results[result], spot))
        return found

    def _zero_result(self, record: Record, zeros: list[bool]) -> bool:
        """The result of an elementwise operation is 0, given which operands are."""
        name = record.primitive
        if name == "select_n":
            return all(zeros[1:])
        if name in ("mul", "and"):
            return any(zeros)
        if name in ("div", "rem"):
            return zeros[0] and not zeros[1]
        if name in EXTREMA or name == "clamp":
            return self._bounded(record, zeros)
        if name in SUMS or name in JOINS or name == "or":
            return all(zeros)
        if name == "integer_pow":
            return zeros[0] and record.params["y"] > 0
        return name in ZERO_TO_ZERO and zeros[0]

    def _bounded(self, record: Record, zeros: list[bool]) -> bool:
        """Extrema of 0 and constants, `clamp(low, 0, high)`: 0 if the constants allow it."""
        numbers = [0.0 if z else self.fixed.number(v) for z, v in zip(zeros, record.operands)]
        if record.primitive == "clamp":
            low, _, high = numbers
            if low is None or high is None:
                return False
            return zeros[1] and low <= 0 <= high
        a, b = numbers
        if a is None or b is None or not any(zeros):
            return False
        return (max if record.primitive == "max" else min)(a, b) == 0
