"""What a sweep runs: methods with options of their own, and the options of every strength."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Method, Option
from jaxcompress.core.model import Model
from jaxcompress.core.selection import nearest
from jaxcompress.layerwise.observe import activation_names
from jaxcompress.methods import method_named
from jaxcompress.pruning.patterns import parse_block, removed_count
from jaxcompress.pruning.scores import SCORES

BITS = (8, 6, 5, 4, 3, 2)  # of methods that take bits and no sparsity
MAPPED = 0.5  # the share removed at which maps are drawn

Options = dict[str, Any]


@dataclass(frozen=True)
class Swept:
    """A method with fixed options, such as `wanda:allocation=owl`."""

    label: str
    name: str
    fixed: Mapping[str, Any]

    @property
    def method(self) -> Method:
        """The method."""
        return method_named(self.name)

    @classmethod
    def read(cls, text: str) -> Swept:
        """Of `NAME` or `NAME:option=value:...`; `InputError` where there is no such thing."""
        name, *given = re.split(r":(?=[\w-]+=)", text.strip())
        options = method_named(name).options
        fixed = {}
        for part in given:
            key, _, value = part.partition("=")
            key = key.replace("-", "_")
            if key not in options:
                raise InputError(f"{text}: {name} has no option {key!r}; {nearest(key, options)}")
            fixed[key] = _value(text, options[key], value)
        method_named(name).accepted(fixed)
        return cls(text.strip(), name, fixed)

    def runs(
        self, model: Model, sparsities: Sequence[float], patterns: Sequence[str]
    ) -> list[Options]:
        """The options of each run: every strength, and every n:m or block pattern."""
        known = self.method.options
        strengths = _strengths(known, model, sparsities)
        pattern = str(self.fixed.get("pattern", "unstructured"))
        of_its_own = pattern != "unstructured" and parse_block(pattern) is None  # n:m
        if of_its_own or any(own.keys() & self.fixed.keys() for own in strengths):
            strengths = [{}]
        asked = [dict(self.fixed) | own for own in strengths]
        if "pattern" not in known or "pattern" in self.fixed:
            return asked
        others = [pattern for pattern in patterns if pattern != "unstructured"]
        return asked + [dict(self.fixed) | {"pattern": pattern} for pattern in others]


def _value(text: str, option: Option, value: str) -> Any:
    try:
        if option.type is bool:
            return {"true": True, "false": False}[value.lower()]
        return option.type(value)
    except (KeyError, ValueError):
        raise InputError(
            f"{text}: {option.name} {value!r}: must be of type {option.type.__name__}"
        ) from None


def _strengths(
    known: Mapping[str, Option], model: Model, sparsities: Sequence[float]
) -> list[Options]:
    """The option by which a method is told how much goes, at each sparsity."""
    if "drop" in known or "layers" in known:
        count = 0 if model.blocks is None else len(model.blocks.of(model.params))
        drops = sorted({removed_count(count, s) for s in sparsities} - {0})
        return [{"drop": n} if "drop" in known else {"layers": count - n} for n in drops]
    if "sparsity" in known:
        return [{"sparsity": s} for s in sparsities]
    for name in ("ratio", "budget"):
        if name in known:
            return [{name: round(1 - s, 9)} for s in sparsities]
    if "deviations" in known:  # of weights that are normally distributed, the share goes
        inverse = statistics.NormalDist().inv_cdf
        return [{"deviations": round(inverse((1 + s) / 2), 6)} for s in sparsities]
    return [{"bits": bits} for bits in BITS]


def mapped_of(runs: Iterable[Options]) -> Options | None:
    """The run whose maps are drawn: the one nearest to half, without a pattern."""
    free = [run for run in runs if run.get("pattern", "unstructured") == "unstructured"]

    def away(run: Options) -> float:
        share = run.get("sparsity", run.get("ratio", run.get("budget")))
        if share is None and "deviations" in run:
            share = 2 * statistics.NormalDist().cdf(run["deviations"]) - 1
        return abs((MAPPED if share is None else share) - MAPPED)

    return min(free, key=away, default=None)


def family_of(one: Swept) -> str:
    """Which panel of the overview a method is in."""
    if one.method.produces == "model":
        return "a smaller network"
    if one.method.produces != "sparse":
        return "factors, integers, shared values"
    if not one.method.statistics:
        return "scores of the weights"
    if one.name not in SCORES:
        return "the weights that stay are fitted"
    activations = activation_names(one.method.statistics)
    return "scores of the inputs" if activations else "scores of gradients"
