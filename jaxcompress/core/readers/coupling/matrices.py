"""Pass 2: which matrices T may act on a group.

Arrays that hold the group fall into classes that must be transformed together: by T, or by its
inverse transpose (sign -). A linear operation links its operands and results, a contraction links
them with opposite signs. What else happens to a class says how free T is:

* any invertible T ("general linear"), if there are only linear operations and contractions;
* orthogonal, if a sum of squares is taken or the signs clash;
* with T 1 = 1 besides, if a constant is added along the axis or its plain sum is taken
  (T then also commutes with the mean, the centring of layer norm);
* a permutation, if there is a nonlinearity or an elementwise product;
* the identity, if the axis meets positions, constants or inputs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .flow import Fixed, Flow, Hop, Spot, Step
from .program import Program, Value
from .semantics import (
    JOINS,
    LINEAR_THROUGH,
    PRODUCTS,
    SUM_REDUCTIONS,
    SUMS,
    pads_other_axes,
    passes,
)

Key = tuple[Value, Spot]

IDENTITY, PERMUTATION, ORTHOGONAL, GENERAL = (
    "identity",
    "permutation",
    "orthogonal",
    "general linear",
)
LEVELS = (IDENTITY, PERMUTATION, ORTHOGONAL, GENERAL)
ONES = "T 1 = 1"


@dataclass(frozen=True)
class Class:
    """Parameters that one T transforms together; `signs` -1 means the inverse transpose."""

    level: str
    fixes_ones: bool
    signs: dict[Key, int]
    reasons: dict[str, str]  # what restricts T -> where
    scan: int | None


class SignedSets:
    """Union-find whose links carry a sign, with flags on the sets."""

    def __init__(self) -> None:
        self.parent: dict[Key, tuple[Key, int]] = {}
        self.flags: dict[Key, dict[str, str]] = {}

    def find(self, key: Key) -> tuple[Key, int]:
        """(representative, sign relative to it)"""
        self.parent.setdefault(key, (key, 1))
        path = []
        while self.parent[key][0] is not key:
            path.append(key)
            key = self.parent[key][0]
        sign = 1
        for node in reversed(path):
            sign *= self.parent[node][1]
            self.parent[node] = (key, sign)
        return key, sign

    def flag(self, key: Key, flag: str, source: str) -> None:
        self.flags.setdefault(self.find(key)[0], {}).setdefault(flag, source)

    def link(self, a: Key, b: Key, sign: int, source: str) -> None:
        (root, sign_a), (other, sign_b) = self.find(a), self.find(b)
        if root is other:
            if sign_a * sign_b != sign:
                self.flag(root, ORTHOGONAL, source)
            return
        self.parent[other] = (root, sign_a * sign_b * sign)
        for flag, where in self.flags.pop(other, {}).items():
            self.flags.setdefault(root, {}).setdefault(flag, where)


class MatrixSolver:
    """Reads one group (a flow of one leaf) and returns its classes.

    Args:
        uniform: parameters to be taken as constant along the group, such as a gain that has been
            folded into its consumers.
    """

    def __init__(self, program: Program, flow: Flow, fixed: Fixed, uniform: Collection[str] = ()):
        self.program, self.flow, self.fixed = program, flow, fixed
        self.sets = SignedSets()
        self.uniform: set[Key] = set()  # constant along the group
        self.squares: dict[Key, Key] = {}  # a square, times constants, not summed yet -> its root
        self.parameters: list[Key] = []
        for value in flow.parameters:
            for spot in flow.spots(value):
                if value.name in uniform:
                    self.uniform.add((value, spot))
                else:
                    self.parameters.append((value, spot))
                    self.sets.find((value, spot))
        for value in (*program.constants, *program.inputs):
            for spot in flow.spots(value):
                self.sets.flag((value, spot), IDENTITY, f"a {value.kind}")

    def solve(self) -> list[Class]:
        steps = self.flow.steps
        for step in steps:
            if step.record.elementwise:
                self._elementwise(step)
            else:
                self._through(step)
        for value in self.program.outputs:
            for spot in self.flow.spots(value):
                self._restrict((value, spot), IDENTITY, "result")
        scans = self._scan_numbers(steps)
        members: dict[Key, dict[Key, int]] = {}
        for key in self.parameters:
            root, sign = self.sets.find(key)
            members.setdefault(root, {})[key] = sign
        return [self._class(root, signs, scans) for root, signs in members.items()]

    def _scan_numbers(self, steps: list[Step]) -> dict[Key, int | None]:
        """For each set: the scan that it never leaves, if there is one."""
        found: dict[Key, int | None] = {}

        def note(key: Key, number: int | None) -> None:
            root = self.sets.find(key)[0]
            if found.setdefault(root, number) != number:
                found[root] = None

        for step in steps:
            number = step.record.scans[0] if step.record.scans else None
            for hop in step.hops:
                value = step.record.operands[hop.operand]
                if (value, hop.spot) not in self.uniform:
                    note((value, hop.spot), number)
        for number, scan in enumerate(self.program.scans):
            stacked = set(scan.stacked)
            outside = [(v, spot) for v in scan.boundary for spot in self.flow.spots(v)]
            outside += [key for key in self.parameters if key[0] not in stacked]
            for key in outside:
                root = self.sets.find(key)[0]
                if found.get(root) == number:
                    found[root] = None
        return found

    def _class(self, root: Key, signs: dict[Key, int], scans: dict[Key, int | None]) -> Class:
        flags = self.sets.flags.get(root, {})
        level = next((level for level in LEVELS if level in flags), GENERAL)
        ones = ONES in flags and level in (ORTHOGONAL, GENERAL)
        return Class(level, ones, signs, dict(flags), scans.get(root))

    # ------------------------------------------------------------------ helpers

    def _used(self, key: Key, source: str) -> None:
        """A square that is not summed is a nonlinearity."""
        root = self.squares.pop(key, None)
        if root is not None:
            self.sets.link(root, key, 1, source)
            self.sets.flag(root, PERMUTATION, source)

    def _restrict(self, key: Key, flag: str, source: str) -> None:
        if key not in self.uniform:
            self._used(key, source)
            self.sets.flag(key, flag, source)

    # ------------------------------------------------------------------ index by index

    def _elementwise(self, step: Step) -> None:
        record = step.record
        where = f"{record.primitive} @ {record.source}"
        if any(hop.pinned for hop in step.hops):
            for hop in step.hops:
                self._restrict((record.operands[hop.operand], hop.spot), IDENTITY, where)
            for value, spots in zip(record.results, step.results):
                for spot in spots:
                    self.sets.flag((value, spot), IDENTITY, where)
            return
        everywhere = dict.fromkeys(spot for own in step.results for spot in own)
        everywhere.update(dict.fromkeys(hop.spot for hop in step.hops))
        for spot in everywhere:
            self._combine(step, spot, where)

    def _combine(self, step: Step, spot: Spot, where: str) -> None:
        record, name = step.record, step.record.primitive
        held = {hop.operand for hop in step.hops if hop.spot == spot}
        moving: list[tuple[int, Key]] = []
        constant_too = False
        foreign = any((i, spot) in step.foreign for i in range(len(record.operands)))
        for i, value in enumerate(record.operands):
            if i in held and (value, spot) not in self.uniform and value not in self.fixed:
                moving.append((i, (value, spot)))
            elif not self.fixed.zero(value):
                constant_too |= name != "select_n" or i > 0
        keys = [key for _, key in moving]
        results = [(v, spot) for v, own in zip(record.results, step.results) if spot in own]
        if foreign:
            for key in keys + results:
                self._restrict(key, IDENTITY, where)
            return
        if name == "carry_in":
            self._carry_in(step, keys, results, where)
            return
        if not moving:
            self.uniform.update(results)
            return
        if self._is_square(step, moving):
            self._used(keys[0], where)
            self.squares[results[0]] = keys[0]
            return
        scales = len(moving) == 1 and (
            name == "mul" or (name == "div" and moving[0][0] == 0) or passes(record)
        )
        if scales and keys[0] in self.squares:
            self.squares[results[0]] = self.squares[keys[0]]
            return
        for key in keys:
            self._used(key, where)
        everything = keys + results
        for key in everything[1:]:
            self.sets.link(everything[0], key, 1, where)
        selects = name == "select_n" and moving[0][0] != 0
        if not (scales or name in SUMS or name in JOINS or selects):
            self.sets.flag(everything[0], PERMUTATION, where)
        elif constant_too and not scales:
            infinite = any(self.fixed.infinite(value) for value in record.operands)
            self.sets.flag(everything[0], PERMUTATION if infinite else ONES, where)

    def _carry_in(self, step: Step, keys: list[Key], results: list[Key], where: str) -> None:
        # Never uniform, even if it starts so: the body decides what it becomes.
        for result in results:
            if keys:
                self._used(keys[0], where)
                self.sets.link(keys[0], result, 1, where)
            elif step.record.operands[0] in self.fixed:
                self.sets.find(result)
            else:
                self.sets.flag(result, ONES, where)

    def _is_square(self, step: Step, moving: list[tuple[int, Key]]) -> bool:
        record = step.record
        if record.primitive == "integer_pow":
            return record.params["y"] == 2
        if record.primitive == "mul":
            return len(moving) == 2 and moving[0][1] == moving[1][1]
        return record.primitive == "square"

    # ------------------------------------------------------------------ everything else

    def _through(self, step: Step) -> None:
        record, name = step.record, step.record.primitive
        where = f"{name} @ {record.source}"
        arrived: dict[Key, list[Key]] = {}
        constant_too: dict[Key, str] = {}
        for hop in step.hops:
            key = (record.operands[hop.operand], hop.spot)
            if key[0] in self.fixed:
                self.uniform.add(key)
            if key in self.uniform:
                for result, spot in hop.targets:
                    target = (record.results[result], spot)
                    arrived.setdefault(target, [])
                    if name not in PRODUCTS and not self.fixed.zero(key[0]):
                        constant_too[target] = PERMUTATION if key[0] in self.fixed else ONES
                continue
            if hop.reduced and name in SUM_REDUCTIONS and key in self.squares:
                self.sets.flag(self.squares[key], ORTHOGONAL, where)
                continue
            self._used(key, where)
            if hop.pinned:
                self.sets.flag(key, IDENTITY, where)
                continue
            for result, spot in hop.targets:
                arrived.setdefault((record.results[result], spot), []).append(key)
            if hop.targets:
                self._passing(step, hop, key, where)
            else:
                self._consumed(step, hop, key, where)
        for result, (value, spots) in enumerate(zip(record.results, step.results)):
            for spot in spots:
                key = (value, spot)
                self._result(step, result, key, arrived.get(key), where)
                if arrived.get(key) and key in constant_too:
                    self.sets.flag(key, constant_too[key], where)

    def _passing(self, step: Step, hop: Hop, key: Key, where: str) -> None:
        record, name = step.record, step.record.primitive
        if name not in LINEAR_THROUGH:
            self.sets.flag(key, PERMUTATION, where)
            return
        axes = {axis for axis, _, _ in hop.spot}
        if name == "pad" and pads_other_axes(record, axes):
            padding = record.operands[1]
            if not self.fixed.zero(padding):
                self.sets.flag(key, PERMUTATION if padding in self.fixed else ONES, where)

    def _consumed(self, step: Step, hop: Hop, key: Key, where: str) -> None:
        """The axis ends here: contracted, reduced, or left out by a slice."""
        for other, spot in hop.partners:
            partner = (step.record.operands[other], spot)
            if partner in self.uniform:
                self.sets.flag(key, ONES, where)
            else:
                self._used(partner, where)
                self.sets.link(key, partner, -1, where)
        if hop.reduced:
            linear = step.record.primitive in SUM_REDUCTIONS
            self.sets.flag(key, ONES if linear else PERMUTATION, where)

    def _result(
        self, step: Step, result: int, key: Key, arrived: list[Key] | None, where: str
    ) -> None:
        if arrived is None:
            axes = {axis for axis, _, _ in key[1]}
            if all((result, axis) in step.record.uniform for axis in axes):
                self.uniform.add(key)
            else:
                self.sets.flag(key, IDENTITY, where)
        elif not arrived:
            self.uniform.add(key)
        else:
            for other in arrived:
                self.sets.link(other, key, 1, where)
            if step.record.primitive in PRODUCTS and len(arrived) > 1:
                self.sets.flag(key, PERMUTATION, where)
