"""Structured pruning: the network becomes smaller, whatever network it is."""

from jaxcompress.core.method import Method
from jaxcompress.pruning.structured.cutting import Decision, Settings, decide, shapes_of
from jaxcompress.pruning.structured.methods import filters, heads, neurons, units, width
from jaxcompress.pruning.structured.queries import queries
from jaxcompress.pruning.structured.roles import KINDS, Role, of_kind, roles
from jaxcompress.pruning.structured.shrink import shrink
from jaxcompress.pruning.structured.torch_module import write_torch_module

__all__ = [
    "KINDS",
    "METHODS",
    "Decision",
    "Role",
    "Settings",
    "decide",
    "filters",
    "heads",
    "neurons",
    "of_kind",
    "queries",
    "roles",
    "shapes_of",
    "shrink",
    "units",
    "width",
    "write_torch_module",
]

METHODS = {
    "heads": Method(heads, produces="model", shapes=shapes_of("heads")),
    "queries": Method(queries, produces="model", shapes=shapes_of("queries")),
    "neurons": Method(neurons, produces="model", shapes=shapes_of("neurons")),
    "filters": Method(filters, produces="model", shapes=shapes_of("filters")),
    "units": Method(units, produces="model", shapes=shapes_of("units")),
    "width": Method(width, produces="model", shapes=shapes_of("width")),
    "shrink": Method(shrink, produces="model"),
}
