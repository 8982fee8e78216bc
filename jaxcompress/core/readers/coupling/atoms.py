"""Axis algebra: an array axis as a product of atoms, and what makes two axes the same axis.

An *axis* is a tuple of atoms, major to minor: `(heads, head_dim)` is an axis of size
`heads * head_dim`, the empty tuple an axis of size 1. An *atom* is one of

* a leaf: an axis of which nothing finer is known;
* a product: it was a leaf, until a reshape split it into factors;
* a sum: a concatenation of axes, `(query + key + value)`; a slice splits a leaf into one.

`unify` declares two axes equal, index by index, and refines both until they are. There is one
union-find for the whole function, so what is learnt about an axis anywhere holds everywhere.
Factors of size 1 vanish.

A leaf may stand at several *places* of an axis. A place is `(offset, stride)`: the position of
its index 0, and the distance to its index 1. `(q + k) * hd`, say, holds `hd` at `(0, 1)` and at
`(|q| * |hd|, 1)`. Two axes that are equal hold the same leaves at the same places, however their
products and sums are nested, so values are followed through an operation by arithmetic on places.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

LEAF, PRODUCT, SUM = "leaf", "product", "sum"

Axis = tuple["Atom", ...]
Place = tuple[int, int]

_order = itertools.count()


class Mismatch(Exception):
    """Two axes, or an axis and a block size, that do not nest."""


class Atom:
    """A factor of an axis. Only `find(atom)` is current: unified atoms point to one another."""

    __slots__ = ("kind", "order", "parent", "parts", "size", "why")

    def __init__(self, size: int, kind: str = LEAF, parts: tuple[Axis, ...] = (), why: str = ""):
        self.size = int(size)
        self.kind = kind
        self.parts = parts  # of a product: one axis, its factors; of a sum: the summed axes
        self.why = why  # of a sum: the line that split it
        self.parent: Atom | None = None
        self.order = next(_order)

    def __repr__(self) -> str:
        return f"{self.kind}{self.order}:{self.size}"

    def become(self, kind: str, parts: tuple[Axis, ...], why: str = "") -> None:
        """Refine a leaf (or a sum found to be a product) in place, wherever it is used."""
        self.kind, self.parts, self.why = kind, parts, why or self.why


def fresh(size: int) -> Axis:
    """A new axis, equal to no other."""
    return (Atom(size),) if size != 1 else ()


def find(atom: Atom) -> Atom:
    """The representative of the atoms unified with `atom`."""
    while atom.parent is not None:
        if atom.parent.parent is not None:
            atom.parent = atom.parent.parent
        atom = atom.parent
    return atom


def factors(axis: Axis) -> list[Atom]:
    """Leaves and sums whose product the axis is, major to minor, without factors of size 1."""
    out: list[Atom] = []
    for atom in map(find, axis):
        if atom.kind == PRODUCT:
            out += factors(atom.parts[0])
        elif atom.size != 1:
            out.append(atom)
    return out


def axis_size(axis: Iterable[Atom]) -> int:
    """Number of indices of an axis."""
    return math.prod(atom.size for atom in axis)


# ---------------------------------------------------------------------------- products


def split_axis(axis: Axis, minor_size: int) -> tuple[Axis, Axis]:
    """The axis as (major, minor), the minor part of the size given; leaves split where they must.

    Raises:
        Mismatch: a factor straddles the boundary.
    """
    rest, done = factors(axis), 1
    minor: list[Atom] = []
    while done < minor_size:
        if not rest or minor_size % done:
            raise Mismatch(f"no block of {minor_size}")
        last, need = rest.pop(), minor_size // done
        if need % last.size == 0:
            minor.insert(0, last)
            done *= last.size
        elif last.size % need == 0:
            _split_atom(last, need)
            rest += factors((last,))
        else:
            raise Mismatch(f"a factor of size {last.size} against a block of {need}")
    return tuple(rest), tuple(minor)


def _split_atom(atom: Atom, minor_size: int) -> None:
    """Make a leaf or a sum the product of two, the minor one of the size given."""
    atom = find(atom)
    major_size = atom.size // minor_size
    if atom.kind == LEAF:
        atom.become(PRODUCT, ((Atom(major_size), Atom(minor_size)),))
        return
    majors: list[Axis] = []
    minor: Axis | None = None
    for part in atom.parts:
        major, part_minor = split_axis(part, minor_size)
        majors.append(major)
        if minor is None:
            minor = part_minor
        else:
            unify(minor, part_minor)
    atom = find(atom)
    if atom.kind == SUM and minor is not None:
        major_sum = Atom(major_size, SUM, tuple(majors), atom.why)
        atom.become(PRODUCT, ((major_sum, *minor),))


# ---------------------------------------------------------------------------- sums


def segments(axis: Axis) -> list[Axis]:
    """The axis as a concatenation: a leading sum is distributed over the factors behind it."""
    atoms = factors(axis)
    if not atoms or atoms[0].kind != SUM:
        return [axis]
    return [(*segment, *atoms[1:]) for part in atoms[0].parts for segment in segments(part)]


def concatenated(axes: Sequence[Axis]) -> Axis:
    """The direct sum of axes."""
    if len(axes) == 1:
        return axes[0]
    total = sum(axis_size(axis) for axis in axes)
    return (Atom(total, SUM, tuple(axes)),) if total != 1 else ()


def cut_axis(axis: Axis, position: int, why: str = "") -> None:
    """Make `position` a boundary between two segments of the axis.

    Raises:
        Mismatch: it lies inside a block of minor factors.
    """
    parts = factors(axis)
    if position in (0, axis_size(axis)) or not parts:
        return
    first, block = parts[0], axis_size(parts[1:])
    if first.kind == LEAF:
        if position % block:
            raise Mismatch(f"a cut at {position} inside blocks of {block}")
        head = position // block
        first.become(SUM, (fresh(head), fresh(first.size - head)), why)
        return
    start = 0
    for part in first.parts:
        width = axis_size(part) * block
        if start < position < start + width:
            inner, remainder = divmod(position - start, block)
            if remainder:
                raise Mismatch(f"a cut at {position} inside blocks of {block}")
            cut_axis(part, inner, why)
            return
        start += width


def take_range(axis: Axis, start: int, stop: int, why: str = "") -> Axis:
    """The indices `start` to `stop` of an axis as an axis of its own."""
    cut_axis(axis, start, why)
    cut_axis(axis, stop, why)
    taken, position = [], 0
    for segment in segments(axis):
        if start <= position < stop:
            taken.append(segment)
        position += axis_size(segment)
    return concatenated(taken)


def _boundaries(axis: Axis) -> set[int]:
    return set(itertools.accumulate(axis_size(segment) for segment in segments(axis)))


# ---------------------------------------------------------------------------- equality


def unify(one: Axis, other: Axis) -> None:
    """Declare two axes equal, index by index.

    Raises:
        Mismatch: their factors do not nest. What was unified until then stays unified.
    """
    if axis_size(one) != axis_size(other):
        raise Mismatch(f"sizes {axis_size(one)} and {axis_size(other)}")
    while True:
        left, right = factors(one), factors(other)
        while left and right and left[0] is right[0]:
            left, right = left[1:], right[1:]
        if not left and not right:
            return
        one, other = tuple(left), tuple(right)
        a, b = left[0], right[0]
        if a.size == b.size:
            _unify_atoms(a, b)
        elif not _split_larger(a, b):
            if SUM not in (a.kind, b.kind):
                raise Mismatch(f"factors of size {a.size} and {b.size} do not nest")
            _unify_segments(one, other)
            return


def _split_larger(a: Atom, b: Atom) -> bool:
    """Split the larger of two atoms so that its major factor has the smaller one's size."""
    large, small = (a, b) if a.size > b.size else (b, a)
    if large.size % small.size:
        return False
    try:
        _split_atom(large, large.size // small.size)
    except Mismatch:
        return False
    return True


def _unify_segments(one: Axis, other: Axis) -> None:
    while (left := _boundaries(one)) != (right := _boundaries(other)):
        for position in sorted(right - left):
            cut_axis(one, position)
        for position in sorted(left - right):
            cut_axis(other, position)
    for a, b in zip(segments(one), segments(other), strict=True):
        unify(a, b)


def _unify_atoms(a: Atom, b: Atom) -> None:
    a, b = find(a), find(b)
    if a is b:
        return
    if PRODUCT in (a.kind, b.kind):
        unify((a,), (b,))
    elif a.kind == b.kind == SUM:
        _unify_segments((a,), (b,))
        a, b = find(a), find(b)
        if a is not b and a.kind == b.kind == SUM:
            a.why = a.why or b.why
            b.parent = a
    elif a.kind == SUM or (b.kind == LEAF and a.order < b.order):
        b.parent = a
    else:
        a.parent = b


# ---------------------------------------------------------------------------- reading


def _terms(atoms: list[Atom], offset: int) -> list[list[tuple[Atom, Place]]]:
    """The axis as a sum of products of leaves, each leaf with its place."""
    if not atoms:
        return [[]]
    first, rest = atoms[0], atoms[1:]
    block = axis_size(rest)
    if first.kind == LEAF:
        return [[(first, (offset, block)), *term] for term in _terms(rest, offset)]
    out = []
    for part in first.parts:
        out += _terms(factors(part) + rest, offset)
        offset += axis_size(part) * block
    return out


def terms(axis: Axis) -> list[list[tuple[Atom, Place]]]:
    """The axis fully distributed: a list of products of leaves, each leaf with its place."""
    return _terms(factors(axis), 0)


def places(axis: Axis) -> dict[Atom, tuple[Place, ...]]:
    """Where each leaf stands in the axis."""
    out: dict[Atom, dict[Place, None]] = {}
    for term in terms(axis):
        for leaf, place in term:
            out.setdefault(leaf, {})[place] = None
    return {leaf: tuple(found) for leaf, found in out.items()}


def labels(axis: Axis) -> list[tuple[Atom, Place, np.ndarray]]:
    """For each leaf and place: the leaf's index at every position of the axis, -1 elsewhere."""

    def walk(atoms: list[Atom]) -> list[tuple[Atom, Place, np.ndarray]]:
        if not atoms:
            return []
        first, rest = atoms[0], atoms[1:]
        block = axis_size(rest)
        if first.kind == LEAF:
            own = (first, (0, block), np.repeat(np.arange(first.size), block))
            return [own, *((a, p, np.tile(index, first.size)) for a, p, index in walk(rest))]
        out, start = [], 0
        for part in first.parts:
            for atom, (offset, stride), index in walk(factors(part) + rest):
                full = np.full(first.size * block, -1)
                full[start : start + len(index)] = index
                out.append((atom, (start + offset, stride), full))
            start += axis_size(part) * block
        return out

    return walk(factors(axis))


def splitting_lines(axis: Axis) -> list[str]:
    """The lines whose slices split the axis into segments."""
    out: list[str] = []
    for atom in factors(axis):
        if atom.kind == SUM:
            out += [atom.why] if atom.why else []
            for part in atom.parts:
                out += splitting_lines(part)
    return list(dict.fromkeys(out))
