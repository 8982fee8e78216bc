"""Which parameters: globs and regular expressions on `/`-joined paths.

A pattern matches whole paths, such as `layers/0/attn/q_proj/kernel`:

    *        anything within one component            layers/*/attn/*
    ?        one character of a component
    [0-3]    one of these characters, [!0-3]: none of these
    **       as a component: any number of components, none included     **/kernel
    {a,b}    alternatives, which may hold patterns and `/`               **/{q,k}_proj/kernel
    re:...   a regular expression of the whole path                      re:layers/\\d+/.*

A pattern that matches nothing is an error: a rule that silently selects nothing is the commonest
mistake with such rules.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxcompress.core.errors import InputError

Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class Selection:
    """Parameters to work on, with options for some of them.

    Attributes:
      include: patterns; None: every path.
      exclude: patterns of paths to leave out.
      overrides: `{pattern: options}`; for each path the first pattern that matches counts.
    """

    include: Patterns = None
    exclude: Patterns = None
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def select(self, paths: Iterable[str]) -> list[str]:
        """Those of `paths` that are selected, in their order. Raises as the function `select`."""
        return select(paths, self.include, self.exclude)

    def resolve(self, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
        """`{selected path: its own options}`, in the order of `paths`.

        Raises:
          InputError: a pattern of `include`, `exclude` matches none of `paths`, or a pattern of
            `overrides` none of the selected ones.
        """
        chosen = self.select(paths)
        for pattern in self.overrides:
            _matching(pattern, chosen, "override")
        return {path: self._options_of(path) for path in chosen}

    def _options_of(self, path: str) -> dict[str, Any]:
        for pattern, options in self.overrides.items():
            if matches(pattern, path):
                return dict(options)
        return {}


def select(paths: Iterable[str], include: Patterns = None, exclude: Patterns = None) -> list[str]:
    """Paths that some pattern of `include` matches and none of `exclude`, in their order.

    Args:
      paths: `/`-joined paths.
      include: one pattern or several; None: all paths.
      exclude: one pattern or several.

    Raises:
      InputError: a pattern matches none of `paths` (the nearest paths are named), or is malformed.
    """
    paths = list(paths)
    chosen = set(paths)
    if include is not None:
        chosen = {p for pattern in _listed(include) for p in _matching(pattern, paths, "include")}
    for pattern in _listed(exclude):
        chosen -= _matching(pattern, paths, "exclude")
    return [path for path in paths if path in chosen]


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` is or matches the whole of `path`. Raises `InputError` where malformed."""
    if pattern == path:  # a path written out may hold characters that patterns use
        return True
    is_regex = pattern.startswith("re:")
    return _compiled(pattern).fullmatch(path if is_regex or not path else path + "/") is not None


def nearest(name: str, names: Iterable[str]) -> str:
    """`the nearest are a, b, c`: the end of a message about a name that does not exist."""
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.0)
    if len(near) < 2:
        return f"there is only {near[0]}" if near else "there are none"
    return f"the nearest are {', '.join(near)}"


def _listed(patterns: Patterns) -> list[str]:
    if patterns is None:
        return []
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _matching(pattern: str, paths: list[str], what: str) -> set[str]:
    found = {path for path in paths if matches(pattern, path)}
    if not found:
        literal = re.sub(r"\*\*/|[*?]", "", pattern.removeprefix("re:"))
        raise InputError(
            f"{what} pattern '{pattern}' matches none of {len(paths)} paths; "
            f"{nearest(literal, paths)}"
        )
    return found


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    if not pattern.startswith("re:"):
        return re.compile("|".join(_glob_regex(p) for p in _expand_braces(pattern)), re.DOTALL)
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise InputError(f"pattern '{pattern}': not a regular expression ({error})") from None


def _expand_braces(pattern: str) -> list[str]:
    """`a{b,c}` to `ab`, `ac`; braces nest; every combination in order."""
    start = pattern.find("{")
    if start < 0:
        if "}" in pattern:
            raise InputError(f"pattern '{pattern}': '}}' without '{{'")
        return [pattern]
    depth, pieces, last = 0, [], start + 1
    for i in range(start, len(pattern)):
        if pattern[i] == "{":
            depth += 1
        elif pattern[i] == "," and depth == 1:
            pieces.append(pattern[last:i])
            last = i + 1
        elif pattern[i] == "}":
            depth -= 1
            if depth == 0:
                pieces.append(pattern[last:i])
                head, rest = pattern[:start], pattern[i + 1 :]
                return [one for piece in pieces for one in _expand_braces(head + piece + rest)]
    raise InputError(f"pattern '{pattern}': '{{' without '}}'")


def _glob_regex(pattern: str) -> str:
    """Regular expression of a glob without braces, for a path whose every component ends in /."""
    parts = pattern.split("/")
    return "".join("(?:[^/]+/)*" if p == "**" else _component_regex(p) + "/" for p in parts)


def _component_regex(component: str) -> str:
    out, i = [], 0
    while i < len(component):
        char = component[i]
        end = component.find("]", i + 2) if char == "[" else -1
        if char == "*":
            out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif end > 0:
            inside = component[i + 1 : end].replace("\\", "\\\\")
            negated = inside.startswith("!")
            inside = (inside[1:] if negated else inside).replace("[", "\\[").replace("^", "\\^")
            out.append(f"[^/{inside}]" if negated else f"(?!/)[{inside}]")
            i = end
        else:
            out.append(re.escape(char))
        i += 1
    return "".join(out)
