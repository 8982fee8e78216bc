"""`Method`: how an algorithm presents itself to `compress`, the command line and recipes.

An algorithm is one pure function. What it is given follows from its first parameter:

- `weight`: one stored matrix `[*lead, N, K]` at a time; returns a compressed array, or the new
  matrix. Such methods stream through a checkpoint tensor by tensor.
- `model`: a whole `Model`; returns a `Model`.

Further positional parameters after `weight` are statistics of the calibration data that it needs,
by name: `second_moment`, `sum_squares`, ... (`layerwise.observe`), `gradient`, ...
(`layerwise.gradients`). `compress` then walks through the model and gives them to it.

Its keyword-only parameters are its options: name, type and default are read off the signature,
the help text off the docstring's Args. A parameter `calibration` of a method of whole models means
that it needs data; with a default, that some of its options do. One named `dense` is given the
model as it was before anything was rounded.

Methods make a `Chain`: one after the other, as one method.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxcompress.core.errors import InputError

GIVEN = ("calibration", "dense")  # parameters that are no options: `compress` gives them


@dataclass(frozen=True)
class Option:
    """A keyword-only parameter of a method's function."""

    name: str
    type: type
    default: Any
    choices: tuple[str, ...]
    help: str


@dataclass(frozen=True)
class Method:
    """A compression method.

    Attributes:
      function: the algorithm; see the module's text.
      produces: "quantized" leaves, "sparse" leaves (zeros in dense arrays) or a smaller "model".
      rowwise: rows are independent, so that a large matrix may come in chunks of rows.
      survey: for a decision over all matrices together: `survey(matrices, **options)` with
        `matrices()` a fresh iterator over (matrix, statistics of the dense model) of every
        selected one, its "path" and a convolution's "window" among them; returns one function for
        each of them, in their order, to be called with the matrix and its statistics instead of
        `function`; or None. Of one function, or `jax.tree_util.Partial`s of one over arrays with
        the matrix's leading axes, matrices of equal shape make one batch on a mesh.
      shapes: of a method of whole models: `shapes(model, **options)`, with traced parameters,
        gives a model of the shapes that `function` gives, without data; None: nobody can tell.
      sequential: default of the walk's option, see `layerwise.walk.Settings`.
      dense_target: likewise.
      score: of methods that zero single weights: `score(weight, <statistics>, *, <options>)`, what
        decides which; None where there is no such thing.
      plan: of methods that decide for every matrix what a method of matrices is to do:
        `plan(model, paths, *, calibration, **options)` has `overrides()` and `dense()`, paths to
        leave alone. In a chain it decides for the link that follows.
    """

    function: Callable[..., Any]
    produces: str
    rowwise: bool = False
    survey: Callable[..., list[Callable[[Any], Any]] | None] | None = None
    shapes: Callable[..., Any] | None = None
    sequential: str = "block"
    dense_target: float = 0.0
    score: Callable[..., Any] | None = None
    plan: Callable[..., Any] | None = None

    @property
    def selects(self) -> bool:
        """Whether it takes patterns of paths, and what else goes with methods of matrices."""
        return self.per_matrix

    @property
    def walks(self) -> bool:
        """Whether it takes the options of a walk through the model."""
        return bool(self.statistics)

    @property
    def per_matrix(self) -> bool:
        """Whether the function sees one stored matrix at a time."""
        return next(iter(inspect.signature(self.function).parameters)) == "weight"

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics that a function of one matrix needs."""
        if not self.per_matrix:
            return ()
        given = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]

    @property
    def needs(self) -> str:
        """ "calibration", "calibration for some options" or "nothing"."""
        data = self.parameters.get("calibration")
        if self.statistics or (data is not None and data.default is inspect.Parameter.empty):
            return "calibration"
        return "nothing" if data is None else "calibration for some options"

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Keyword-only parameters of the function."""
        signature = inspect.signature(self.function)
        return {n: p for n, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}

    @property
    def hints(self) -> dict[str, Any]:
        """Types of the options that a person sets, as they stand in the signature."""
        hints = typing.get_type_hints(self.function)
        return {name: hints[name] for name in self.parameters if name not in GIVEN}

    @property
    def options(self) -> dict[str, Option]:
        """Options that a person sets: all keyword-only parameters but those of `GIVEN`."""
        helps = _argument_helps(inspect.getdoc(self.function) or "")
        made = {}
        for name, hint in self.hints.items():
            kind, choices = _plain_type(hint)
            default = self.parameters[name].default
            made[name] = Option(name, kind, default, choices, helps.get(name, ""))
        return made

    def accepted(self, options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The options that this method uses, checked, and the names of those it does not.

        Raises:
          InputError: a value of the wrong type or none of the choices.
        """
        used, unused = {}, []
        for name, value in options.items():
            option = self.options.get(name)
            if option is None:
                unused.append(name)
                continue
            if option.choices and value not in option.choices:
                raise InputError(f"{name} {value!r}: use one of {', '.join(option.choices)}")
            if value is not None and not _is(value, option.type):
                raise InputError(f"{name} {value!r}: must be of type {option.type.__name__}")
            used[name] = value
        return used, unused


@dataclass(frozen=True)
class Link:
    """A method in a chain.

    Attributes:
      name: of the method.
      method: itself.
      defaults: of its options, instead of the method's own.
    """

    name: str
    method: Method
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain(Method):
    """Methods that run one after the other; options go to every link that knows them."""

    links: tuple[Link, ...] = ()

    @classmethod
    def of(cls, *links: Link) -> Chain:
        """The links as a method."""
        flat: list[Link] = []
        for link in links:
            flat += link.method.links if isinstance(link.method, Chain) else [link]
        return cls(flat[0].method.function, flat[-1].method.produces, links=tuple(flat))

    @property
    def per_matrix(self) -> bool:
        """It is a method of whole models."""
        return False

    @property
    def selects(self) -> bool:
        """See `Method`."""
        return any(link.method.per_matrix for link in self.links)

    @property
    def walks(self) -> bool:
        """See `Method`."""
        return any(link.method.walks for link in self.links)

    @property
    def needs(self) -> str:
        """See `Method`."""
        asked = {link.method.needs for link in self.links}
        ways = ("calibration", "calibration for some options", "nothing")
        return next(way for way in ways if way in asked)

    @property
    def summary(self) -> str:
        """See `Method`."""
        names = " + ".join(link.name for link in self.links)
        return f"{self.links[0].method.summary} As {names}."

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """See `Method`."""
        links = reversed(self.links)
        return {name: p for link in links for name, p in link.method.parameters.items()}

    @property
    def hints(self) -> dict[str, Any]:
        """See `Method`."""
        links = reversed(self.links)
        return {name: hint for link in links for name, hint in link.method.hints.items()}

    @property
    def options(self) -> dict[str, Option]:
        """See `Method`; of links that share an option, the last one's default counts."""
        made: dict[str, Option] = {}
        for link in self.links:
            for name, option in link.method.options.items():
                default = link.defaults.get(name, option.default)
                made[name] = replace(made.get(name, option), default=default)
        return made


Matrices = Callable[[], Iterable[tuple[Any, dict[str, Any]]]]


def _plain_type(hint: Any) -> tuple[type, tuple[str, ...]]:
    if typing.get_origin(hint) is typing.Literal:
        return str, typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    return hint, ()


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _argument_helps(doc: str) -> dict[str, str]:
    """Names and texts of a Google-style Args section."""
    section = re.search(r"\nArgs:\n(.*?)(\n\S|\Z)", doc, re.S)
    if not section:
        return {}
    found = re.findall(r"^ {2}(\w+): (.*?)(?=^ {2}\w|\Z)", section[1], re.S | re.M)
    return {name: " ".join(text.split()) for name, text in found}
