"""Where a value came from: which parameter, and which of its axes each axis is made of.

An axis of a view is a tuple of atoms, major to minor; an atom is (axis of the argument, size, mesh
axes that it is split over). What is computed from parameters and constants alone keeps its origins
through views and elementwise functions (a mask, a fake quantizer); what depends on the inputs has
none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn

from jaxcompress.core.readers.unofficial import aval


class Atom(NamedTuple):
    """A factor of an axis of a body's argument."""

    axis: int
    size: int
    mesh: tuple[str, ...] = ()


Axis = tuple[Atom, ...]


@dataclass(frozen=True)
class Origin:
    """A value made from argument `arg` of the body: the atoms of each of its axes."""

    arg: int
    axes: tuple[Axis, ...]


# Of a value: None, it depends on the inputs; (): on constants only; else on these arguments.
Origins = tuple[Origin, ...] | None


@dataclass(frozen=True)
class Tag:
    """What a body is told of an argument that has origins: the mesh axes of each of its axes."""

    mesh: tuple[tuple[str, ...], ...]


# Of an argument: None, an input; False: a constant; Tag: it has origins.
Given = Tag | bool | None

VIEWS = ("transpose", "reshape", "broadcast_in_dim", "squeeze", "slice", "dynamic_slice", "split")
# fmt: off
ELEMENTWISE = frozenset({
    "abs", "add", "and", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p",
    "cos", "device_put", "div", "eq", "erf", "exp", "exp2", "expm1", "floor", "ge", "gt",
    "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul",
    "name", "ne", "neg", "not", "optimization_barrier", "or", "pcast", "pow", "pvary",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "sharding_constraint", "sign",
    "sin", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
})
# fmt: on


def identity(arg: int, shape: Sequence[int], tag: Tag | None = None) -> Origin:
    """The origin of an argument itself."""
    mesh = tag.mesh if tag else ((),) * len(shape)
    axes = zip(shape, mesh, strict=True)
    return Origin(arg, tuple((Atom(i, size, names),) for i, (size, names) in enumerate(axes)))


def tag_of(origins: Origins) -> Given:
    """What to tell an inner body of an argument with these origins."""
    if not origins:
        return None if origins is None else False
    axes = origins[0].axes
    return Tag(tuple(tuple(n for atom in axis for n in atom.mesh) for axis in axes))


def through(eqn: JaxprEqn, operands: Sequence[Origins]) -> list[Origins]:
    """Origins of the outputs of an equation that is not a call."""
    outputs: list[Origins] = [None] * len(eqn.outvars)
    name = eqn.primitive.name
    if name == "dynamic_slice" and sum(size > 1 for size in aval(eqn.outvars[0]).shape) > 1:
        # A matrix picked by an input, a layer or an expert, is a weight; a row is an activation.
        operands = [operands[0], *[()] * (len(operands) - 1)]
    if any(origins is None for origins in operands):
        return outputs
    if name in VIEWS or name in ("concatenate", "all_gather"):
        for i, var in enumerate(eqn.outvars):
            made: list[Origin] = []
            for operand, origins in zip(eqn.invars, operands, strict=True):
                for origin in origins or ():
                    axes = _view(eqn, origin.axes, aval(operand).shape, aval(var).shape)
                    made += [] if axes is None else [replace(origin, axes=axes)]
            outputs[i] = tuple(made)
        return outputs
    for i, var in enumerate(eqn.outvars):
        same = name in ELEMENTWISE
        outputs[i] = tuple(
            origin
            for operand, origins in zip(eqn.invars, operands, strict=True)
            for origin in origins or ()
            if same and aval(operand).shape == aval(var).shape
        )
    return outputs


def _view(
    eqn: JaxprEqn, axes: tuple[Axis, ...], old: Sequence[int], new: Sequence[int]
) -> tuple[Axis, ...] | None:
    p, name = eqn.params, eqn.primitive.name
    if name == "transpose":
        return tuple(axes[i] for i in p["permutation"])
    if name == "squeeze":
        return tuple(axis for i, axis in enumerate(axes) if i not in p["dimensions"])
    if name == "broadcast_in_dim":
        out: list[Axis] = [()] * len(new)
        for i, place in enumerate(p["broadcast_dimensions"]):
            out[place] = axes[i] if old[i] == new[place] else ()
        return tuple(out)
    if name == "reshape":
        return _reshaped(axes, new) if p["dimensions"] is None else None
    if name == "all_gather":
        at = p["all_gather_dimension"]
        names = p["axis_name"] if isinstance(p["axis_name"], tuple) else (p["axis_name"],)
        gathered = tuple(
            a._replace(mesh=tuple(n for n in a.mesh if n not in names)) for a in axes[at]
        )
        return (*axes[:at], _resized(gathered, new[at]), *axes[at + 1 :]) if p["tiled"] else None
    if len(old) != len(new):
        return None
    return tuple(
        axis if a == b else _resized(axis, b) for axis, a, b in zip(axes, old, new, strict=True)
    )


def _resized(axis: Axis, size: int) -> Axis:
    """An axis of which a part was taken, or that is one shard of several."""
    return (axis[0]._replace(size=size),) if len(axis) == 1 else ()


def _reshaped(axes: tuple[Axis, ...], new: Sequence[int]) -> tuple[Axis, ...] | None:
    """Atoms dealt out to the new axes, split where sizes divide; None where they do not nest."""
    atoms = [atom for axis in axes for atom in axis if atom.size != 1]
    if math.prod(atom.size for atom in atoms) != math.prod(new):
        return None
    out: list[Axis] = []
    for size in new:
        taken: list[Atom] = []
        while size > 1:
            atom = atoms.pop(0)
            if size % atom.size == 0:
                taken.append(atom)
                size //= atom.size
            elif atom.size % size == 0:
                taken.append(atom._replace(size=size))
                # Only the major part of a split axis is split over the mesh.
                atoms.insert(0, Atom(atom.axis, atom.size // size))
                size = 1
            else:
                return None
        out.append(tuple(taken))
    return tuple(out)


def compose(atoms: Sequence[Atom], outer: Origin, shape: Sequence[int], skip: int) -> Axis:
    """Atoms of a body's argument, in terms of what the caller's origin `outer` is made of.

    Args:
      atoms: of the argument, as the body sees it.
      outer: what the caller passes.
      shape: of the argument, as the body sees it.
      skip: leading axes that the caller's value has besides (1 for a scanned argument).
    """
    out: list[Atom] = []
    for atom in atoms:
        axis = outer.axes[atom.axis + skip]
        if atom.size == shape[atom.axis]:
            out += axis
        else:
            out += _resized(axis, atom.size)
    return tuple(out)


def whole_axes(atoms: Sequence[Atom], shape: Sequence[int]) -> tuple[int, ...] | None:
    """The axes that `atoms` cover whole, in order of appearance; None if one is covered in part."""
    covered: dict[int, int] = {}
    for atom in atoms:
        covered[atom.axis] = covered.get(atom.axis, 1) * atom.size
    if any(shape[axis] != size for axis, size in covered.items()):
        return None
    return tuple(covered)


def shapes_of(values: Sequence[Any]) -> list[tuple[int, ...]]:
    """Dense shapes of values."""
    return [tuple(getattr(value, "shape", ())) for value in values]
