"""`parts(fn, ...)`: a function cut between the groups of weights that it reads, in their order.

Each part goes from where one group is read to where the next one is. Run one after the other they
do what the function does, once; whoever changes the weights of a part before its run gives all
later ones values that the changed weights made, at no further cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers import unofficial
from jaxcompress.core.readers.tracing import Tracer, is_array, unwrap_static
from jaxcompress.core.readers.unofficial import Body


@dataclass(frozen=True)
class Part:
    """One part of a function.

    Attributes:
      groups: places of the groups that it reads and that no later part reads.
      function: `function(params, values)`, all of the function's parameters and what the part
        before gave, the first one the function's inputs; gives the values for the next part, the
        last one the function's outputs.
    """

    groups: tuple[int, ...]
    function: Callable[[Any, Any], Any]


def parts(
    fn: Callable[[Any, Any], Any], params: Any, inputs: Any, groups: Sequence[Sequence[str]]
) -> list[Part]:
    """A function's parts, one for each group of weights where the program allows it.

    Groups stay together where one is read again after a later one, and where one loop or call reads
    several (but `jit` and `jax.checkpoint` are looked into). What follows from parameters alone is
    computed in every part that needs it; all else once.

    Args:
      fn: `fn(params, inputs)`, pytrees both.
      params: its parameters, or their shapes; the parts take compressed ones too, through `lift`.
      inputs: its inputs, or their shapes; the parts take none of other shapes.
      groups: paths of parameters, in the order in which the program reads them.
    """
    traced = Tracer(fn, {"function": 0})((params, inputs), {})
    paths = [path for path, leaf in leaves_with_paths(params) if is_array(leaf)]
    group_of = {path: i for i, group in enumerate(groups) for path in group}
    owned = [group_of.get(path) for path in paths]
    opened = _opened(traced.closed, [group is not None for group in owned])
    return _Program(opened, traced.out_tree, owned, len(groups)).parts()


class _Program:
    """A flat program, and the stage of each of its values: the last group that it depends on.

    Attributes:
      moving: stages of the values that depend on the inputs.
      stages: of the equations; None: of parameters alone.
      until: for each group, the last stage in which something reads it.
    """

    def __init__(
        self, closed: ClosedJaxpr, out_tree: Any, owned: Sequence[int | None], groups: int
    ) -> None:
        self.closed, self.out_tree = closed, out_tree
        given = closed.jaxpr.invars
        self.params, self.inputs = given[: len(owned)], given[len(owned) :]
        self.moving = dict.fromkeys(self.inputs, 0)
        self.until = list(range(groups))
        self.stages: list[int | None] = []
        still = {v: {group} for v, group in zip(self.params, owned) if group is not None}
        for eqn in closed.jaxpr.eqns:
            operands = _variables(eqn.invars)
            read = {group for x in operands for group in still.get(x, ())}
            moving = [self.moving[x] for x in operands if x in self.moving]
            stage = max(*moving, *read, 0) if moving else None
            self.stages.append(stage)
            if stage is None:
                still |= dict.fromkeys(eqn.outvars, read)
                continue
            for group in read:
                self.until[group] = max(self.until[group], stage)
            self.moving |= dict.fromkeys(eqn.outvars, stage)

    def parts(self) -> list[Part]:
        """The function of each run of stages that no group reaches out of."""
        last = len(self.until) - 1
        ends = [s for s in range(last) if max(self.until[: s + 1]) <= s]
        values, made = self.inputs, []
        for before, end in pairwise([-1, *ends, last]):
            wanted = self.closed.jaxpr.outvars if end == last else self._needed_after(end)
            function = self._part(range(before + 1, end + 1), values, wanted, end == last)
            made.append(Part(tuple(range(before + 1, end + 1)), function))
            values = wanted
        return made

    def _needed_after(self, end: int) -> list[Any]:
        eqns = zip(self.closed.jaxpr.eqns, self.stages)
        read = [x for eqn, stage in eqns if stage is not None and stage > end for x in eqn.invars]
        used = set(_variables([*read, *self.closed.jaxpr.outvars]))
        return [v for v, stage in self.moving.items() if stage <= end and v in used]

    def _part(
        self, stages: range, values: Sequence[Any], wanted: Sequence[Any], last: bool
    ) -> Callable[[Any, Any], Any]:
        eqns = [
            eqn
            for eqn, stage in zip(self.closed.jaxpr.eqns, self.stages)
            if stage is None or stage in stages
        ]
        run = jaxpr_as_fun(unofficial.excerpt(self.closed, [*self.params, *values], eqns, wanted))

        def function(params: Any, values: Any) -> Any:
            out = run(*[x for x in jax.tree.leaves((params, values)) if is_array(x)])
            return unwrap_static(jax.tree.unflatten(self.out_tree, out)) if last else list(out)

        return function


def _opened(closed: ClosedJaxpr, watched: Sequence[bool]) -> ClosedJaxpr:
    """The same program with the calls written out that a watched input goes into."""

    def run(body: Body, values: Sequence[Any], watched: Sequence[bool]) -> Any:
        known = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
        known |= zip(body.jaxpr.invars, values, strict=True)
        seen = {v for v, here in zip(body.jaxpr.invars, watched) if here}

        def read(atom: Any) -> Any:
            return atom.val if unofficial.literal(atom) else known[atom]

        for eqn in body.jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            here = [not unofficial.literal(atom) and atom in seen for atom in eqn.invars]
            inner = unofficial.body_of_call(eqn) if any(here) else None
            with unofficial.context_of(eqn):
                outputs = (
                    unofficial.bind_as_traced(eqn, operands)
                    if inner is None
                    else run(inner, operands, here)
                )
            known |= zip(eqn.outvars, outputs, strict=True)
            if any(here):
                seen.update(eqn.outvars)
        return [read(atom) for atom in body.jaxpr.outvars]

    given = [*watched, *[False] * (len(closed.jaxpr.invars) - len(watched))]
    return jax.make_jaxpr(lambda *values: run(Body.of(closed), values, given))(
        *(unofficial.aval(v) for v in closed.jaxpr.invars)
    )


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [x for x in atoms if not unofficial.literal(x)]
