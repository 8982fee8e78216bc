"""Pruning: fewer weights, channels or layers. `METHODS` lists every method by its name."""

from jaxcompress.core.method import Method
from jaxcompress.pruning import structured, unstructured
from jaxcompress.pruning.depth import depth, depth_shapes
from jaxcompress.pruning.kronecker import kronecker
from jaxcompress.pruning.refit import refit
from jaxcompress.pruning.scores import SCORES
from jaxcompress.pruning.sparsegpt import sparsegpt
from jaxcompress.pruning.threshold import threshold

METHODS = {
    **unstructured.METHODS,
    "threshold": Method(threshold, produces="sparse", score=SCORES["magnitude"]),
    "sparsegpt": Method(sparsegpt, produces="sparse", score=SCORES["obs"]),
    "refit": Method(
        refit,
        produces="sparse",
        sequential="matrix",
        dense_target=0.5,
        score=SCORES["obs"],
    ),
    "kronecker": Method(
        kronecker,
        produces="sparse",
        sequential="matrix",
        dense_target=0.5,
        score=SCORES["obs"],
    ),
    # Before depth: of options of one name, the command line shows the first.
    **structured.METHODS,
    "depth": Method(depth, produces="model", shapes=depth_shapes),
}
