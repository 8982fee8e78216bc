"""Pruning: fewer weights, channels or layers. `METHODS` lists every method by its name."""

from jaxcompress.core.method import Method
from jaxcompress.pruning.depth import depth
from jaxcompress.pruning.magnitude import magnitude, survey_global

METHODS = {
    "magnitude": Method(magnitude, produces="sparse", survey=survey_global),
    "depth": Method(depth, produces="model"),
}
