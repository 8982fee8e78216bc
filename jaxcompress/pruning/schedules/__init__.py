"""Schedules and learned criteria: pruning while a network trains.

Those whose masks change by a rule are optimizers around an optimizer (`gradual`, `lottery`,
`sparse_evolution`, `rigl`, `proximal`); those whose loss must see other weights than train are a
`training.transform.Transform` (`sr_ste`, `movement`, `soft_movement`, `hard_concrete`,
`learned_n_m`). What they remember is part of the train state.
"""

from jaxcompress.pruning.schedules.gradual import cubic, gradual
from jaxcompress.pruning.schedules.greedy import greedy
from jaxcompress.pruning.schedules.hard_concrete import hard_concrete
from jaxcompress.pruning.schedules.iterative import iterative, progression, share_of_rest
from jaxcompress.pruning.schedules.learned_n_m import learned_n_m
from jaxcompress.pruning.schedules.lottery import lottery, training_steps
from jaxcompress.pruning.schedules.movement import movement, soft_movement
from jaxcompress.pruning.schedules.proximal import (
    coupled_threshold,
    group_threshold,
    proximal,
    soft_threshold,
    zeros_told,
)
from jaxcompress.pruning.schedules.rigl import rigl
from jaxcompress.pruning.schedules.sparse_evolution import sparse_evolution, sparse_start
from jaxcompress.pruning.schedules.sr_ste import sr_ste
from jaxcompress.pruning.schedules.targets import Targets, targets

__all__ = [
    "Targets",
    "coupled_threshold",
    "cubic",
    "gradual",
    "greedy",
    "group_threshold",
    "hard_concrete",
    "iterative",
    "learned_n_m",
    "lottery",
    "movement",
    "progression",
    "proximal",
    "rigl",
    "share_of_rest",
    "soft_movement",
    "soft_threshold",
    "sparse_evolution",
    "sparse_start",
    "sr_ste",
    "targets",
    "training_steps",
    "zeros_told",
]
