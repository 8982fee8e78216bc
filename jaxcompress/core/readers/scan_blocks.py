"""`scan_blocks(fn)`: the walk through a function that runs its layers by one top-level `scan`.

The jaxpr falls into what stands before the scan, its body, and what stands after it: the `embed`,
`block` and `head` of a `Blocks`, read off a stranger's function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jaxcompress.core.model import Blocks
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers import unofficial
from jaxcompress.core.readers.tracing import Tracer, is_array, unwrap_static

_JITTED = type(jax.jit(lambda: None))  # other wrappers, such as Linen's of methods, do something


def scan_blocks(fn: Callable[..., Any], params: Any, *inputs: Any) -> Blocks | None:
    """The blocks of a function whose layers run by one scan over stacked parameters.

    Args:
      fn: `fn(params, *inputs)`.
      params: its parameters, or their shapes.
      inputs: its inputs, or their shapes; the walk takes any others that `fn` takes.

    Returns:
      A walk that computes what `fn` does; None where there is no such scan: none at the top level,
      several over parameters, one that runs backwards, one whose stacked outputs are used, or one
      over parameters that are not just everything below one path.
    """
    inner = fn.__wrapped__ if isinstance(fn, _JITTED) else fn  # type: ignore[attr-defined]
    programs = _Programs(inner)
    found = programs(params, inputs)
    if found is None:
        return None

    def embed(params: Any, *inputs: Any) -> _Hidden:
        program = programs(params, inputs)
        assert program is not None, "the function has no scan at these shapes"
        return program.begin(params, inputs)

    def block(block_params: Any, hidden: _Hidden) -> _Hidden:
        return hidden.program.step(block_params, hidden)

    def head(params: Any, hidden: _Hidden) -> Any:
        return hidden.program.end(params, hidden)

    return Blocks(embed, block, head, where=found.where)


@jax.tree_util.register_pytree_node_class
@dataclass
class _Hidden:
    """What lies between two steps of the scan.

    Attributes:
      index: int32 `[]`, steps that were done.
      carry: of the scan.
      consts: of the scan.
      scanned: what it scans over besides the parameters, whole.
      rest: what stands before the scan and is used after it.
      program: the trace of the function that this belongs to; static.
    """

    index: Any
    carry: list[Any]
    consts: list[Any]
    scanned: list[Any]
    rest: list[Any]
    program: _Program

    def tree_flatten(self) -> tuple[tuple[Any, ...], _Program]:
        """Children: all but the program."""
        return (self.index, self.carry, self.consts, self.scanned, self.rest), self.program

    @classmethod
    def tree_unflatten(cls, program: _Program, children: Any) -> _Hidden:
        """Inverse of `tree_flatten`."""
        index, carry, consts, scanned, rest = children
        return cls(index, carry, consts, scanned, rest, program)


class _Programs:
    """Traces of one function, one for each shape of its arguments."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.tracer = Tracer(fn, {"function": 0})
        self.made: dict[Any, _Program | None] = {}

    def __call__(self, params: Any, inputs: tuple[Any, ...]) -> _Program | None:
        traced = self.tracer((params, *inputs), {})
        shapes = tuple((x.shape, str(x.dtype)) for x in traced.values)
        key = shapes, jax.tree.structure((params, inputs))
        if key not in self.made:
            self.made[key] = _Program.of(traced.closed, traced.out_tree, params)
        return self.made[key]


@dataclass(frozen=True, eq=False)
class _Program:
    """A jaxpr around its scan.

    Attributes:
      closed: the whole.
      at: the scan's place among its equations.
      out_tree: of the function.
      where: the path of the stacked parameters.
      stacked: for each operand that is scanned over: the parameter that it is, by its place among
        those below `where`, or None.
      rest: variables from before the scan that are used after it.
      parameters: how many of the inputs are parameters.
    """

    closed: ClosedJaxpr
    at: int
    out_tree: Any
    where: str
    stacked: tuple[int | None, ...]
    rest: tuple[Any, ...]
    parameters: int

    @classmethod
    def of(cls, closed: ClosedJaxpr, out_tree: Any, params: Any) -> _Program | None:
        """The program of a trace; None where it cannot be walked."""
        jaxpr = closed.jaxpr
        paths = [path for path, leaf in leaves_with_paths(params) if is_array(leaf)]
        names = dict(zip(jaxpr.invars, paths))
        scans = [
            i
            for i, eqn in enumerate(jaxpr.eqns)
            if eqn.primitive.name == "scan" and any(_known(x, names) for x in _operands(eqn)[2])
        ]
        if len(scans) != 1:
            return None
        eqn = jaxpr.eqns[scans[0]]
        over = [_known(x, names) for x in _operands(eqn)[2]]
        where = _common([path for path in over if path])
        below = [path for path in paths if where and path.startswith(where + "/")]
        used = _used(jaxpr.eqns[scans[0] + 1 :], jaxpr.outvars)
        carries = len(_operands(eqn)[1])
        if (
            eqn.params["reverse"]
            or sorted(below) != sorted(path for path in over if path)
            or used & set(eqn.outvars[carries:])
        ):
            return None
        before = jaxpr.eqns[: scans[0]]
        ready = {*jaxpr.invars[len(paths) :], *_outputs(before)}
        return cls(
            closed,
            scans[0],
            out_tree,
            where,
            tuple(below.index(path) if path else None for path in over),
            tuple(
                v for v in (*jaxpr.invars, *_outputs(jaxpr.eqns[: scans[0]])) if v in used & ready
            ),
            len(paths),
        )

    @property
    def scan(self) -> Any:
        """The equation of the scan."""
        return self.closed.jaxpr.eqns[self.at]

    def begin(self, params: Any, inputs: tuple[Any, ...]) -> _Hidden:
        """Everything before the scan."""
        jaxpr = self.closed.jaxpr
        consts, carry, over = _operands(self.scan)
        beside = [x for x, place in zip(over, self.stacked, strict=True) if place is None]
        groups = (carry, consts, beside, self.rest)
        wanted = [x for group in groups for x in group]
        given = [x for x in jax.tree.leaves((params, inputs)) if is_array(x)]
        run = unofficial.excerpt(self.closed, jaxpr.invars, jaxpr.eqns[: self.at], wanted)
        values = jaxpr_as_fun(run)(*given)
        parts, begin = [], 0
        for group in groups:
            parts.append(values[begin : begin + len(group)])
            begin += len(group)
        carried, constant, whole, rest = parts
        return _Hidden(jnp.int32(0), carried, constant, whole, rest, self)

    def step(self, block_params: Any, hidden: _Hidden) -> _Hidden:
        """One step of the scan."""
        leaves = [x for x in jax.tree.leaves(block_params) if is_array(x)]
        beside = iter(hidden.scanned)
        over = [next(beside)[hidden.index] if i is None else leaves[i] for i in self.stacked]
        out = jaxpr_as_fun(self.scan.params["jaxpr"])(*hidden.consts, *hidden.carry, *over)
        carry = list(out[: len(hidden.carry)])
        return _Hidden(hidden.index + 1, carry, hidden.consts, hidden.scanned, hidden.rest, self)

    def end(self, params: Any, hidden: _Hidden) -> Any:
        """Everything after the scan."""
        jaxpr = self.closed.jaxpr
        carried = self.scan.outvars[: len(hidden.carry)]
        invars = [*jaxpr.invars[: self.parameters], *carried, *self.rest]
        given = [x for x in jax.tree.leaves(params) if is_array(x)]
        run = unofficial.excerpt(self.closed, invars, jaxpr.eqns[self.at + 1 :], jaxpr.outvars)
        out = jaxpr_as_fun(run)(*given, *hidden.carry, *hidden.rest)
        return unwrap_static(jax.tree.unflatten(self.out_tree, out))


def _operands(eqn: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Constants, initial carry and scanned operands of a scan."""
    consts, carries = unofficial.scan_counts(eqn.params)
    given = list(eqn.invars)
    return given[:consts], given[consts : consts + carries], given[consts + carries :]


def _known(atom: Any, names: dict[Any, str]) -> str | None:
    return None if unofficial.literal(atom) else names.get(atom)


def _outputs(eqns: Sequence[Any]) -> list[Any]:
    return [v for eqn in eqns for v in eqn.outvars]


def _used(eqns: Sequence[Any], outvars: Sequence[Any]) -> set[Any]:
    atoms = [x for eqn in eqns for x in eqn.invars] + list(outvars)
    return {x for x in atoms if not unofficial.literal(x)}


def _common(paths: Sequence[str]) -> str:
    """The longest path that is above all of these."""
    parts = [path.split("/")[:-1] for path in paths]
    shared = []
    for level in zip(*parts):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return "/".join(shared)
