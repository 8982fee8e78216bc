"""`verify(groups)`: try random members of every derived symmetry on the function itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.readers.kept import combine, masked, sliced

from .evaluate import Evaluator
from .groups import Diagonal, Group, Groups, Matrices
from .matrices import GENERAL, IDENTITY, ORTHOGONAL, PERMUTATION
from .trace import partition


class SymmetryError(Exception):
    """A derived symmetry changes the function: a mistake in the reader, not in its input."""


class Check(NamedTuple):
    """One symmetry that was tried: what, and max |change| / max |output|."""

    what: str
    error: float


def verify(
    groups: Groups, params: Any = None, *inputs: Any, tolerance: float = 5e-3, seed: int = 0
) -> list[Check]:
    """Apply a random member of every derived symmetry and compare outputs.

    For each group: every diagonal and every class of matrices; and one random cut of all groups
    for which masking is said to equal removing.

    Args:
        groups: what `coupling(fn)(params, *inputs)` returned.
        params: parameters; drawn if not given, which also tests what trained ones may hide (gains
            of 1, biases of 0). Likewise `inputs`; integers are drawn from {0, 1}.
        tolerance: largest change allowed, relative to the largest output.
        seed: of all draws.

    Returns:
        One `Check` per symmetry tried.

    Raises:
        SymmetryError: outputs changed; names each symmetry that did.
        InputError: the function is not finite on what was drawn; pass `params` and `inputs`.
    """
    rng = np.random.default_rng(seed)
    if params is None:
        params, inputs = _drawn(groups, rng)
    # Transformations in NumPy: float64, and nothing to compile for each.
    params = jax.tree.map(_host, params)
    arrays, rebuild = partition(params)
    fn = jax.jit(lambda arrays: jax.tree.leaves(groups.fn(rebuild(arrays), *inputs)))
    reference = _numbers(fn(arrays))

    def change(new: Any) -> float:
        return _distance(_numbers(fn(partition(new)[0])), reference, reference)

    checks = []
    for group in groups:
        if group.size < 2:
            continue
        for diagonal in group.diagonals():
            scaled = diagonal.apply(params, random_diagonal(diagonal, rng))
            checks.append(Check(f"{group.name}: diagonal {_shown(diagonal)}", change(scaled)))
        for matrices in group.matrices():
            if matrices.level != IDENTITY:
                turned = matrices.apply(params, random_matrix(matrices, rng))
                what = f"{group.name}: {matrices.level} on {len(matrices.signs)} parameters"
                checks.append(Check(what, change(turned)))
    exact = [g for g in groups if g.size > 1 and g.cuttable and g.exact]
    chosen = {g: np.sort(rng.permutation(g.size)[: int(rng.integers(1, g.size))]) for g in exact}

    def cut_error(*some: Group) -> float:
        kept = combine(*(group.keep(chosen[group]) for group in some))
        atoms = {group.atom: chosen[group] for group in some if group.atom is not None}
        flat = [*partition(sliced(params, kept))[0], *partition(inputs)[0]]
        found = _numbers(jax.jit(Evaluator(groups.program, atoms))(flat))
        return _distance(found, _numbers(fn(partition(masked(params, kept))[0])), reference)

    if exact:  # all at once; one by one to say which
        error = cut_error(*exact)
        checks.append(Check("masking is removing, all exact groups", error))
        if not error <= tolerance:
            checks += [Check(f"{g.name}: masking is removing", cut_error(g)) for g in exact]
    failed = [f"{c.what} ({c.error:.1e})" for c in checks if not c.error <= tolerance]
    if failed:
        raise SymmetryError("outputs change under " + "; ".join(failed))
    return checks


def random_diagonal(diagonal: Diagonal, rng: np.random.Generator) -> np.ndarray:
    """A random d for a diagonal symmetry, with signs if it allows them."""
    shape = tuple(group.size for group in diagonal.groups)
    if diagonal.steps:
        shape = (diagonal.steps, *shape)
    d = np.exp(0.3 * rng.standard_normal(shape))
    return d if diagonal.positive else d * rng.choice([-1.0, 1.0], shape)


def random_matrix(matrices: Matrices, rng: np.random.Generator) -> np.ndarray:
    """A random T of a class's level."""
    if matrices.steps:
        return np.stack([_random_matrix(matrices, rng) for _ in range(matrices.steps)])
    return _random_matrix(matrices, rng)


def _random_matrix(matrices: Matrices, rng: np.random.Generator) -> np.ndarray:
    size, level = matrices.group.size, matrices.level
    if level == IDENTITY:
        return np.eye(size)
    if level == PERMUTATION:
        return np.eye(size)[rng.permutation(size)]
    if matrices.fixes_ones:
        # free on the complement of the ones, the identity on them
        start = np.column_stack([np.ones(size), rng.standard_normal((size, size - 1))])
        basis = np.linalg.qr(start)[0]
        inner = np.eye(size)
        inner[1:, 1:] = _free_matrix(level, size - 1, rng)
        return basis @ inner @ basis.T
    return _free_matrix(level, size, rng)


def _free_matrix(level: str, size: int, rng: np.random.Generator) -> np.ndarray:
    if level == ORTHOGONAL:
        return np.linalg.qr(rng.standard_normal((size, size)))[0]
    assert level == GENERAL
    u, v = (np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in "uv")
    return u * np.exp(0.3 * rng.standard_normal(size)) @ v


def _host(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf


def _numbers(outputs: list[Any]) -> list[np.ndarray]:
    return [np.asarray(out, np.float64) for out in outputs]


def _distance(a: list[np.ndarray], b: list[np.ndarray], scale: list[np.ndarray]) -> float:
    largest = max((float(np.abs(x).max()) for x in scale if x.size), default=1.0)
    apart = [float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True) if x.size]
    return max(apart, default=0.0) / (largest or 1.0)


def _shown(diagonal: Diagonal) -> str:
    parts = (f"{m[0].path}:{m[0].axis}^{w}" for m, w in diagonal.exponents.items())
    return " ".join(parts)


# ---------------------------------------------------------------------------- drawn arguments


def _drawn(groups: Groups, rng: np.random.Generator) -> tuple[Any, tuple[Any, ...]]:
    """Random parameters and inputs on which the function is finite."""
    shapes, rebuild = partition(groups.params)
    input_shapes, rebuild_inputs = partition(groups.inputs)
    inputs = rebuild_inputs([_draw(shape, rng, positive=False) for shape in input_shapes])
    for positive in (False, True):  # variances and scales may have to be positive
        params = rebuild([_draw(shape, rng, positive) for shape in shapes])
        out = _numbers(partition(groups.fn(params, *inputs))[0])
        if all(np.isfinite(x).all() for x in out):
            return params, inputs
    raise InputError(
        "verify: the function is not finite on drawn arguments; pass params and inputs"
    )


def _draw(shape: Any, rng: np.random.Generator, positive: bool) -> Any:
    dtype = shape.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if jnp.issubdtype(dtype, jnp.bool_) or jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(rng.integers(0, 2, shape.shape), jax.dtypes.canonicalize_dtype(dtype))
    values = rng.standard_normal(shape.shape)
    if len(shape.shape) > 1:
        values /= np.sqrt(shape.shape[-2])
    return jnp.asarray(np.abs(values) + 0.1 if positive else values, dtype)
