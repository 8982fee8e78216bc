"""`cut`: the smaller network, for any function.

The parameters are sliced by a record `{path: {axis: kept indices}}` (`kept`), and the function is
the original jaxpr evaluated with smaller shapes (`coupling.evaluate`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.readers.coupling.atoms import Atom, labels
from jaxcompress.core.readers.coupling.evaluate import Evaluator
from jaxcompress.core.readers.coupling.groups import Group, make_groups
from jaxcompress.core.readers.coupling.program import Program
from jaxcompress.core.readers.coupling.trace import partition, read_program, shape_struct
from jaxcompress.core.readers.kept import Kept, KeptArrays, checked, combine, masked, sliced

__all__ = ["combine", "cut", "masked", "sliced"]

MEANS = ("keep", "kept")


def cut(
    fn: Callable[..., Any],
    params: Any,
    kept: Kept,
    *inputs: Any,
    means: str = "keep",
    make: Callable[..., Any] | None = None,
) -> tuple[Any, Callable[..., Any]]:
    """Remove indices of coupled axes from a network.

    Args:
        fn: a pure function `fn(params, *inputs)`.
        params: its parameters.
        kept: `{path: {axis: kept indices}}`, complete over coupled axes, as `Group.keep` returns
            it; `combine` joins several.
        inputs: the further arguments, arrays or shapes, for a first trace.
        means: "keep" divides a mean over a cut axis by the full count, as a network with masked
            indices does; "kept" by the number of indices kept, as a smaller network would.
        make: a function of the smaller parameters, say of the same model with a smaller
            configuration. It is returned instead, if on `inputs` its outputs are seen to equal
            those of the evaluated jaxpr; otherwise a warning says why not.

    Returns:
        (smaller parameters, function of them and of inputs of any shape that `fn` takes).

    Raises:
        InputError: an index that is not there; an axis that cannot be cut, with the reason; a
            record that is not complete or not consistent over coupled axes.
    """
    if means not in MEANS:
        raise InputError(f"means must be one of {', '.join(MEANS)}, not {means!r}")
    arrays, _ = partition(params)
    function = CutFunction(fn, params, kept, means)
    function.evaluator(arrays, inputs)  # refuses what cannot be cut
    smaller = sliced(params, kept)
    if make is not None and _equals(make, function, smaller, inputs):
        return smaller, make
    return smaller, function


class CutFunction:
    """The function that `cut` returns. Inputs of a new shape trace the original function again."""

    def __init__(self, fn: Callable[..., Any], params: Any, kept: Kept, means: str):
        arrays, self._rebuild = partition(params)
        self.fn, self.kept, self.means = fn, kept, means
        self._full = [tuple(array.shape) for array in arrays]
        self._small = [tuple(a.shape) for a in partition(jax.eval_shape(_slicer(kept), params))[0]]
        self._evaluators: dict[Any, tuple[Evaluator, Callable[..., Any]]] = {}

    def evaluator(
        self, arrays: list[Any], inputs: tuple[Any, ...]
    ) -> tuple[Evaluator, Callable[..., Any]]:
        """The evaluator for parameters of these dtypes and inputs of these shapes, and its jit."""
        flat, rebuild_inputs = partition(inputs)
        structs = [
            jax.ShapeDtypeStruct(shape, array.dtype) for shape, array in zip(self._full, arrays)
        ]
        abstract = [shape_struct(x) for x in flat]
        static = rebuild_inputs([None] * len(flat))
        key = (
            tuple(s.dtype for s in structs),
            tuple((x.shape, x.dtype, x.weak_type) for x in abstract),
            tuple((type(x), x) for x in jax.tree.leaves(static)),
            jax.tree.structure(inputs),
        )
        if key not in self._evaluators:
            program = read_program(self.fn, self._rebuild(structs), rebuild_inputs(abstract))
            atoms = kept_atoms(program, self.kept)
            evaluator = Evaluator(program, atoms, self.means)
            self._evaluators[key] = evaluator, jax.jit(evaluator)
        return self._evaluators[key]

    def __call__(self, params: Any, *inputs: Any) -> Any:
        arrays, _ = partition(params)
        shapes = [tuple(array.shape) for array in arrays]
        if shapes != self._small:
            raise InputError("the parameters do not have the shapes that the cut left")
        evaluator, run = self.evaluator(arrays, inputs)
        dense = [a.dense() if is_compressed(a) else a for a in arrays]
        flat_out = run([*dense, *partition(inputs)[0]])
        return evaluator.program.rebuild_outputs(flat_out)


def _slicer(kept: Kept) -> Callable[[Any], Any]:
    return lambda params: sliced(params, kept)


def _equals(
    make: Callable[..., Any], function: CutFunction, smaller: Any, inputs: tuple[Any, ...]
) -> bool:
    """Whether `make` computes what the evaluated jaxpr does; warns why not."""
    try:
        expected, found = function(smaller, *inputs), make(smaller, *inputs)
        if all(jax.tree.leaves(jax.tree.map(_close, expected, found))):
            return True
        why = "its outputs differ from those of the cut function"
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    warnings.warn(f"cut: make is not used, the jaxpr is evaluated instead: {why}", stacklevel=3)
    return False


def _close(a: Any, b: Any) -> bool:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= 1e-4 * (1e-6 + np.abs(a).max())))


# ---------------------------------------------------------------------------- checking a record


def kept_atoms(program: Program, kept: Kept) -> dict[Atom, np.ndarray]:
    """Kept indices of each leaf, from a record over parameter axes.

    Raises:
        InputError: see `cut`.
    """
    shapes = {value.name: value.shape for value in program.parameters}
    record = checked(kept, shapes)
    found: dict[Atom, tuple[np.ndarray, str]] = {}
    for value in program.parameters:
        for k, rows in record.get(value.name, {}).items():
            where = f"axis {k} of {value.name}"
            for atom, _, index in labels(value.axes[k]):
                chosen = _chosen(index, rows, where)
                if chosen.shape[-1] == atom.size:
                    continue
                known, first = found.setdefault(atom, (chosen, where))
                if known.shape != chosen.shape or (known != chosen).any():
                    raise InputError(
                        f"kept: {where} and {first} are one axis but keep different indices"
                    )
    atoms = {atom: chosen for atom, (chosen, _) in found.items()}
    groups = {g.atom: g for g in make_groups(program) if g.atom in atoms}
    expected = combine(*(groups[atom].keep(_plain(rows)) for atom, rows in atoms.items()))
    _compare(record, expected, shapes, groups)
    return {atom: rows if rows.ndim == 1 else rows[0] for atom, rows in atoms.items()}


def _plain(rows: np.ndarray) -> np.ndarray:
    """One row where every step keeps the same indices."""
    return rows[0] if rows.ndim == 2 and (rows == rows[0]).all() else rows


def _chosen(index: np.ndarray, rows: np.ndarray, where: str) -> np.ndarray:
    """Indices of a leaf that kept positions of an axis leave, `[k]` or `[steps, k]`."""
    found = [np.unique(index[row]) for row in np.atleast_2d(rows)]
    found = [row[row >= 0] for row in found]
    if not all(len(row) for row in found):
        raise InputError(f"kept: {where} keeps no index of one of its groups; keep at least one")
    if len({len(row) for row in found}) > 1:
        raise InputError(f"kept: {where} keeps another number of indices in each step")
    return np.stack(found) if rows.ndim == 2 else found[0]


def _compare(
    record: KeptArrays,
    expected: KeptArrays,
    shapes: Mapping[str, tuple[int, ...]],
    groups: Mapping[Atom, Group],
) -> None:
    """Refuse a record that is not what the groups make of it."""
    for path, axes in expected.items():
        for axis, rows in axes.items():
            given = record.get(path, {}).get(axis)
            if given is None:
                named = {(m.path, m.axis) for g in groups.values() for m in g.members}
                partner = next((p, k) for p, k in sorted(named) if k in record.get(p, {}))
                raise InputError(
                    f"kept lacks axis {axis} of {path}, which is one axis with axis "
                    f"{partner[1]} of {partner[0]}; Group.keep gives a complete record"
                )
            if not _same(given, rows):
                raise InputError(
                    f"kept: axis {axis} of {path} keeps positions that are no whole indices of "
                    "its groups; Group.keep gives a complete record"
                )
    for path, axes in record.items():
        for axis, rows in axes.items():
            if axis not in expected.get(path, {}) and rows.shape[-1] < shapes[path][axis]:
                raise InputError(f"kept: axis {axis} of {path} cannot be cut at single positions")


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = _plain(a), _plain(b)
    return a.shape == b.shape and bool((a == b).all())
