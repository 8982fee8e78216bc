"""`coupling(fn)`: which axes of which parameters are one and the same axis of the function.

Two passes over the jaxpr, no table of models. Pass 1 (`trace`, `rules`, `atoms`) reads every
equation once and unifies axes. Pass 2 (`flow`, `diagonals`, `matrices`, `crossing`) follows one
group through the equations that it touches and derives which scalings and which matrices leave
the function unchanged, and whether masking an index is the same as removing it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .crossing import Crossing
from .groups import Diagonal, Group, Groups, Matrices, Member
from .trace import read_program, shapes_of
from .verify import SymmetryError, verify

__all__ = [
    "Crossing",
    "Diagonal",
    "Group",
    "Groups",
    "Matrices",
    "Member",
    "SymmetryError",
    "coupling",
    "verify",
]


def coupling(fn: Callable[..., Any]) -> Callable[..., Groups]:
    """A function of `(params, *inputs)` that returns the groups of coupled parameter axes of `fn`.

    Nothing is computed: `fn` is traced on shapes. Trace at real sizes, because an axis of size 1
    cannot be told from one that is broadcast.

    Args:
        fn: a pure function `fn(params, *inputs)`; `params` is a pytree of arrays,
            `jax.ShapeDtypeStruct` or compressed arrays (seen as their dense shape).

    Returns:
        A function that returns `Groups`, a sequence of `Group`.
    """

    def read(params: Any, *inputs: Any) -> Groups:
        program = read_program(fn, params, inputs)
        return Groups(fn, shapes_of(params), shapes_of(inputs), program)

    return read
