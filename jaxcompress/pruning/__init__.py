"""Pruning: fewer weights, channels or layers. `METHODS` lists every method by its name."""

from jaxcompress.core.method import Method
from jaxcompress.pruning.depth import depth, depth_shapes
from jaxcompress.pruning.magnitude import magnitude, survey_global
from jaxcompress.pruning.refit import refit
from jaxcompress.pruning.sparsegpt import sparsegpt

METHODS = {
    "magnitude": Method(magnitude, produces="sparse", survey=survey_global),
    "sparsegpt": Method(sparsegpt, produces="sparse"),
    "refit": Method(refit, produces="sparse", sequential="matrix", dense_target=0.5),
    "depth": Method(depth, produces="model", shapes=depth_shapes),
}
