"""HTML made of elements, escaped where text enters them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any


class Markup(str):
    """Text that is HTML already; any other text is escaped where it enters a tag."""


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element; `klass` is its class, children that are None are left out."""
    named = {("class" if k == "klass" else k): v for k, v in attributes.items() if v is not None}
    said = "".join(f' {key}="{html.escape(str(value))}"' for key, value in named.items())
    return Markup(f"<{name}{said}>{joined(*children)}</{name}>")


def joined(*children: Any) -> Markup:
    """Children one after the other, escaped unless they are markup."""
    shown = (c if isinstance(c, Markup) else html.escape(str(c)) for c in children if c is not None)
    return Markup("".join(shown))


def definitions(table: Mapping[str, Any]) -> Markup:
    """Names and values."""
    pairs: Sequence[Markup] = [joined(tag("dt", k), tag("dd", v)) for k, v in table.items()]
    return tag("dl", *pairs)
