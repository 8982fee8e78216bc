"""Pruning: fewer weights, channels or layers. `METHODS` lists every method by its name."""

from jaxcompress.core.method import Method
from jaxcompress.pruning.depth import depth, depth_shapes
from jaxcompress.pruning.magnitude import magnitude, survey_global

METHODS = {
    "magnitude": Method(magnitude, produces="sparse", survey=survey_global),
    "depth": Method(depth, produces="model", shapes=depth_shapes),
}
