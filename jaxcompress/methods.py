"""Every method by its name, and `compress`: a method run over a model or a parameter tree."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import pruning, quantization
from jaxcompress.core.arrays.base import (
    STORED,
    CompressedArray,
    Dims,
    dense,
    dims_of,
    from_matrix,
    is_compressed,
    to_matrix,
)
from jaxcompress.core.arrays.views import with_dims
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Method
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.core.selection import Selection, nearest
from jaxcompress.data.text import Text, calibration_batch
from jaxcompress.models import linear_paths
from jaxcompress.progress import progress

METHODS: dict[str, Method] = {**quantization.METHODS, **pruning.METHODS}

DEFAULT_INCLUDE = "**/kernel"


def method_named(name: str) -> Method:
    """The method of this name.

    Raises:
      InputError: there is none; names the nearest.
    """
    if name not in METHODS:
        raise InputError(f"method {name!r}: unknown; {nearest(name, METHODS)}")
    return METHODS[name]


def compress(
    model: Model,
    method: str,
    *,
    include: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    axes: Mapping[str, tuple[int, ...]] | None = None,
    calibration: Text | None = None,
    calibration_samples: int = 32,
    ctx: int = 512,
    seed: int = 0,
    journal: Journal | None = None,
    **options: Any,
) -> Model:
    """`model` compressed by a method; the parameters change, the function does not.

    Args:
      model: what is compressed.
      method: a name of `METHODS`.
      include: patterns of the paths to compress (`core.selection`); by default the linear weights
        of the reference models, elsewhere every `kernel`.
      exclude: patterns of paths left alone.
      overrides: options by pattern, such as `{"layers/0/**": {"bits": 8}}`.
      axes: contracted axes by path, from `contractions`; by default kernels are `[in, out]`.
      calibration: a text file, a text, or token ids `[samples, ctx]`; for methods that need data.
      calibration_samples: windows drawn from the text.
      ctx: tokens in a window.
      seed: of the draw.
      journal: keeps the result of each matrix, so that a killed run need not do it again.
      **options: the method's own; `METHODS[name].options` lists them.

    Raises:
      InputError: an unknown method, option, pattern, or an option out of its range.
    """
    chosen = method_named(method)
    used, unused = chosen.accepted(options)
    if unused:
        raise InputError(f"{method}: no option {unused[0]!r}; {nearest(unused[0], chosen.options)}")
    if not chosen.per_matrix and (include or exclude or overrides or axes):
        raise InputError(f"{method}: takes the whole model; no include, exclude, overrides or axes")
    if chosen.per_matrix:
        default = linear_paths(model)
        selection = Selection(include or default or DEFAULT_INCLUDE, exclude, overrides or {})
        params = compress_params(
            model.params, method, selection, axes=axes, journal=journal, **used
        )
        return model.replace(params=params)
    if chosen.needs == "calibration":
        if calibration is None:
            raise InputError(
                f"{method}: needs calibration data; pass calibration='text.txt' "
                f"(command line: --calibration text.txt)"
            )
        used["calibration"] = calibration_batch(
            calibration, model.tokenizer, samples=calibration_samples, ctx=ctx, seed=seed
        )
    return chosen.function(model, **used)


def quantize(
    params: Any,
    *,
    bits: int = 4,
    group_size: int = 128,
    include: str | list[str] = DEFAULT_INCLUDE,
    exclude: str | list[str] | None = None,
    axes: Mapping[str, tuple[int, ...]] | None = None,
    **options: Any,
) -> Any:
    """`params` with the selected leaves rounded to nearest. Options are those of `rtn`."""
    selection = Selection(include, exclude, {})
    return compress_params(
        params, "rtn", selection, axes=axes, bits=bits, group_size=group_size, **options
    )


def prune(
    params: Any,
    *,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    include: str | list[str] = DEFAULT_INCLUDE,
    exclude: str | list[str] | None = None,
    axes: Mapping[str, tuple[int, ...]] | None = None,
    **options: Any,
) -> Any:
    """`params` with the selected leaves pruned by magnitude. Options are those of `magnitude`."""
    selection = Selection(include, exclude, {})
    return compress_params(
        params, "magnitude", selection, axes=axes, sparsity=sparsity, pattern=pattern, **options
    )


def compress_params(
    params: Any,
    method: str,
    selection: Selection,
    *,
    axes: Mapping[str, tuple[int, ...]] | None = None,
    journal: Journal | None = None,
    **options: Any,
) -> Any:
    """`params` with the selected leaves run through a per-matrix method, one after the other."""
    leaves = {path: leaf for path, leaf in leaves_with_paths(params) if hasattr(leaf, "ndim")}
    chosen = selection.resolve(leaves)
    matrices = {path: StoredMatrix.of(path, leaves[path], axes) for path in chosen}
    run = Run(method_named(method), options)
    run.survey(lambda: ((path, matrices[path].matrix()) for path in chosen), chosen)
    done = {}
    for path, own in progress(chosen.items(), method, unit="matrix"):
        done[path] = None if journal is None else journal.get(path)
        if done[path] is None:
            start = time.perf_counter()
            result = run(path, matrices[path].matrix(), own)
            done[path] = jax.block_until_ready(matrices[path].put_back(result))
            if journal is not None:
                journal.put(path, done[path], time.perf_counter() - start)
    return map_with_paths(lambda path, leaf: done.get(path, leaf), params)


def compressed_shapes(
    model: Model,
    method: str,
    *,
    include: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Model | None:
    """What `compress` would give, with shapes for parameters; nothing is computed.

    Args:
      model: its parameters may be `jax.ShapeDtypeStruct`s.
      method: see `compress`, like the rest.

    Returns:
      The model; None where only the data can tell its shapes.

    Raises:
      InputError: what `compress` would raise, as far as shapes tell.
    """
    chosen = method_named(method)
    used, _ = chosen.accepted(options)
    if not chosen.per_matrix:
        shapes = chosen.shapes
        return None if shapes is None else on_shapes(lambda m: shapes(m, **used), model)
    selection = Selection(
        include or linear_paths(model) or DEFAULT_INCLUDE, exclude, overrides or {}
    )
    leaves = {path: leaf for path, leaf in leaves_with_paths(model.params) if hasattr(leaf, "ndim")}
    own = selection.resolve(leaves)
    run = Run(chosen, used)

    def shapes_of(path: str, leaf: Any) -> Any:
        if path not in own:
            return leaf
        return jax.eval_shape(lambda x: run.of_leaf(path, x, own[path]), leaf)

    return model.replace(params=map_with_paths(shapes_of, model.params))


def on_shapes(function: Callable[[Model], Model], model: Model) -> Model:
    """`function(model)`, with shapes for parameters; nothing is computed."""
    made: list[Model] = []
    leaves, tree = jax.tree.flatten(model.params)
    is_array = [hasattr(leaf, "dtype") for leaf in leaves]

    def traced(arrays: list[Any]) -> Any:
        given = iter(arrays)
        params = [next(given) if here else leaf for here, leaf in zip(is_array, leaves)]
        made.append(function(model.replace(params=jax.tree.unflatten(tree, params))))
        return made[-1].params

    params = jax.eval_shape(traced, [x for here, x in zip(is_array, leaves) if here])
    return made[-1].replace(params=params)


class Journal(Protocol):
    """Keeps results of single matrices between two runs of the same command."""

    def get(self, path: str) -> Any:
        """The result kept for a path, None where there is none."""

    def put(self, path: str, leaf: Any, seconds: float) -> None:
        """Keep a result, and how long it took."""


class StoredMatrix:
    """A leaf seen as the stored matrix `[*lead, N, K]`, and the way back."""

    def __init__(self, leaf: Any, dims: Dims) -> None:
        self.leaf, self.dims = leaf, dims

    @classmethod
    def of(cls, path: str, leaf: Any, axes: Mapping[str, tuple[int, ...]] | None) -> StoredMatrix:
        """The matrix of a leaf, by its own dims, the given contracted axes, or as a kernel."""
        if is_compressed(leaf):
            return cls(leaf, leaf.dims)
        if leaf.ndim < 2:
            raise InputError(f"{path}: has shape {leaf.shape}, only matrices can be compressed")
        if axes is not None and path in axes:
            contracted = tuple(axes[path])
            lead = getattr(axes[path], "lead", 0)
        elif axes is not None:
            raise InputError(f"{path}: no product in `axes` reads it; exclude it, or name its axes")
        else:
            contracted, lead = (leaf.ndim - 2,), leaf.ndim - 2
        return cls(leaf, dims_of(leaf.shape[lead:], tuple(a - lead for a in contracted)))

    def matrix(self) -> Any:
        """`[*lead, N, K]`: an array, or a compressed array with these dims."""
        if is_compressed(self.leaf):
            return with_dims(self.leaf, STORED)
        return to_matrix(jnp.asarray(self.leaf), self.dims)

    def put_back(self, result: Any) -> Any:
        """The leaf that takes the place of this one."""
        if isinstance(result, CompressedArray):
            return with_dims(result, self.dims)
        return from_matrix(result, self.dims)


class Run:
    """A per-matrix method with its options, over the matrices of one model.

    The same object serves parameters in memory and a checkpoint that streams by.
    """

    def __init__(self, method: Method, options: Mapping[str, Any]) -> None:
        self.method, self.options = method, dict(options)
        self.decided: dict[str, Callable[[Any], Any]] = {}
        self.zeros = self.entries = 0

    @property
    def sparsity(self) -> float:
        """Share of exact zeros in what a pruning method has given so far."""
        return self.zeros / max(self.entries, 1)

    def survey(
        self,
        matrices: Callable[[], Iterator[tuple[str, Any]]],
        chosen: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Decide over all matrices together, where the method does."""
        if self.method.survey is None:
            return
        each = self.method.survey(lambda: (matrix for _, matrix in matrices()), **self.options)
        if each is None:
            return
        if any(chosen.values()):
            raise InputError("overrides: not with a decision over all matrices together")
        self.decided = dict(zip(chosen, each, strict=True))

    def __call__(self, path: str, matrix: Any, own: Mapping[str, Any]) -> Any:
        """The method's result for one matrix; `own` are the options of this path alone."""
        check_floating(path, matrix)
        check_finite(path, matrix)
        decided = self.decided.get(path)
        result = decided(matrix) if decided else self._result(path, matrix, own)
        if self.method.produces == "sparse":
            self.zeros += int((dense(result) == 0).sum())
            self.entries += result.size
        return result

    def of_leaf(self, path: str, leaf: Any, own: Mapping[str, Any]) -> Any:
        """The leaf that takes the place of a traced one."""
        stored = StoredMatrix.of(path, leaf, None)
        matrix = stored.matrix()
        check_floating(path, matrix)
        return stored.put_back(self._result(path, matrix, own))

    def _result(self, path: str, matrix: Any, own: Mapping[str, Any]) -> Any:
        used, unused = self.method.accepted({**self.options, **own})
        if unused:
            raise InputError(f"{path}: no option {unused[0]!r} in this method")
        try:
            return self.method.function(matrix, **used)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def check_floating(path: str, matrix: Any) -> None:
    """Raise `InputError` where a matrix does not hold floating numbers."""
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise InputError(f"{path}: has dtype {matrix.dtype}, only floating weights are compressed")


def check_finite(path: str, matrix: Any) -> None:
    """Raise `InputError` where a matrix holds NaN or infinity."""
    if is_compressed(matrix):
        return
    if not bool(_all_finite(matrix)):
        bad = int(np.sum(~np.isfinite(np.asarray(matrix, np.float32))))
        raise InputError(f"{path}: {bad} weights are NaN or infinite; the checkpoint is damaged")


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()
