"""What each group of coupled axes is for, told by the function's own program.

No name of a layer is read. Which products sum over a group, which make it, which have it as a
batch axis, whether the other operand is a weight or depends on the inputs, and whether a residual
addition carries it: that tells attention heads from neurons, filters and the residual stream, in a
network that nobody here has seen before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxcompress.core.errors import InputError
from jaxcompress.core.readers.coupling import Group, Groups
from jaxcompress.core.readers.coupling.atoms import Atom, Axis
from jaxcompress.core.readers.coupling.program import PARAMETER, Program, Record, Value
from jaxcompress.core.readers.coupling.semantics import PRODUCTS

Kind = Literal[
    "heads", "queries", "channels", "neurons", "filters", "units", "width", "experts", "embedding",
    "other",
]  # fmt: skip

KINDS: dict[Kind, str] = {
    "heads": "a batch axis of the product of queries and keys: heads, or groups that share a key",
    "queries": "query heads that share one key and value head",
    "channels": "inside a head: what queries and keys are compared by, or what values are made of",
    "neurons": "made and consumed by weights, inside a block",
    "filters": "made by convolutions",
    "units": "a recurrent state",
    "width": "the residual stream",
    "experts": "a batch axis of a product with a weight",
    "embedding": "looked up in a table, and consumed by weights",
    "other": "none of these",
}

# Of a value, the operations that only pick, place or rename its entries.
_STRUCTURAL = frozenset(
    [
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "name",
        "optimization_barrier",
        "pad",
        "reshape",
        "reduce_window_max",
        "reduce_window_sum",
        "sharding_constraint",
        "slice",
        "squeeze",
        "transpose",
    ]
)


@dataclass(frozen=True, eq=False)
class Role:
    """A group, and what it is for.

    Attributes:
      group: the coupled axes.
      kind: one of `KINDS`.
      residual: a residual addition carries it.
    """

    group: Group
    kind: Kind
    residual: bool


def roles(groups: Groups) -> list[Role]:
    """The groups in order, each with its role; some of them cannot be cut."""
    facts = _Facts(groups.program)
    return _query_heads([_role(facts, group) for group in groups if group.atom is not None])


def of_kind(
    found: Iterable[Role], kind: Kind, *, residual: bool | None = None, name: str = "the model"
) -> list[Role]:
    """The roles of one kind whose groups can be cut.

    Args:
      found: what `roles` gives.
      kind: which.
      residual: only those that a residual addition carries, or only the others; None: both.
      name: of the model, for messages.

    Raises:
      InputError: there is none, or none that can be cut, with the reason.
    """
    every = list(found)
    chosen = [r for r in every if r.kind == kind and residual in (None, r.residual)]
    free = [r for r in chosen if r.group.cuttable]
    if not free and chosen:
        raise InputError(f"{kind}: {name} cannot be cut there: {chosen[0].group.reasons[0]}")
    if not free:
        has = ", ".join(dict.fromkeys(r.kind for r in every if r.group.cuttable))
        raise InputError(f"{kind}: {name} has none ({KINDS[kind]}); it has {has or 'nothing'}")
    return free


def per_step(group: Group) -> bool:
    """Whether each step of a scan may keep other indices of the group."""
    return bool(group.steps) and not group.positional


# ---------------------------------------------------------------------------- reading a program


@dataclass
class _Use:
    """How one leaf stands in one product."""

    record: Record
    operand: int
    axis: int
    how: str  # "contracted", "batched" or "free"
    active: tuple[bool, bool]  # which operands depend on the inputs

    @property
    def in_weight(self) -> bool:
        """It stands in the weight, or constant, that multiplies what depends on the inputs."""
        return self.active[0] != self.active[1] and not self.active[self.operand]


@dataclass
class _Facts:
    """What the records of a program say about its values and leaves."""

    program: Program
    active: set[Value] = field(default_factory=set)  # depends on the inputs
    sources: dict[Value, frozenset[str]] = field(default_factory=dict)  # weights a value is made of
    sliced: dict[Value, frozenset[int]] = field(default_factory=dict)  # scans that step over it
    uses: dict[Atom, list[_Use]] = field(default_factory=dict)
    skipped: set[Atom] = field(default_factory=set)  # carried by a residual addition
    looked_up: set[Atom] = field(default_factory=set)  # in a window of a gather from a weight

    def __post_init__(self) -> None:
        self.active = active_values(self.program)
        for value in self.program.parameters:
            self.sources[value] = frozenset([value.name])
        for record in self.program.records:
            self._trace_weights(record)
            if record.primitive in PRODUCTS:
                self._note_product(record)
            elif record.primitive == "gather" and record.operands[0] not in self.active:
                for axis in record.operands[0].axes:
                    self.looked_up.update(self.program.places(axis))
        for axis in _residual_axes(self.program, self.active):
            self.skipped.update(self.program.places(axis))

    def _trace_weights(self, record: Record) -> None:
        if all(value in self.active for value in record.results):
            return
        none: frozenset[str] = frozenset()
        sources = none.union(*(self.sources.get(v, none) for v in record.operands))
        sliced = frozenset[int]().union(*(self.sliced.get(v, ()) for v in record.operands))
        if record.primitive == "scan_slice":
            sliced |= {record.scans[-1]}
        for value in record.results:
            if value.kind != PARAMETER:
                self.sources[value], self.sliced[value] = sources, sliced

    def _note_product(self, record: Record) -> None:
        contracted = {(p.operand, p.axis) for p in record.contracted}
        contracted |= {(p.other, p.other_axis) for p in record.contracted}
        batched = {(p.operand, p.axis) for p in record.batched}
        batched |= {(p.other, p.other_axis) for p in record.batched}
        active = (record.operands[0] in self.active, record.operands[1] in self.active)
        for i, value in enumerate(record.operands[:2]):
            for k, axis in enumerate(value.axes):
                at = (i, k)
                how = "contracted" if at in contracted else "batched" if at in batched else "free"
                for atom in self.program.places(axis):
                    self.uses.setdefault(atom, []).append(_Use(record, i, k, how, active))

    def weights(self, use: _Use) -> frozenset[str]:
        """The parameters in which it stands, where they multiply what depends on the inputs."""
        value = use.record.operands[use.operand]
        return self.sources.get(value, frozenset()) if use.in_weight else frozenset()

    def recurrent(self, uses: Sequence[_Use]) -> bool:
        """A weight takes the axis in and gives it out, step after step."""
        square: dict[frozenset[str], int] = {}
        for made in (use for use in uses if use.how == "free" and self.weights(use)):
            weight, scans = made.record.operands[made.operand], made.record.scans
            if not any(u.record is made.record and u.how == "contracted" for u in uses):
                continue
            if scans and scans[-1] not in self.sliced.get(weight, ()):
                return True
            square[self.weights(made)] = square.get(self.weights(made), 0) + 1
        return any(count > 1 for count in square.values())  # unrolled over time


def active_values(program: Program) -> set[Value]:
    """The values that depend on the inputs; through loops too."""
    active = set(program.inputs)
    while True:
        before = len(active)
        for record in program.records:
            if not active.isdisjoint(record.operands):
                active.update(record.results)
                if record.primitive == "carry_out":  # the body reads what the last step left
                    active.add(record.operands[0])
        if len(active) == before:
            return active


def _residual_axes(program: Program, active: set[Value]) -> Iterable[Axis]:
    """Axes of the additions `x + f(x)` whose f multiplies by something."""
    made_by = {value: record for record in program.records for value in record.results}

    def root(value: Value) -> Value:
        while (record := made_by.get(value)) and record.primitive in _STRUCTURAL:
            inputs = [v for v in record.operands if v in active]
            if len(inputs) != 1:
                break
            value = inputs[0]
        return value

    additions = [
        record
        for record in program.records
        if record.primitive in ("add", "add_any", "sub")
        and all(operand in active for operand in record.operands)
    ]
    number = {root(v): 1 << i for i, v in enumerate(v for r in additions for v in r.operands)}
    # Bits of the roots that a value is made of: without a product in between, and with one.
    plain: dict[Value, int] = {}
    multiplied: dict[Value, int] = {}
    for value in active:
        plain[value] = number.get(value, 0)
    for record in program.records:
        near = far = 0
        for value in record.operands:
            near |= plain.get(value, 0)
            far |= multiplied.get(value, 0)
        if record.primitive in PRODUCTS:
            near, far = 0, near | far
        for value in record.results:
            if value in active:
                plain[value] = plain.get(value, 0) | near
                multiplied[value] = multiplied.get(value, 0) | far
    for record in additions:
        a, b = record.operands
        for x, y in ((a, b), (b, a)):
            if number[root(x)] & multiplied.get(y, 0):
                yield from record.results[0].axes
                # Where a shortcut was padded or strided on its way, its own axes are carried too.
                yield from root(x).axes


# ---------------------------------------------------------------------------- from facts to a role


def _role(facts: _Facts, group: Group) -> Role:
    assert group.atom is not None
    residual = group.atom in facts.skipped
    return Role(group, _kind(facts, group, facts.uses.get(group.atom, []), residual), residual)


def _kind(facts: _Facts, group: Group, uses: Sequence[_Use], residual: bool) -> Kind:
    made = [use for use in uses if use.how == "free" and facts.weights(use)]
    by_convolution = [u for u in made if u.record.primitive == "conv_general_dilated"]
    attention = [use for use in uses if all(use.active)]
    how = {use.how for use in attention}
    if facts.recurrent(uses):
        return "units"
    if residual:
        return "filters" if made and len(by_convolution) == len(made) else "width"
    if "batched" in how:
        return "heads"
    if any(use.how == "batched" and facts.weights(use) for use in uses):
        return "experts"
    if "contracted" in how:
        return "channels"
    if how:  # the rows of queries pass through both products, those of values through one
        return "queries" if len({id(use.record) for use in attention}) > 1 else "channels"
    if by_convolution:
        return "filters"
    if made:
        return "neurons"
    return "embedding" if group.atom in facts.looked_up else "other"


def _query_heads(found: list[Role]) -> list[Role]:
    """Of two head axes that make one axis of a weight, the one with fewer weights are queries."""

    def corrected(role: Role) -> Kind:
        if role.kind not in ("heads", "queries"):
            return role.kind
        mine = {(m.path, m.axis) for m in role.group.members}
        for other in found:
            if other is role or other.kind not in ("heads", "queries"):
                continue
            theirs = {(m.path, m.axis) for m in other.group.members}
            if mine & theirs:
                return "queries" if len(mine) < len(theirs) else "heads"
        return "heads"

    return [Role(r.group, corrected(r), r.residual) for r in found]
