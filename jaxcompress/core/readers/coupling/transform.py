"""Apply a derived symmetry to parameters."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import map_with_paths

if TYPE_CHECKING:
    from .groups import Diagonal, Matrices, Member


def scale(diagonal: Diagonal, params: Any, d: Any) -> Any:
    """Multiply every parameter of the symmetry by `d ** exponent` along the group.

    Args:
        diagonal: the symmetry.
        params: parameter pytree.
        d: array `[size]`, or one axis per group; `[steps, size]` where the symmetry has steps.
            Positive where the symmetry asks for it.

    Raises:
        InputError: d has another shape.
    """
    sizes = tuple(group.size for group in diagonal.groups)
    shape = tuple(np.shape(d))
    per_step = bool(diagonal.steps) and shape == (diagonal.steps, *sizes)
    if shape != sizes and not per_step:
        raise InputError(f"d has shape {list(shape)}, the symmetry wants {list(sizes)}")
    by_path: dict[str, list[tuple[tuple[Member, ...], Fraction]]] = {}
    for members, exponent in diagonal.exponents.items():
        by_path.setdefault(members[0].path, []).append((members, exponent))

    def one(path: str, leaf: Any) -> Any:
        for members, exponent in by_path.get(path, ()):
            index, present = [], np.ones((1,) * leaf.ndim, bool)
            if per_step:
                index.append(_along(np.arange(diagonal.steps), 0, leaf.ndim))
            for group, member in zip(diagonal.groups, members):
                at = _along(group.labels(member), member.axis, leaf.ndim)
                present = present & (at >= 0)
                index.append(np.maximum(at, 0))
            power = int(exponent) if exponent.denominator == 1 else float(exponent)
            xp = np if isinstance(d, np.ndarray) else jnp
            factor = xp.where(present, (d**power)[tuple(index)], 1)
            leaf = (leaf * factor).astype(leaf.dtype)
        return leaf

    return map_with_paths(one, params)


def _along(values: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    return values.reshape([-1 if k == axis else 1 for k in range(ndim)])


def transform(matrices: Matrices, params: Any, matrix: Any) -> Any:
    """Transform every parameter of a class by `matrix`, or by its inverse transpose, as signed.

    Args:
        matrices: the class.
        params: parameter pytree.
        matrix: `[size, size]`, or `[steps, size, size]` where the class has steps. It must be of
            the class's level; that is not checked.

    Raises:
        InputError: the matrix has another shape.
    """
    size = matrices.group.size
    shape = tuple(np.shape(matrix))
    if shape != (size, size) and not (matrices.steps and shape == (matrices.steps, size, size)):
        raise InputError(f"the matrix has shape {list(shape)}, the group has size {size}")
    by_path: dict[str, list[tuple[Member, int]]] = {}
    for member, sign in matrices.signs.items():
        by_path.setdefault(member.path, []).append((member, sign))

    def one(path: str, leaf: Any) -> Any:
        for member, sign in by_path.get(path, ()):
            acting = matrix if sign > 0 else _inverse_transpose(matrix)
            leaf = _transform_axis(leaf, member.axis, matrices.group.labels(member), acting)
        return leaf

    return map_with_paths(one, params)


def _transform_axis(leaf: Any, axis: int, index: np.ndarray, matrix: Any) -> Any:
    """`leaf` with `matrix` applied along the copies of a group on one axis."""
    on = np.flatnonzero(index >= 0)
    order = on[np.argsort(index[on], kind="stable")]
    positions = order.reshape(int(index.max()) + 1, -1)  # [size, copies]
    xp = np if isinstance(leaf, np.ndarray) and isinstance(matrix, np.ndarray) else jnp
    moved = xp.moveaxis(leaf, axis, -1)
    taken = moved[..., positions]
    subscripts = "s...jc,sij->s...ic" if np.ndim(matrix) == 3 else "...jc,ij->...ic"
    new = xp.einsum(subscripts, taken, matrix).astype(leaf.dtype)
    if xp is np:
        moved = moved.copy()
        moved[..., positions] = new
    else:
        moved = moved.at[..., positions].set(new)
    return xp.moveaxis(moved, -1, axis)


def _inverse_transpose(matrix: Any) -> Any:
    inverse = (np if isinstance(matrix, np.ndarray) else jnp).linalg.inv(matrix)
    return inverse.swapaxes(-1, -2)
