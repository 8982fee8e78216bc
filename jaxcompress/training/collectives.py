"""Collectives of a compiled program: how many there are, and how often a step runs them.

Read off the text of the optimized HLO. A collective inside a loop, such as the scan over a model's
layers, is one instruction that runs once per trip.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_REFERENCE = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
_CHANNEL = re.compile(r"channel_id=\d+")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
# What passes its operand on as it is: a loop's counter may come through some of these.
_COPIES = ("copy", "copy-start", "copy-done", "bitcast", "convert", "optimization-barrier")


@dataclass(frozen=True)
class Count:
    """Collectives of one kind.

    Attributes:
      instructions: in the program.
      executed: in one run of it, those in loops once per trip.
    """

    instructions: int = 0
    executed: int = 0


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    operands: tuple[str, ...]
    text: str  # everything after the opcode
    is_root: bool


@dataclass
class _Program:
    computations: dict[str, dict[str, _Instruction]] = field(default_factory=dict)
    fusions: set[str] = field(default_factory=set)  # names of the computations of fusions
    entry: str = ""


def count_collectives(hlo: str) -> dict[str, Count]:
    """Collectives by kind, each of `KINDS`.

    Asynchronous ones count once: at their start, or, where a TPU runs one in pieces inside of
    several fusions, for all of these. An all-reduce of which every device keeps its own slice only,
    as TPUs run a reduce-scatter, is a reduce-scatter.

    Args:
      hlo: text of an optimized HLO module.

    Raises:
      ValueError: a loop around a collective whose number of trips cannot be told.
    """
    program = _parse(hlo)
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    _walk(program, program.entry, 1, found, set())
    return {kind: Count(len(runs), sum(runs)) for kind, runs in found.items()}


def _parse(hlo: str) -> _Program:
    program = _Program()
    current: dict[str, _Instruction] = {}
    for line in hlo.splitlines():
        header = _HEADER.match(line)
        if header:
            current = program.computations[header[2]] = {}
            if header[1]:
                program.entry = header[2]
            continue
        name = _NAME.match(line)
        if not name:
            continue
        rest = line[_end_of_type(line, name.end()) :]
        opcode = _OPCODE.match(rest)
        if opcode:
            text = rest[opcode.end() :]
            operands = text[: _closing(text, 1)]
            current[name[2]] = _Instruction(
                opcode[1], tuple(_REFERENCE.findall(operands)), text, bool(name[1])
            )
            if opcode[1] == "fusion":
                program.fusions.update(_called(current[name[2]]))
    return program


def _end_of_type(line: str, start: int) -> int:
    """Where the type of an instruction ends: a tuple in parentheses, or one word."""
    if line[start] == "(":
        return start + 1 + _closing(line[start + 1 :], 1)
    return line.index(" ", start)


def _closing(text: str, depth: int) -> int:
    """Index behind the parenthesis that closes the `depth` ones open at the start of `text`."""
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return i + 1
    return len(text)


def _walk(
    program: _Program, name: str, times: int, found: dict[str, list[int]], fused: set[str]
) -> None:
    """Add the runs of each collective of a computation that runs `times` times to `found`.

    `fused` are the channels of collectives that were met inside of a fusion.
    """
    for instruction in program.computations[name].values():
        kind = instruction.opcode.removesuffix("-start")
        channel = _CHANNEL.search(instruction.text)
        if kind in KINDS and not (channel and channel[0] in fused):
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            found[kind].append(times)
            if channel and name in program.fusions:
                fused.add(channel[0])
        if instruction.opcode == "while":
            condition, body = (_attribute(instruction, key) for key in ("condition", "body"))
            if _has_collectives(program, body):
                trips = _trip_count(program, name, instruction, condition, body)
                _walk(program, body, times * trips, found, fused)
        elif instruction.opcode not in ("async-update", "async-done"):
            for called in _called(instruction):
                _walk(program, called, times, found, fused)


def _has_collectives(program: _Program, name: str) -> bool:
    return any(
        i.opcode.removesuffix("-start") in KINDS
        or (i.opcode == "while" and _has_collectives(program, _attribute(i, "body")))
        or any(_has_collectives(program, called) for called in _called(i))
        for i in program.computations[name].values()
    )


def _called(instruction: _Instruction) -> list[str]:
    groups = _CALLED.findall(instruction.text)
    return [name for group in groups for name in _REFERENCE.findall(group)]


def _attribute(instruction: _Instruction, key: str) -> str:
    found = re.search(rf"{key}=%?([\w.\-]+)", instruction.text)
    if found is None:
        raise ValueError(f"HLO: a {instruction.opcode} without {key}")
    return found[1]


def _trip_count(
    program: _Program, where: str, loop: _Instruction, condition: str, body: str
) -> int:
    """Trips of a loop that counts from a constant in equal steps while below a constant."""
    known = _TRIPS.search(loop.text)
    if known:
        return int(known[1])
    test = next(i for i in program.computations[condition].values() if i.is_root)
    inside = program.computations[condition]
    limits = [_constant(inside, operand) for operand in test.operands]
    counters = [_element(inside, operand) for operand in test.operands]
    if test.opcode == "compare" and "direction=LT" in test.text and None in limits:
        limit, index = limits[1], counters[0]
        first = _constant(program.computations[where], _tuple_item(program, where, loop, index))
        step = _step(program.computations[body], index)
        if limit is not None and first is not None and step:
            return -(-(limit - first) // step)
    raise ValueError(f"HLO: the number of trips of the loop over {body} cannot be told")


def _constant(computation: dict[str, _Instruction], name: str | None) -> int | None:
    instruction = computation.get(name or "")
    while instruction is not None and instruction.opcode in _COPIES:
        instruction = computation.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    value = re.match(r"-?\d+", instruction.text)
    return int(value[0]) if value else None


def _element(computation: dict[str, _Instruction], name: str) -> int | None:
    """Which element of the loop's state this is."""
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in _COPIES:
        instruction = computation.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    index = re.search(r"index=(\d+)", instruction.text)
    return int(index[1]) if index else None


def _tuple_item(program: _Program, where: str, loop: _Instruction, index: int | None) -> str | None:
    made = program.computations[where].get(loop.operands[0])
    if made is None or made.opcode != "tuple" or index is None:
        return None
    return made.operands[index]


def _step(body: dict[str, _Instruction], index: int | None) -> int | None:
    """By how much a trip raises an element of the loop's state."""
    root = next(i for i in body.values() if i.is_root)
    if root.opcode != "tuple" or index is None:
        return None
    raised = body.get(root.operands[index])
    while raised is not None and raised.opcode in _COPIES:
        raised = body.get(raised.operands[0])
    if raised is None or raised.opcode != "add":
        return None
    steps = [_constant(body, operand) for operand in raised.operands]
    return next((step for step in steps if step is not None), None)
