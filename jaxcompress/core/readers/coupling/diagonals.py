"""Pass 2: diagonal symmetries of a group, as the null space of a linear system.

Let every array that holds a group be scaled along it by `d ** w`, entry by entry. Each operation
asks something linear of the exponents w: a sum that its operands agree, a product that they add
up, a contraction that they cancel, a nonlinearity that they are 0. Each (parameter, spot) has one
unknown exponent; the rational solutions are exactly the scalings that leave the function as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction

from .flow import Fixed, Flow, Hop, Spot, Step
from .program import Program, Value
from .semantics import (
    COMPARISONS,
    EXTREMA,
    JOINS,
    LINEAR_THROUGH,
    ORDERED_THROUGH,
    POSITIONS,
    PRODUCTS,
    SUMS,
    pads_other_axes,
    passes,
)

Form = Mapping[int, Fraction]  # unknown -> coefficient
ZERO: Form = {}
POWERS = {
    "square": Fraction(2),
    "sqrt": Fraction(1, 2),
    "rsqrt": Fraction(-1, 2),
    "cbrt": Fraction(1, 3),
    "abs": Fraction(1),
    "sign": Fraction(0),
}
SIGN_BLIND = frozenset({"sqrt", "rsqrt", "abs", "sign", "cbrt"})


@dataclass(frozen=True)
class Solution:
    """One basis vector: exponents of parameters, and what it needs."""

    exponents: dict[tuple[Value, Spot], Fraction]
    positive: str  # the line that needs d > 0, empty if any d will do
    inner_scan: int | None  # the scan inside which it lives: each step may have its own d


def plus(a: Form, b: Form, factor: int = 1) -> Form:
    """a + factor * b"""
    keys = a.keys() | b.keys()
    out = {key: a.get(key, Fraction(0)) + factor * b.get(key, Fraction(0)) for key in keys}
    return {key: value for key, value in out.items() if value}


def times(a: Form, factor: Fraction | int) -> Form:
    """factor * a"""
    return {key: value * factor for key, value in a.items()} if factor else ZERO


class DiagonalSolver:
    """Collects the equations of one group (or of several acted on jointly) and solves them."""

    def __init__(self, program: Program, flow: Flow, fixed: Fixed, unscaled: Collection[str] = ()):
        self.program, self.flow, self.fixed = program, flow, fixed
        self.unknowns: list[tuple[Value, Spot]] = []
        self.exponent: dict[tuple[Value, Spot], Form] = {}
        self.zeros: list[Form] = []  # forms that must vanish
        self.signs: list[tuple[Form, str]] = []  # where a nonzero exponent needs d > 0
        # Gains and biases first: they become the free unknowns, with exponent +1.
        for value in sorted(flow.parameters, key=lambda v: len(v.axes)):
            if value.name not in unscaled:
                for spot in flow.spots(value):
                    self.unknown(value, spot)

    def unknown(self, value: Value, spot: Spot) -> Form:
        form: Form = {len(self.unknowns): Fraction(1)}
        self.unknowns.append((value, spot))
        self.exponent[value, spot] = form
        return form

    def of(self, value: Value, spot: Spot) -> Form:
        return self.exponent.get((value, spot), ZERO)

    def vanish(self, form: Form) -> None:
        if form:
            self.zeros.append(form)

    def solve(self) -> list[Solution]:
        for step in self.flow.steps:
            if step.record.elementwise:
                self._elementwise(step)
            else:
                self._through(step)
        for value in self.program.outputs:
            for spot in self.flow.spots(value):
                self.vanish(self.of(value, spot))
        return [
            solution
            for vector in null_space(self.zeros, len(self.unknowns))
            if (solution := self._solution(vector)).exponents
        ]

    def _solution(self, vector: dict[int, Fraction]) -> Solution:
        parameters = set(self.program.parameters)
        exponents = {
            self.unknowns[key]: weight
            for key, weight in vector.items()
            if self.unknowns[key][0] in parameters
        }
        positive = next((line for form, line in self.signs if _value(form, vector)), "")
        return Solution(exponents, positive, self._scan_of(exponents, vector))

    def _scan_of(
        self, exponents: Mapping[tuple[Value, Spot], Fraction], vector: dict[int, Fraction]
    ) -> int | None:
        for number, scan in enumerate(self.program.scans):
            stacked = set(scan.stacked)
            if exponents and all(value in stacked for value, _ in exponents):
                outside = [
                    (step.record.operands[hop.operand], hop.spot)
                    for step in self.flow.steps
                    if number not in step.record.scans
                    for hop in step.hops
                ]
                crossing = [(v, spot) for v in scan.boundary for spot in self.flow.spots(v)]
                forms = (self.of(*at) for at in outside + crossing)
                return None if any(_value(form, vector) for form in forms) else number
        return None

    # ------------------------------------------------------------------ index by index

    def _elementwise(self, step: Step) -> None:
        record = step.record
        if any(hop.pinned for hop in step.hops):
            for hop in step.hops:
                self.vanish(self.of(record.operands[hop.operand], hop.spot))
            return
        everywhere = dict.fromkeys(spot for own in step.results for spot in own)
        everywhere.update(dict.fromkeys(hop.spot for hop in step.hops))
        for spot in everywhere:
            result = self._combine(step, spot)
            for value, own in zip(record.results, step.results):
                if spot in own:
                    self.exponent.setdefault((value, spot), result)
                else:
                    self.vanish(result)

    def _combine(self, step: Step, spot: Spot) -> Form:
        """Exponent of an elementwise result."""
        record, name = step.record, step.record.primitive
        forms = [self.of(value, spot) for value in record.operands]
        if name == "carry_in":
            # From a zero, every power of d is a zero: the body decides.
            fixed = record.operands[0] in self.fixed
            return self.unknown(record.results[0], spot) if fixed else forms[0]
        if name == "select_n":
            self.vanish(forms[0])
            return self._agree(step, range(1, len(forms)), forms)
        if name in SUMS or name in JOINS:
            return self._agree(step, range(len(forms)), forms)
        if name in EXTREMA or name in COMPARISONS:
            form = self._agree(step, range(len(forms)), forms)
            self.signs.append((form, record.source))
            return ZERO if name in COMPARISONS else form
        if passes(record):
            return forms[0]
        if name == "mul":
            return plus(forms[0], forms[1])
        if name == "div":
            return plus(forms[0], forms[1], -1)
        if name == "integer_pow":
            return times(forms[0], record.params["y"])
        if name in POWERS:
            if name in SIGN_BLIND:
                self.signs.append((forms[0], record.source))
            return times(forms[0], POWERS[name])
        for form in forms:
            self.vanish(form)
        return ZERO

    def _agree(self, step: Step, operands: range, forms: list[Form]) -> Form:
        """All operands that a scaling would change must be scaled alike."""
        record = step.record
        live = [forms[i] for i in operands if record.operands[i] not in self.fixed]
        first = live[0] if live else ZERO
        for form in live[1:]:
            self.vanish(plus(first, form, -1))
        if any(
            record.operands[i] in self.fixed and not self.fixed.zero(record.operands[i])
            for i in operands
        ):
            self.signs.append((first, record.source))
        return first

    # ------------------------------------------------------------------ everything else

    def _through(self, step: Step) -> None:
        record, name = step.record, step.record.primitive
        arrived: dict[tuple[int, Spot], Form] = {}
        # What any scaling leaves as it is (a cache of zeros) must not set the exponent.
        for hop in sorted(step.hops, key=lambda hop: record.operands[hop.operand] in self.fixed):
            value = record.operands[hop.operand]
            form = self.of(value, hop.spot)
            if hop.dropped and not hop.pinned:
                continue
            if hop.pinned or not self._may_pass(step, hop, form):
                self.vanish(form)
                continue
            if not hop.targets:
                for other, spot in hop.partners:
                    form = plus(form, self.of(record.operands[other], spot))
                self.vanish(form)
            for target in hop.targets:
                if (name, target[0]) in POSITIONS:
                    continue
                known = arrived.get(target)
                if known is None:
                    arrived[target] = form
                elif name in PRODUCTS:
                    arrived[target] = plus(known, form)
                elif value not in self.fixed:
                    self.vanish(plus(known, form, -1))
                elif not self.fixed.zero(value):
                    self.signs.append((known, record.source))
        for (result, spot), form in arrived.items():
            self.exponent[record.results[result], spot] = form

    def _may_pass(self, step: Step, hop: Hop, form: Form) -> bool:
        """False if what passes must not be scaled; notes where it must be scaled by d > 0."""
        record, name = step.record, step.record.primitive
        if not hop.targets:
            return True
        if name in ORDERED_THROUGH:
            self.signs.append((form, record.source))
            return True
        if name == "pad" and pads_other_axes(record, {axis for axis, _, _ in hop.spot}):
            padding = record.operands[1]
            if padding in self.fixed and not self.fixed.zero(padding):
                self.signs.append((form, record.source))
            return padding in self.fixed
        return name in LINEAR_THROUGH


def _value(form: Form, vector: Mapping[int, Fraction]) -> Fraction:
    return sum((c * vector.get(key, Fraction(0)) for key, c in form.items()), Fraction(0))


def null_space(rows: list[Form], unknowns: int) -> list[dict[int, Fraction]]:
    """A basis of the vectors on which every row vanishes, by exact sparse elimination.

    Each row is solved for its last unknown, so the first ones stay free: every vector has 1 at
    one free unknown and 0 at the others.
    """
    pivots: dict[int, dict[int, Fraction]] = {}
    for form in rows:
        row = dict(form)
        for key in list(row):
            if key in pivots and row.get(key):
                _subtract(row, pivots[key], row[key])
        row = {key: value for key, value in row.items() if value}
        if not row:
            continue
        pivot = max(row)
        row = {key: value / row[pivot] for key, value in row.items()}
        for other in pivots.values():
            if pivot in other:
                _subtract(other, row, other[pivot])
        pivots[pivot] = row
    basis = []
    for free in range(unknowns):
        if free not in pivots:
            vector = {free: Fraction(1)}
            for pivot, row in pivots.items():
                if free in row:
                    vector[pivot] = -row[free]
            basis.append(vector)
    return basis


def _subtract(row: dict[int, Fraction], other: Mapping[int, Fraction], factor: Fraction) -> None:
    """row -= factor * other, in place, without zeros."""
    for key, value in other.items():
        new = row.get(key, Fraction(0)) - factor * value
        if new:
            row[key] = new
        else:
            row.pop(key, None)
