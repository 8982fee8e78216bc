"""The flat list of records that pass 1 makes of a function and pass 2 reads.

Calls, scans and branches are inlined into one list; a `Frame` per call instance remembers which
value each variable of the jaxpr had there, so that the jaxpr can be evaluated again (`cut`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jax.extend import core as jex

from .atoms import Atom, Axis, Place, axis_size, places, terms

PARAMETER, INPUT, CONSTANT, LITERAL, COMPUTED = "parameter", "input", "constant", "literal", "value"


@dataclass(eq=False, slots=True)
class Value:
    """An array of the function: its axes, and where it comes from."""

    axes: list[Axis]
    kind: str = COMPUTED
    name: str = ""
    number: float | None = None  # of a scalar literal

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis_size(axis) for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Move:
    """Axis `axis` of an operand reappears as axis `result_axis` of a result.

    Position p in [start, stop) goes to `(p - start) // block * result_block + shift`. With
    `block > 1` only what stands above the block (strides that are multiples of it) is carried.
    """

    operand: int
    axis: int
    result: int
    result_axis: int
    start: int = 0
    stop: int | None = None
    block: int = 1
    result_block: int = 1
    shift: int = 0

    def carry(self, place: Place) -> Place | None:
        """Where a leaf's place goes; None if the result does not hold it."""
        offset, stride = place
        offset -= self.start
        outside = offset < 0 or (self.stop is not None and offset >= self.stop - self.start)
        if outside or stride % self.block:
            return None
        scale = self.result_block
        return offset // self.block * scale + self.shift, stride // self.block * scale


@dataclass(frozen=True, slots=True)
class Pair:
    """Axis `axis` of an operand meets axis `other_axis` of operand `other`."""

    operand: int
    axis: int
    other: int
    other_axis: int

    def swapped(self) -> Pair:
        return Pair(self.other, self.other_axis, self.operand, self.axis)


@dataclass(eq=False, slots=True)
class Record:
    """What one equation does to axes."""

    primitive: str
    source: str
    operands: list[Value]
    results: list[Value]
    params: Mapping[str, Any] = field(default_factory=dict)
    elementwise: bool = False  # acts index by index on operands of one shape (or scalars)
    reshapes: bool = False
    moves: list[Move] = field(default_factory=list)
    contracted: list[Pair] = field(default_factory=list)
    batched: list[Pair] = field(default_factory=list)
    reduced: set[tuple[int, int]] = field(default_factory=set)  # (operand, axis)
    uniform: set[tuple[int, int]] = field(default_factory=set)  # (result, axis): broadcast along it
    pinned_operands: set[tuple[int, int]] = field(default_factory=set)
    pinned_results: set[tuple[int, int]] = field(default_factory=set)
    positional: tuple[Axis, ...] = ()  # axes along which the values are positions
    scans: tuple[int, ...] = ()  # the scans it stands in, outermost first

    def move(self, operand: int, axis: int, result: int, result_axis: int, **how: int) -> None:
        self.moves.append(Move(operand, axis, result, result_axis, **how))


@dataclass(eq=False, slots=True)
class Scan:
    """One `lax.scan`: which values are its stacked inputs, and which cross its boundary whole."""

    source: str
    length: int
    stacked: list[Value]
    boundary: list[Value] = field(default_factory=list)  # constants, carries, results


@dataclass(slots=True)
class Frame:
    """One instance of a jaxpr: the value of each variable, and the frames of its equations."""

    values: dict[jex.Var, Value] = field(default_factory=dict)
    children: dict[int, list[Frame]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pin:
    """Why an axis cannot be cut: the reason, the line, and the axis."""

    axis: Axis
    reason: str
    source: str


@dataclass(eq=False)
class Program:
    """A function as pass 1 has read it. Axes are final; what follows only reads them."""

    closed: Any  # the jex.ClosedJaxpr
    rebuild_outputs: Any  # (flat results) -> what the function returns
    root: Frame = field(default_factory=Frame)
    records: list[Record] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    scans: list[Scan] = field(default_factory=list)
    parameters: list[Value] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    constants: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    _places: dict[Axis, dict[Atom, tuple[Place, ...]]] = field(default_factory=dict)
    _terms: dict[Axis, list[list[tuple[Atom, Place]]]] = field(default_factory=dict)
    _touching: dict[Atom, list[int]] | None = None

    def places(self, axis: Axis) -> dict[Atom, tuple[Place, ...]]:
        """`atoms.places`, remembered."""
        found = self._places.get(axis)
        if found is None:
            found = self._places[axis] = places(axis)
        return found

    def terms(self, axis: Axis) -> list[list[tuple[Atom, Place]]]:
        """`atoms.terms`, remembered."""
        found = self._terms.get(axis)
        if found is None:
            found = self._terms[axis] = terms(axis)
        return found

    def touching(self, atoms: tuple[Atom, ...]) -> list[Record]:
        """The records that any of the leaves passes through, in order."""
        if self._touching is None:
            self._touching = {}
            for number, record in enumerate(self.records):
                seen: dict[Atom, None] = {}
                for value in (*record.operands, *record.results):
                    for axis in value.axes:
                        seen.update(dict.fromkeys(self.places(axis)))
                for atom in seen:
                    self._touching.setdefault(atom, []).append(number)
        numbers = {n for atom in atoms for n in self._touching.get(atom, ())}
        return [self.records[n] for n in sorted(numbers)]
