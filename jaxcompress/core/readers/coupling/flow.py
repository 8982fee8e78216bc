"""Pass 2, shared part: how the indices of chosen leaves travel through each record.

A *spot* is where the chosen leaves stand in one array: one `(axis, offset, stride)` per leaf. The
leaves of one group give spots of length 1; pairs_of leaves that are acted on jointly, say (kv
head, head_dim), give spots that name the axis of each.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property

from .atoms import Atom, Place, terms
from .program import LITERAL, Move, Pair, Program, Record, Value
from .semantics import names

Spot = tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class Hop:
    """Where one spot of one operand goes."""

    operand: int
    spot: Spot
    targets: list[tuple[int, Spot]] = field(default_factory=list)  # (result, spot)
    partners: list[tuple[int, Spot]] = field(
        default_factory=list
    )  # contracted with (operand, spot)
    reduced: bool = False
    pinned: bool = False  # it cannot be followed: no transformation is allowed
    dropped: bool = False  # a slice left it out


@dataclass(slots=True)
class Step:
    """One record, seen from the chosen leaves."""

    record: Record
    hops: list[Hop]
    results: list[list[Spot]]  # spots of each result
    foreign: set[tuple[int, Spot]]  # (operand, spot): varies along the axis, holds other leaves


class Flow:
    """The chosen leaves' way through a program."""

    def __init__(self, program: Program, atoms: tuple[Atom, ...]):
        self.program = program
        self.atoms = atoms

    @cached_property
    def steps(self) -> list[Step]:
        """One step per record that the leaves touch, in order."""
        return [self._step(record) for record in self.program.touching(self.atoms)]

    @cached_property
    def parameters(self) -> list[Value]:
        """The parameters in which one of the leaves stands."""
        wanted = set(self.atoms)
        return [
            value
            for value in self.program.parameters
            if any(not wanted.isdisjoint(self.program.places(axis)) for axis in value.axes)
        ]

    def spots(self, value: Value) -> list[Spot]:
        """Where the leaves stand in an array. Jointly: where each stands once in a product."""
        if len(self.atoms) == 1:
            return [
                ((k, *place),)
                for k, axis in enumerate(value.axes)
                for place in self.program.places(axis).get(self.atoms[0], ())
            ]
        wanted = set(self.atoms)
        per_axis = []
        for k, axis in enumerate(value.axes):
            found = [
                tuple((leaf, (k, *place)) for leaf, place in term if leaf in wanted)
                for term in self.program.terms(axis)
            ]
            per_axis.append(list(dict.fromkeys(found)))
        out = []
        for choice in itertools.product(*per_axis):
            pairs = [pair for term in choice for pair in term]
            where = dict(pairs)
            if len(pairs) == len(where) == len(self.atoms):
                out.append(tuple(where[atom] for atom in self.atoms))
        return list(dict.fromkeys(out))

    def _step(self, record: Record) -> Step:
        results = [self.spots(value) for value in record.results]
        operands = [self.spots(value) for value in record.operands]
        if record.reshapes:
            hops = self._through_reshape(record, operands[0], results[0])
            return Step(record, hops, results, set())
        known = [set(spots) for spots in results]
        hops = [
            self._hop(record, i, spot, operands, known)
            for i, spots in enumerate(operands)
            for spot in spots
        ]
        fed = {target for hop in hops for target in hop.targets}
        if any((i, spot) not in fed for i, spots in enumerate(results) for spot in spots):
            for hop in hops:  # left out, and yet the result holds the leaf: not understood
                hop.pinned |= hop.dropped
        foreign = self._foreign(record, operands, results) if record.elementwise else set()
        return Step(record, hops, results, foreign)

    def _foreign(
        self, record: Record, operands: list[list[Spot]], results: list[list[Spot]]
    ) -> set[tuple[int, Spot]]:
        """Operands that vary along a result's axis without holding the leaves there."""
        moved = {(move.operand, move.axis) for move in record.moves}
        return {
            (i, spot)
            for spots in results
            for spot in spots
            for i, own in enumerate(operands)
            if spot not in own and all((i, at[0]) in moved for at in spot)
        }

    def _hop(
        self,
        record: Record,
        operand: int,
        spot: Spot,
        operands: list[list[Spot]],
        results: list[set[Spot]],
    ) -> Hop:
        hop = Hop(operand, spot)
        hop.pinned = any((operand, axis) in record.pinned_operands for axis, _, _ in spot)
        moves = [m for m in record.moves if m.operand == operand]
        covered = False  # a move takes each of its axes somewhere
        for result in dict.fromkeys(move.result for move in moves):
            carried = [_carried([m for m in moves if m.result == result], at) for at in spot]
            covered |= all(options is not None for options in carried)
            candidates = list(itertools.product(*(options or () for options in carried)))
            found = [tuple(c) for c in candidates if tuple(c) in results[result]]
            hop.targets += [(result, target) for target in found]
            hop.pinned |= bool(candidates) and not found
        if hop.targets or hop.pinned:
            return hop
        hop.reduced = any((operand, axis) in record.reduced for axis, _, _ in spot)
        contracted = [c for p in record.contracted for c in (p, p.swapped())]
        batched = [c for p in record.batched for c in (p, p.swapped())]
        if any(
            pair.operand == operand and pair.axis == at[0] for pair in contracted for at in spot
        ):
            hop.partners = _partners(operand, spot, contracted, batched, operands)
            hop.pinned = not hop.partners and len(self.atoms) == 1
        elif not hop.reduced:
            hop.dropped = covered
            hop.pinned = not covered
        return hop

    def _through_reshape(
        self, record: Record, operand_spots: list[Spot], result_spots: list[Spot]
    ) -> list[Hop]:
        """Spots of operand and result that are the same place of the flattened array."""
        shape_in, shape_out = record.operands[0].shape, record.results[0].shape
        flat_in = self._flat_places(record.operands[0])
        pairs_of = [
            [(_unflatten(p, shape_in), _unflatten(p, shape_out)) for p in flat_in.get(atom, ())]
            for atom in self.atoms
        ]
        known, hops = set(result_spots), []
        for spot in operand_spots:
            hop = Hop(0, spot)
            options = [
                [to for at, to in pairs if at == part] for part, pairs in zip(spot, pairs_of)
            ]
            found = [t for t in dict.fromkeys(itertools.product(*options)) if t in known]
            hop.targets = [(0, target) for target in found]
            hop.pinned = not found
            hops.append(hop)
        return hops

    def _flat_places(self, value: Value) -> dict[Atom, tuple[Place, ...]]:
        out: dict[Atom, dict[Place, None]] = {}
        for term in terms(tuple(atom for axis in value.axes for atom in axis)):
            for leaf, place in term:
                if leaf in self.atoms:
                    out.setdefault(leaf, {})[place] = None
        return {leaf: tuple(found) for leaf, found in out.items()}


def _carried(moves: list[Move], at: tuple[int, int, int]) -> list[tuple[int, int, int]] | None:
    """Where moves to one result take a place; None if no move takes its axis."""
    axis, *place = at
    own = [move for move in moves if move.axis == axis]
    if not own:
        return None
    offset, stride = place
    landed = [(move.result_axis, move.carry((offset, stride))) for move in own]
    return [(axis, *place) for axis, place in landed if place is not None]


def _unflatten(place: Place, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(axis, offset, stride) of a place of the flattened array of that shape."""
    offset, stride = place
    block = 1
    for axis in range(len(shape) - 1, -1, -1):
        if shape[axis] > 1 and stride < block * shape[axis]:
            return axis, offset // block % shape[axis], stride // block
        block *= shape[axis]
    raise AssertionError(f"place {place} outside of {shape}")


def _partners(
    operand: int,
    spot: Spot,
    contracted: list[Pair],
    batched: list[Pair],
    operands: list[list[Spot]],
) -> list[tuple[int, Spot]]:
    """Spots of the other operand that a contraction sums together with this one."""
    options = []
    for axis, offset, stride in spot:
        pairs = [p for p in contracted + batched if (p.operand, p.axis) == (operand, axis)]
        options.append([(p.other, (p.other_axis, offset, stride)) for p in pairs])
    out = []
    for choice in itertools.product(*options):
        other = {o for o, _ in choice}
        there = tuple(at for _, at in choice)
        if len(other) == 1 and there in operands[min(other)]:
            out.append((min(other), there))
    return out


class Fixed:
    """Values that are one literal number everywhere.

    A 0 is fixed by any diagonal, an infinity by any positive one: `value in fixed`. Only
    broadcasts and casts of literals are followed; anything else counts as not fixed.
    """

    PASSING = names("broadcast_in_dim convert_element_type reshape copy stop_gradient transpose")

    def __init__(self, program: Program):
        self._numbers: dict[Value, float] = {}
        for record in program.records:
            if record.primitive in self.PASSING:
                number = self.number(record.operands[0])
                if number is not None:
                    self._numbers[record.results[0]] = number

    def number(self, value: Value) -> float | None:
        """The number that every entry is, None if there is no telling."""
        return value.number if value.kind == LITERAL else self._numbers.get(value)

    def zero(self, value: Value) -> bool:
        """The value is 0 everywhere."""
        return self.number(value) == 0

    def infinite(self, value: Value) -> bool:
        """The value is inf or -inf everywhere."""
        return abs(self.number(value) or 0.0) == math.inf

    def __contains__(self, value: Value) -> bool:
        return self.zero(value) or self.infinite(value)
