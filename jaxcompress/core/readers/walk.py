"""The evaluator under `lift` and `capture`: one walk over a traced function.

An equation that meets no compressed value is bound exactly as it was traced. One that does goes to
a rule: products and views are the arrays' own; control flow and calls are rebuilt through public
JAX functions, which compressed arrays cross as the pytrees that they are. Anything else gets the
dense array, and that is recorded with the source line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.readers import origins, unofficial
from jaxcompress.core.readers.observations import Observations, Settings
from jaxcompress.core.readers.origins import Given, Origins
from jaxcompress.core.readers.recorder import Recorder, ShardMap
from jaxcompress.core.readers.unofficial import Body


@dataclass(frozen=True)
class Materialized:
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
Rule = Callable[["Frame", JaxprEqn, list[Any], list[Origins]], list[Any]]
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
      shard_map: the one being walked, if any.
      largest: entries of the largest value observed.
    """

    rules: dict[str, Rule]
    array_rules: dict[str, ArrayRule]
    settings: Settings | None = None
    records: Counter[Materialized] = field(default_factory=Counter)
    bodies: Bounded = field(default_factory=lambda: Bounded(4096))
    traces: Counter[str] = field(default_factory=Counter)
    shard_map: ShardMap | None = None
    largest: int = 0

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
        return [replace(record, count=count) for record, count in self.records.items()]

    def run(
        self,
        body: Body,
        args: Sequence[Any],
        given: Sequence[Given] | None,
        mask: Any,
        defer: bool = False,
    ) -> tuple[list[Any], Observations]:
        """Evaluate a body in a frame of its own.

        Args:
          body: the jaxpr.
          args: its arguments, any of them compressed.
          given: what `capture` is told of their origins.
          mask: weights of tokens, for `capture`.
          defer: whether statistics of the body's own arguments are left to the caller.
        """
        self.traces["body"] += 1
        frame = Frame(self, mask, defer)
        outputs = frame.evaluate(body, list(args), given)
        if frame.recorder:
            self.largest = max(self.largest, frame.recorder.largest)
        return outputs, frame.observations

    def jitted(
        self,
        body: Body,
        name: str,
        given: Sequence[Given] | None,
        hoisted: int = 0,
        defer: bool = True,
        **options: Any,
    ) -> Any:
        """The lifted body as one jitted function `(mask, *args) -> (outputs, observations)`.

        The first `hoisted` of the arguments are the constants of the body's jaxpr.
        """
        static = (tuple(given or ()), self.shard_map, hoisted, tuple(sorted(options.items())))
        key = (id(body.jaxpr), static)
        if key not in self.bodies:

            def lifted(mask: Any, *args: Any) -> tuple[list[Any], Observations]:
                whole = Body(body.jaxpr, args[:hoisted]) if hoisted else body
                return self.run(whole, args[hoisted:], given, mask, defer)

            lifted.__name__ = lifted.__qualname__ = name
            compiler_options = dict(options.pop("compiler_options", ())) or None
            jitted = jax.jit(lifted, compiler_options=compiler_options, **options)
            self.bodies[key] = (body, jitted)
        return self.bodies[key][1]


class Frame:
    """One body being evaluated.

    Origins say which arguments of the body a value is made of; only `capture` asks for them. They
    are positions in the body, never names: bodies of equal layers stay one body.
    """

    def __init__(self, walk: Walk, mask: Any = None, defer: bool = False) -> None:
        self.walk = walk
        self.mask = mask
        self.recorder: Recorder | None = None
        self.returned: list[Origins] | None = None  # origins of a call's outputs, once it ran
        if walk.settings is not None:
            self.recorder = Recorder(walk.settings, mask, defer, walk.shard_map)

    @property
    def observations(self) -> Observations:
        """What was observed so far."""
        return self.recorder.observations if self.recorder else Observations()

    def evaluate(self, body: Body, args: list[Any], given: Sequence[Given] | None) -> list[Any]:
        """Outputs of `body` on `args`, any of them compressed."""
        jaxpr = body.jaxpr
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, body.consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))
        origin: dict[Any, Origins] = dict.fromkeys(jaxpr.constvars, ())
        if self.recorder:
            known = self.recorder.enter(args, given or [None] * len(args))
            origin.update(zip(jaxpr.invars, known, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if unofficial.literal(atom) else values[atom]

        def origin_of(atom: Any) -> Origins:
            return () if unofficial.literal(atom) else origin.get(atom)

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            sources = [origin_of(atom) for atom in eqn.invars]
            self.returned = None
            with unofficial.context_of(eqn):
                outputs = self.step(eqn, operands, sources)
            values.update(zip(eqn.outvars, outputs, strict=True))
            if self.recorder:
                made = self.returned or origins.through(eqn, sources)
                origin.update(zip(eqn.outvars, made, strict=True))
        if self.recorder and given is not None:
            self.observations.returns = tuple(origin_of(atom) for atom in jaxpr.outvars)
        return [read(atom) for atom in jaxpr.outvars]

    def step(self, eqn: JaxprEqn, operands: list[Any], sources: list[Origins]) -> list[Any]:
        """Outputs of one equation."""
        name, walk, recorder = eqn.primitive.name, self.walk, self.recorder
        compressed = any(map(is_compressed, operands))
        if recorder:
            again = recorder.view_again(eqn, operands, sources)
            if again is not None:
                return again
            recorder.see(eqn, operands, sources)
        if name in walk.rules and (
            compressed or (recorder and (any(sources) or recorder.named_inside(eqn)))
        ):
            return walk.rules[name](self, eqn, operands, sources)
        outputs = self.on_arrays(eqn, operands) if compressed else self.bind(eqn, operands)
        if recorder:
            recorder.made(eqn, operands, sources, outputs)
        return outputs

    def on_arrays(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        """A view or product of compressed arrays; what is neither gets dense ones, recorded."""
        name, walk = eqn.primitive.name, self.walk
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

    def bind(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        """The equation as it was traced."""
        return unofficial.bind_as_traced(eqn, operands)

    def run(
        self,
        body: Body,
        args: Sequence[Any],
        given: Sequence[Given] | None,
        defer: bool = False,
    ) -> tuple[list[Any], Observations]:
        """Evaluate an inner body."""
        return self.walk.run(body, args, given, self.mask, defer)

    def inner(self, sources: Sequence[Origins]) -> list[Given] | None:
        """What an inner body is told of its arguments' origins."""
        return None if self.recorder is None else [origins.tag_of(source) for source in sources]

    def absorb(
        self,
        seen: Observations,
        args: Sequence[Any],
        sources: Sequence[Origins],
        scanned_from: int | None = None,
    ) -> None:
        """Take over what an inner body observed; `sources` are the origins of its arguments."""
        if self.recorder:
            self.recorder.absorb(seen, args, sources, scanned_from)

    def absorb_call(
        self, seen: Observations, args: Sequence[Any], sources: Sequence[Origins]
    ) -> None:
        """`absorb` for a call, whose outputs may be made of its arguments."""
        if self.recorder:
            self.recorder.absorb(seen, args, sources)
            self.returned = self.recorder.returned(seen, args, sources)

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

    structure: Any = jax.tree.structure(a)
    return structure == jax.tree.structure(b) and types(a) == types(b)
