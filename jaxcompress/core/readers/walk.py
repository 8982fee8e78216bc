"""The evaluator under `lift` and `capture`: one walk over a traced function.

An equation that meets no compressed value is bound exactly as it was traced. One that does goes to
a rule: products and views are the arrays' own; control flow and calls are rebuilt through public
JAX functions, which compressed arrays cross as the pytrees that they are. Anything else gets the
dense array, and that is recorded with the source line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn

from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.readers import unofficial
from jaxcompress.core.readers.observations import Observations, Recorder, Settings
from jaxcompress.core.readers.unofficial import Body

Origins = Sequence[int | None] | None


class Materialized(NamedTuple):
    """One place where a compressed array had to be made dense.

    Attributes:
      primitive: name of the JAX primitive that met it.
      shape: dense shape.
      line: the user's source line.
      reason: why, in words.
      count: how many times that line did so while being traced.
    """

    primitive: str
    shape: tuple[int, ...]
    line: str
    reason: str
    count: int = 1


# A rule: (frame, equation, operands, origins of the operands) -> outputs.
Rule = Callable[["Frame", JaxprEqn, list[Any], list[int | None]], list[Any]]
# A view or product: (equation, operands) -> outputs, or None where the result must be dense.
ArrayRule = Callable[[JaxprEqn, list[Any]], list[Any] | None]


class Bounded(dict[Any, Any]):
    """A cache that forgets its oldest entry beyond `limit`."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        if len(self) > self.limit:
            del self[next(iter(self))]


@dataclass
class Walk:
    """What all frames of one lifted function share.

    Attributes:
      rules: rules for control flow and calls, by primitive.
      array_rules: views and products, by primitive.
      settings: what `capture` observes; None: nothing.
      records: the places that went dense, counted.
      bodies: lifted bodies of nested jits; the jaxpr is held, because ids are reused.
      traces: how many bodies and functions were traced (for tests of the caches).
    """

    rules: dict[str, Rule]
    array_rules: dict[str, ArrayRule]
    settings: Settings | None = None
    records: Counter[Materialized] = field(default_factory=Counter)
    bodies: Bounded = field(default_factory=lambda: Bounded(4096))
    traces: Counter[str] = field(default_factory=Counter)

    def densify(
        self, value: Any, eqn: JaxprEqn, reason: str = "no rule keeps it compressed"
    ) -> Any:
        """Dense `value`; recorded, if it was compressed."""
        if not is_compressed(value):
            return value
        line = unofficial.source_line(eqn)
        self.records[Materialized(eqn.primitive.name, value.shape, line, reason)] += 1
        return value.dense()

    def materialized(self) -> list[Materialized]:
        """The records, with their counts."""
        return [record._replace(count=count) for record, count in self.records.items()]

    def run(
        self, body: Body, args: Sequence[Any], origins: Origins, mask: Any, defer: bool = False
    ) -> tuple[list[Any], Observations]:
        """Evaluate a body in a frame of its own."""
        self.traces["body"] += 1
        frame = Frame(self, mask, defer)
        return frame.evaluate(body, list(args), origins), frame.observations

    def jitted(
        self, body: Body, name: str, origins: Origins, hoisted: int = 0, **options: Any
    ) -> Any:
        """The lifted body as one jitted function `(mask, *args) -> (outputs, observations)`.

        The first `hoisted` of the arguments are the constants of the body's jaxpr.
        """
        key = (id(body.jaxpr), tuple(origins or ()), hoisted, tuple(sorted(options.items())))
        if key not in self.bodies:

            def lifted(mask: Any, *args: Any) -> tuple[list[Any], Observations]:
                whole = Body(body.jaxpr, args[:hoisted]) if hoisted else body
                return self.run(whole, args[hoisted:], origins, mask, defer=True)

            lifted.__name__ = lifted.__qualname__ = name
            compiler_options = dict(options.pop("compiler_options", ())) or None
            jitted = jax.jit(lifted, compiler_options=compiler_options, **options)
            self.bodies[key] = (body, jitted)
        return self.bodies[key][1]


class Frame:
    """One body being evaluated.

    Origins say which argument of the body a value is a view of; only `capture` has any. They are
    positions in the body, never names: bodies of equal layers stay one body.
    """

    def __init__(self, walk: Walk, mask: Any = None, defer: bool = False) -> None:
        self.walk = walk
        self.mask = mask
        self.recorder = Recorder(walk.settings, mask, defer) if walk.settings else None

    @property
    def observations(self) -> Observations:
        """What was observed so far."""
        return self.recorder.observations if self.recorder else Observations()

    def evaluate(self, body: Body, args: list[Any], origins: Origins) -> list[Any]:
        """Outputs of `body` on `args`, any of them compressed."""
        jaxpr = body.jaxpr
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, body.consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))
        origin: dict[Any, int] = {}
        if self.recorder and origins is not None:
            origin = {v: o for v, o in zip(jaxpr.invars, origins, strict=True) if o is not None}
            self.recorder.enter(args, origins)

        def read(atom: Any) -> Any:
            return atom.val if unofficial.literal(atom) else values[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            sources = [None if unofficial.literal(a) else origin.get(a) for a in eqn.invars]
            with unofficial.context_of(eqn):
                outputs = self.step(eqn, operands, sources)
            values.update(zip(eqn.outvars, outputs, strict=True))
            if sources and sources[0] is not None and self.is_view(eqn):
                origin[eqn.outvars[0]] = sources[0]
        return [read(atom) for atom in jaxpr.outvars]

    def is_view(self, eqn: JaxprEqn) -> bool:
        """Whether the (first) output of `eqn` is a view of its first operand."""
        name = eqn.primitive.name
        return name in unofficial.BUFFERWISE or (
            name in self.walk.array_rules and name not in ("dot_general", "conv_general_dilated")
        )

    def step(self, eqn: JaxprEqn, operands: list[Any], origins: list[int | None]) -> list[Any]:
        """Outputs of one equation."""
        name, walk = eqn.primitive.name, self.walk
        compressed = any(map(is_compressed, operands))
        observed = any(origin is not None for origin in origins)
        if self.recorder:
            again = self.recorder.before(eqn, operands, origins)
            if again is not None:
                return again
        if (compressed or observed or self.must_enter(eqn)) and name in walk.rules:
            return walk.rules[name](self, eqn, operands, origins)
        if not compressed:
            return self.bind(eqn, operands)
        if name == "dot_general" and all(map(is_compressed, operands)):
            smaller = min((0, 1), key=lambda i: operands[i].size)
            operands[smaller] = walk.densify(operands[smaller], eqn, "a product of two weights")
        outputs = None
        if name in walk.array_rules:
            outputs = walk.array_rules[name](eqn, operands)
        elif name in unofficial.BUFFERWISE and len(operands) == 1:
            outputs = [operands[0].map(lambda buffer: unofficial.bind_as_traced(eqn, [buffer])[0])]
        if outputs is not None:
            return outputs
        return self.bind(eqn, [walk.densify(value, eqn) for value in operands])

    def must_enter(self, eqn: JaxprEqn) -> bool:
        """Whether names inside `eqn` are asked for, though no parameter goes in."""
        return self.recorder is not None and self.recorder.named_inside(eqn)

    def bind(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        """The equation as it was traced."""
        outputs = unofficial.bind_as_traced(eqn, operands)
        if self.recorder:
            self.recorder.after(eqn, operands, outputs)
        return outputs

    def run(
        self, body: Body, args: Sequence[Any], origins: Origins, defer: bool = False
    ) -> tuple[list[Any], Observations]:
        """Evaluate an inner body; its origins are positions in its own arguments."""
        return self.walk.run(body, args, origins, self.mask, defer)

    def inner(self, origins: Sequence[int | None]) -> Origins:
        """Origins of an inner body: its own positions where `origins` are known."""
        if self.recorder is None:
            return None
        return [i if origin is not None else None for i, origin in enumerate(origins)]

    def absorb(
        self, seen: Observations, args: Sequence[Any], origins: Sequence[int | None]
    ) -> None:
        """Take over what an inner body observed; `origins` are those of its arguments."""
        if self.recorder:
            self.recorder.absorb(seen, args, origins)

    def like(
        self, outputs: list[Any], templates: Sequence[Any], eqn: JaxprEqn, why: str
    ) -> list[Any]:
        """Outputs as they are where they match the template, dense elsewhere."""
        return [
            out
            if template is not None and same_type(out, template)
            else self.walk.densify(out, eqn, why)
            for out, template in zip(outputs, templates, strict=True)
        ]


def same_type(a: Any, b: Any) -> bool:
    """Whether two values, concrete or abstract, have one tree structure, shapes and dtypes."""

    def types(tree: Any) -> list[Any]:
        avals = [
            x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
            for x in jax.tree.leaves(tree)
        ]
        return [(aval.shape, aval.dtype) for aval in avals]

    return jax.tree.structure(a) == jax.tree.structure(b) and types(a) == types(b)
