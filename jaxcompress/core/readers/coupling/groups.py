"""The public objects: groups of parameter axes that are one and the same axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.readers.kept import KeptArrays, combine

from .atoms import Atom, labels, splitting_lines
from .crossing import Crossing, crossings
from .diagonals import DiagonalSolver, Solution
from .flow import Fixed, Flow
from .matrices import GENERAL, ORTHOGONAL, MatrixSolver
from .program import Program, Value
from .transform import scale, transform

SELECTION, POSITIVE_DIAGONAL, ANY_DIAGONAL = "selection", "positive diagonal", "any diagonal"


class Member(NamedTuple):
    """Where a group stands in one parameter.

    Its index 0 is at position `offset` of the axis, index i at `offset + i * stride`. If the axis
    is larger than that, the group repeats along it (`labels` says where).
    """

    path: str
    axis: int
    offset: int
    stride: int


@dataclass(frozen=True)
class Diagonal:
    """A scaling of parameters that leaves the function unchanged.

    Every parameter in `exponents` is multiplied along the group by `d ** exponent`, for a vector
    d of the group's size that one is free to choose. Exponents are integers without a common
    divisor unless roots are involved.

    Attributes:
        groups: the group scaled, or the groups scaled jointly (d then has one axis for each).
        exponents: {members: exponent}, one member of the parameter for each of `groups`.
        positive: the line because of which d must be positive; empty if any nonzero d will do.
        steps: number of steps of the scan within which it lives; d may then be `[steps, size]`,
            another one for each layer. 0 otherwise.
    """

    groups: tuple[Group, ...]
    exponents: dict[tuple[Member, ...], Fraction]
    positive: str
    steps: int = 0

    @property
    def by_axis(self) -> dict[tuple[str, int], Fraction]:
        """{(path, axis): exponent} of a diagonal of one group.

        Raises:
            InputError: an axis holds the group in segments that scale differently.
        """
        out: dict[tuple[str, int], Fraction] = {}
        for (member, *more), exponent in self.exponents.items():
            if more or out.setdefault((member.path, member.axis), exponent) != exponent:
                raise InputError(
                    f"{member.path}: one exponent per axis is not enough; see exponents"
                )
        segments = [m for m in self.groups[0].members if (m.path, m.axis) in out]
        if len(segments) != len(self.exponents):
            raise InputError("a fused axis is scaled in part; see exponents")
        return out

    def apply(self, params: Any, d: Any) -> Any:
        """Parameters scaled by `d ** exponent`; d is `[size, ...]`, one axis per group."""
        return scale(self, params, d)


@dataclass(frozen=True)
class Matrices:
    """Parameters that one square matrix T may transform together, leaving the function unchanged.

    Attributes:
        group: whose axis T acts on, `[size, size]`.
        level: "identity" < "permutation" < "orthogonal" < "general linear": what T may be.
        fixes_ones: T must also map the vector of ones to itself (both T 1 = 1 and T' 1 = 1
            for orthogonal T).
        signs: {member: sign}; at -1 the parameter is transformed by the inverse transpose of T.
        reasons: what restricts T, and where.
        steps: as in `Diagonal`; T may then be `[steps, size, size]`.
    """

    group: Group
    level: str
    fixes_ones: bool
    signs: dict[Member, int]
    reasons: dict[str, str]
    steps: int = 0

    def apply(self, params: Any, matrix: Any) -> Any:
        """Parameters transformed by `matrix` along the group."""
        return transform(self, params, matrix)


@dataclass(eq=False)
class Group:
    """One axis of the function, and every place of a parameter axis where it stands.

    Attributes:
        size: number of indices.
        members: where it stands.
        reasons: why it cannot be cut, "reason @ call site > line"; empty if it can.
        positional: it meets a constant, an iota or random bits: the function must be cut by
            evaluating its jaxpr, and each scan step must keep the same indices.
        steps: number of steps of the scan that it never leaves, else 0. It may then keep other
            indices in each step.
    """

    size: int
    members: tuple[Member, ...]
    reasons: tuple[str, ...]
    positional: bool
    steps: int
    _program: Program = field(repr=False)
    _fixed: Fixed = field(repr=False)
    atom: Atom | None = field(repr=False)
    _labels: dict[Member, np.ndarray] = field(repr=False)

    @property
    def cuttable(self) -> bool:
        """Its indices can be removed."""
        return not self.reasons

    def labels(self, member: Member) -> np.ndarray:
        """The group's index at every position of the member's axis, -1 where it does not stand."""
        return self._labels[member]

    @cached_property
    def _flow(self) -> Flow:
        return Flow(self._program, (self.atom,) if self.atom else ())

    @cached_property
    def crossing(self) -> list[Crossing]:
        """Contractions and reductions over the group, and whether masking is removing there."""
        return crossings(self._flow, self._fixed) if self.atom else []

    @property
    def exact(self) -> bool:
        """A network with masked indices and one without them compute the same."""
        return all(crossing.exact for crossing in self.crossing)

    def diagonals(self, unscaled: Collection[str] = ()) -> list[Diagonal]:
        """A basis of the diagonal symmetries.

        Args:
            unscaled: paths of parameters that are to stay as they are.
        """
        return _diagonals((self,), unscaled) if self.atom else []

    def matrices(self, uniform: Collection[str] = ()) -> list[Matrices]:
        """The classes of parameters that a matrix may transform, with what it may be.

        Args:
            uniform: paths of parameters to be taken as constant along the group: gains that have
                been folded into their consumers.
        """
        if self.atom is None:
            return []
        solver = MatrixSolver(self._program, self._flow, self._fixed, uniform)
        scans = self._program.scans
        return [
            Matrices(
                self,
                found.level,
                found.fixes_ones,
                {_member(value, at[0]): sign for (value, at), sign in found.signs.items()},
                found.reasons,
                0 if found.scan is None else scans[found.scan].length,
            )
            for found in solver.solve()
        ]

    @cached_property
    def symmetries(self) -> tuple[str, ...]:
        """Which kinds of linear map commute with it, of "selection", "positive diagonal",
        "any diagonal", "orthogonal" and "general linear" (the latter two as matrices on all of a
        class's parameters; "orthogonal, T 1 = 1" if the ones must stay)."""
        out = [SELECTION] if self.cuttable else []
        for diagonal in self.diagonals():
            out.append(POSITIVE_DIAGONAL if diagonal.positive else ANY_DIAGONAL)
        for found in self.matrices():
            if found.level in (ORTHOGONAL, GENERAL):
                out.append(found.level + (", T 1 = 1" if found.fixes_ones else ""))
        return tuple(dict.fromkeys(out))

    def keep(self, indices: Any) -> KeptArrays:
        """The record `{path: {axis: kept indices}}` that keeps `indices` of the group.

        Args:
            indices: `[k]` integers; `[steps, k]` for other indices in each step of a scan.

        Raises:
            InputError: the group cannot be cut; indices out of range, double or none; `[steps, k]`
                where every step must keep the same.
        """
        chosen = np.asarray(indices)
        if not self.cuttable:
            raise InputError(f"{self.name} cannot be cut: {self.reasons[0]}")
        if chosen.ndim not in (1, 2) or not chosen.size or chosen.dtype.kind not in "iu":
            raise InputError(f"{self.name}: keep wants at least one integer index")
        if chosen.ndim == 2 and (self.positional or len(chosen) != self.steps):
            raise InputError(
                f"{self.name}: every step must keep the same indices; pass them as [k]"
            )
        if chosen.min() < 0 or chosen.max() >= self.size:
            raise InputError(f"{self.name}: indices must lie in 0 to {self.size - 1}")
        if (np.diff(np.sort(chosen, -1), axis=-1) == 0).any():
            raise InputError(f"{self.name}: an index occurs twice")
        parts = []
        for member, index in self._labels.items():
            rows = [
                np.flatnonzero((index < 0) | np.isin(index, row)) for row in np.atleast_2d(chosen)
            ]
            kept = np.stack(rows) if chosen.ndim == 2 else rows[0]
            parts.append({member.path: {member.axis: kept}})
        return combine(*parts)

    @property
    def name(self) -> str:
        """Its first member, for messages: `path axis k`."""
        return f"{self.members[0].path} axis {self.members[0].axis}"


class Groups(Sequence[Group]):
    """The groups of a function, and the function that they were read from."""

    def __init__(
        self, fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...], program: Program
    ):
        self.fn, self.params, self.inputs, self.program = fn, params, inputs, program
        self._groups = make_groups(program)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        return self._groups[index]

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def at(self, path: str, axis: int) -> list[Group]:
        """The groups that stand on one axis of one parameter, major before minor.

        Raises:
            InputError: there is no such axis.
        """
        found = [
            (member.offset, -member.stride, number)
            for number, group in enumerate(self)
            for member in group.members
            if (member.path, member.axis) == (path, axis)
        ]
        if not found:
            raise InputError(f"no group stands on axis {axis} of {path}")
        return [self[number] for number in dict.fromkeys(n for *_, n in sorted(found))]

    def diagonals(self, *groups: Group, unscaled: Collection[str] = ()) -> list[Diagonal]:
        """Diagonal symmetries over several groups at once, such as (kv head, head_dim).

        Only parameters and values in which each of the groups stands once are scaled.
        """
        return _diagonals(groups, unscaled)

    def __repr__(self) -> str:
        lines = [f"{'size':>6}  {'cut':<9}  members"]
        for group in self:
            how = "keep" if not group.cuttable else "per step" if group.steps else "yes"
            lines.append(f"{group.size:>6}  {how:<9}  {', '.join(_shown(group))}")
            lines += [f"{'':>19}because {reason}" for reason in group.reasons[:2]]
            inexact = [c for c in group.crossing if not c.exact] if group.cuttable else []
            if inexact:
                where = dict.fromkeys(f"{c.primitive} @ {c.source}" for c in inexact)
                lines.append(f"{'':>19}masking is not removing: {'; '.join(list(where)[:3])}")
        return "\n".join(lines)


def _shown(group: Group) -> list[str]:
    out = []
    for member in group.members:
        index = group.labels(member)
        plain = len(index) == group.size
        where = "" if plain else f"[{member.offset}::{member.stride}]"
        out.append(f"{member.path}:{member.axis}{where}")
    return out


def _member(value: Value, at: tuple[int, int, int]) -> Member:
    return Member(value.name, *at)


def _diagonals(groups: tuple[Group, ...], unscaled: Collection[str]) -> list[Diagonal]:
    atoms = tuple(group.atom for group in groups if group.atom is not None)
    program = groups[0]._program
    flow = groups[0]._flow if len(groups) == 1 else Flow(program, atoms)
    solver = DiagonalSolver(program, flow, groups[0]._fixed, unscaled)
    return [_diagonal(groups, program, solution) for solution in solver.solve()]


def _diagonal(groups: tuple[Group, ...], program: Program, solution: Solution) -> Diagonal:
    scale_up = math.lcm(*(w.denominator for w in solution.exponents.values()))
    down = math.gcd(*(int(w * scale_up) for w in solution.exponents.values()))
    exponents = {
        tuple(_member(value, at) for at in spot): weight * scale_up / down
        for (value, spot), weight in solution.exponents.items()
    }
    scan = solution.inner_scan
    steps = 0 if scan is None else program.scans[scan].length
    return Diagonal(groups, exponents, solution.positive, steps)


# ---------------------------------------------------------------------------- making groups


def make_groups(program: Program) -> list[Group]:
    """Groups of the program's parameters: atoms that must go together, in the order they appear.

    What no atom covers comes along as groups that are not cuttable, with the reason.
    """
    members: dict[Atom, dict[Member, np.ndarray]] = {}
    lone: list[tuple[Member, np.ndarray, tuple[str, ...]]] = []
    owners: dict[Atom, set[Value]] = {}
    for value in program.parameters:
        for k, axis in enumerate(value.axes):
            covered = np.zeros(value.shape[k], bool)
            for atom, place, index in labels(axis):
                members.setdefault(atom, {})[Member(value.name, k, *place)] = index
                owners.setdefault(atom, set()).add(value)
                covered |= index >= 0
            if not covered.all():
                lone.append(_lone(value, k, ~covered))
    reasons = _reasons(program, members)
    positional = _positional(program)
    fixed = Fixed(program)
    groups = [
        Group(
            atom.size,
            tuple(found),
            tuple(reasons[atom]),
            atom in positional,
            0 if reasons[atom] else _steps(program, atom, owners[atom]),
            program,
            fixed,
            atom,
            found,
        )
        for atom, found in members.items()
    ]
    for member, index, why in lone:
        size = int(index.max()) + 1
        groups.append(Group(size, (member,), why, False, 0, program, fixed, None, {member: index}))
    order = {value.name: number for number, value in enumerate(program.parameters)}
    return sorted(groups, key=lambda group: (order[group.members[0].path], *group.members[0][1:]))


def _lone(value: Value, k: int, alone: np.ndarray) -> tuple[Member, np.ndarray, tuple[str, ...]]:
    """Positions of an axis that the function treats one at a time."""
    index = np.where(alone, np.cumsum(alone) - 1, -1)
    where = np.flatnonzero(alone)
    stride = int(where[1] - where[0]) if len(where) > 1 else 1
    if value.shape[k] == 1:
        why = "an axis of size 1 is not told from a broadcast one"
    else:
        lines = splitting_lines(value.axes[k])
        why = "single indices are met alone" + "".join(f"; {line}" for line in lines[:2])
    return Member(value.name, k, int(where[0]), stride), index, (why,)


def _reasons(program: Program, members: Collection[Atom]) -> dict[Atom, list[str]]:
    out: dict[Atom, dict[str, None]] = {atom: {} for atom in members}
    for pin in program.pins:
        for atom in program.places(pin.axis):
            if atom in out:
                out[atom][f"{pin.reason} @ {pin.source}"] = None
    consumed: set[Atom] = set()
    for record in program.records:
        for pair in record.contracted:
            consumed.update(program.places(record.operands[pair.operand].axes[pair.axis]))
    for atom, why in out.items():
        if atom not in consumed:
            why["no product consumes it in this trace"] = None
    return {atom: list(why) for atom, why in out.items()}


def _positional(program: Program) -> set[Atom]:
    """Leaves along which values are positions or constants."""
    axes = [axis for record in program.records for axis in record.positional]
    axes += [axis for value in program.constants for axis in value.axes]
    return {atom for axis in axes for atom in program.places(axis)}


def _steps(program: Program, atom: Atom, owners: set[Value]) -> int:
    """Length of the scan that a leaf never leaves, 0 if there is none."""
    for number, scan in enumerate(program.scans):
        if not owners <= set(scan.stacked):
            continue
        crossing = any(atom in program.places(a) for v in scan.boundary for a in v.axes)
        outside = any(number not in record.scans for record in program.touching((atom,)))
        if not crossing and not outside:
            return scan.length
    return 0
