"""Scores: how important each weight is. One pure function per file, the paper in its docstring.

A score is `name(weight, <statistics by name>, *, <options>) -> scores`: `weight` float32
`[*lead, N, K]` (N rows, K contracted), statistics as in `core.method`, scores float `[*lead, N, K]`
of any sign, the larger the more important. Every score in `SCORES` is a method of its name, with
the patterns, scopes and allocations of `pruning.unstructured`.
"""

from collections.abc import Callable

from jaxcompress.core.arrays.base import Array
from jaxcompress.pruning.scores.fisher import fisher
from jaxcompress.pruning.scores.grasp import grasp
from jaxcompress.pruning.scores.lamp import lamp
from jaxcompress.pruning.scores.magnitude import magnitude
from jaxcompress.pruning.scores.obs import obs
from jaxcompress.pruning.scores.random import random
from jaxcompress.pruning.scores.reconstruction import reconstruction
from jaxcompress.pruning.scores.ria import ria
from jaxcompress.pruning.scores.sensitivity import sensitivity
from jaxcompress.pruning.scores.signal_to_noise import signal_to_noise
from jaxcompress.pruning.scores.snip import snip
from jaxcompress.pruning.scores.synflow import synflow
from jaxcompress.pruning.scores.taylor import taylor
from jaxcompress.pruning.scores.wanda import wanda

Score = Callable[..., Array]

SCORES: dict[str, Score] = {
    score.__name__: score
    for score in (
        magnitude,
        random,
        sensitivity,
        taylor,
        fisher,
        snip,
        grasp,
        synflow,
        wanda,
        ria,
        signal_to_noise,
        reconstruction,
        obs,
        lamp,
    )
}

# The scope in which a paper compares its scores, where that is not the layer.
SCOPES = {
    "wanda": "row",
    "snip": "global",
    "grasp": "global",
    "synflow": "global",
    "lamp": "global",
}
