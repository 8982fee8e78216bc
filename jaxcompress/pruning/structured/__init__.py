"""Structured pruning: the network becomes smaller, whatever network it is."""

from jaxcompress.pruning.structured.methods import (
    filters,
    heads,
    neurons,
    shapes_of,
    units,
    width,
)
from jaxcompress.pruning.structured.roles import KINDS, Role, of_kind, roles

__all__ = [
    "KINDS",
    "Role",
    "filters",
    "heads",
    "neurons",
    "of_kind",
    "roles",
    "shapes_of",
    "units",
    "width",
]
