"""One model directory into another: what `jaxcompress compress` does.

Methods that see one matrix at a time stream: a tensor is read, compressed and written before the
next one is touched, for any `model_type`. Those that look at activations walk through a reference
model and hold one block of it. Others (decisions over gradients or whole models) load it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress
from jaxcompress.checkpoints.huggingface_writer import check_replaceable
from jaxcompress.checkpoints.leaves import Leaves, open_leaves
from jaxcompress.checkpoints.tensors import TensorChunks, row_chunks
from jaxcompress.core.arrays.base import KERNEL, STORED, Dims, is_compressed
from jaxcompress.core.deferred import Deferred, in_memory, is_deferred
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Method
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.selection import Selection
from jaxcompress.export import TORCH, VERIFY_MEMORY, Export, Piece, container_for, save
from jaxcompress.layerwise.gradients import GRADIENTS
from jaxcompress.layerwise.journal import Journal
from jaxcompress.layerwise.observe import activation_names
from jaxcompress.layerwise.output_moments import OUTPUT_MOMENT, obstacle
from jaxcompress.layerwise.problem import Problem, StoredMatrix
from jaxcompress.layerwise.run import Run, check_floating
from jaxcompress.layerwise.walk import Sequential
from jaxcompress.methods import compress, resolved
from jaxcompress.models import FAMILIES, find_checkpoint, linear_paths, load, name_map_of
from jaxcompress.models.names import NameMap, Parameter, joined

ROWS_BYTES = 256 << 20  # larger matrices come in chunks of rows, where a method takes rows apart
# What a tensor's name says of it where no reference model knows it.
NOT_LINEAR = re.compile(
    r"(^|[._])(\w*embed\w*|wte|wpe|lm_head|shared|\w*norm\w*|ln_?\w?|\w*positions?|classifier)\."
)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: str,
    *,
    options: Mapping[str, Any],
    container: str = "auto",
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    calibration: Any = None,
    calibration_samples: int = 32,
    ctx: int = 512,
    seed: int = 0,
    sequential: Sequential | None = None,
    dense_target: float | None = None,
    overwrite: bool = False,
    verify_memory: int = VERIFY_MEMORY,
) -> Iterator[str]:
    """Compress the directory `source` into the new directory `out`, and tell of it in lines.

    Args:
      source: a directory or a hub name, dense or compressed.
      out: the directory to make.
      method: a name of `jaxcompress.methods.METHODS`.
      options: the method's own.
      container: see `jaxcompress.export.save`.
      include: patterns of the paths to compress; by default the linear weights.
      exclude: patterns of paths left alone.
      calibration: see `jaxcompress.compress`, like the next five.
      overwrite: replace `out`.
      verify_memory: bytes of the dense model up to which logits are compared as well.

    Raises:
      InputError: bad input; nothing is left under `out`.
    """
    _, chosen = resolved(method, options)
    check_replaceable(Path(os.path.abspath(out)), overwrite)
    local = find_checkpoint(source)
    how = [str(local.resolve()), method, dict(options), container, include, exclude]
    measured = options.get("allocation") == "measured"
    # Tensor by tensor, unless a decision or a container needs the model.
    whole = container in TORCH or bool(open_leaves(local).config.get("layer_map"))
    if chosen.statistics or measured or not chosen.per_matrix or whole:
        data = {
            "calibration": calibration,
            "calibration_samples": calibration_samples,
            "ctx": ctx,
            "seed": seed,
        }
        if chosen.selects:
            data |= {"sequential": sequential, "dense_target": dense_target}
            data |= {"include": include, "exclude": exclude}
        digest = _fingerprint([local, *_files_of(calibration)], [*how, *data.items()])
        folder = Path(os.path.abspath(out))
        folder = folder.with_name(folder.name + ".matrices")
        in_blocks = _walks(chosen) and not measured and not whole
        model = _opened(local, chosen, ctx, in_blocks=in_blocks)
        with Journal(folder, fingerprint=digest, overwrite=overwrite) as journal:
            small = compress(model, method, journal=journal, **data, **options)
            yield from small.notes
            if is_deferred(small.params):
                export = _deferred_export(model, small, container)
                yield from export.write(out, overwrite=overwrite, verify_memory=verify_memory)
                return
            yield from save(
                small, out, format=container, overwrite=overwrite, verify_memory=verify_memory
            )
        return
    leaves = open_leaves(local)
    table = Table(leaves)
    selection = Selection(include or table.linear_paths(), exclude)
    run = Run(chosen, options)
    pieces = compressed_pieces(table, run, selection)
    export = Export(
        config=leaves.config,
        # What lies beside a bare weight file is not the model's.
        companions=str(leaves.directory) if leaves.config else None,
        pieces=pieces,
        container=container_for(container, pieces, leaves.config),
        fingerprint=_fingerprint([local], how),
        what=method,
    )
    yield from export.write(out, overwrite=overwrite, verify_memory=verify_memory)
    if chosen.produces == "sparse":
        share = f"{run.zeros} of {run.entries} selected weights"
        chosen_paths = selection.resolve(table.names)
        selected = sum(leaves.abstract(table.names[path]).size for path in chosen_paths)
        some = ", of those compressed in this run" if run.entries < selected else ""
        yield f"{method}: {share} are zero ({run.sparsity:.4%}){some}"


def parameters_in(source: str | os.PathLike[str]) -> int:
    """How many parameters a directory or a hub name holds, by the shapes of its tensors."""
    leaves = open_leaves(find_checkpoint(source))
    return sum(math.prod(leaves.info(name).shape) for name in leaves.keys())


def _walks(method: Method) -> bool:
    """Whether a walk gives a method of matrices all that it asks for."""
    asked = set(method.statistics)
    return bool(activation_names(asked)) and not asked & set(GRADIENTS)


def _opened(local: Path, method: Method, ctx: int, *, in_blocks: bool) -> Model:
    """The model; its parameters deferred where it is to be walked through block by block."""
    model = load(local, deferred=in_blocks)
    if not in_blocks:
        return model
    # Without blocks it has to be whole; so for what `save` does to a config of ours alone, and
    # where gradients are taken of all of it.
    ids = jax.ShapeDtypeStruct((1, ctx), np.int32)
    whole = model.blocks is None or model.config.stock_refusal is not None
    if not whole and OUTPUT_MOMENT in method.statistics:
        whole = obstacle(model, linear_paths(model), ids) is None
    return load(local) if whole else model


def _deferred_export(model: Model, small: Model, container: str) -> Export:
    """What `save` would write of `small`, its tensors read one after the other.

    Args:
      model: of which `small` was made.
      small: with deferred parameters.
      container: see `jaxcompress.export.save`.
    """
    table = name_map_of(small.config)
    before = dict(leaves_with_paths(model.params))
    linear = {row.name for row in table.of_kind("linear", "head") if row.axes == (1, 0)}
    parts: dict[str, list[tuple[Parameter, Deferred]]] = {}
    for row, leaf in table.walk(small.params):
        parts.setdefault(row.name, []).append((row, leaf))
    pieces = {}
    for name, rows in parts.items():
        like = jax.eval_shape(partial(_tensor, rows), [leaf.like for _, leaf in rows])
        read = partial(_read_tensor, rows)
        if is_compressed(like) or any(leaf is not before[row.path] for row, leaf in rows):
            pieces[name] = Piece(read, name in linear, like)
        else:
            once = _Again(lambda read=read: iter([read()]))  # type: ignore[misc]
            pieces[name] = Piece(TensorChunks(like.shape, like.dtype, once), name in linear)
    config = small.config.to_hf()
    return Export(config, small.source, pieces, container_for(container, pieces, config))


def _tensor(rows: list[tuple[Parameter, Deferred]], leaves: list[Any]) -> Any:
    found = [row.to_checkpoint(leaf) for (row, _), leaf in zip(rows, leaves, strict=True)]
    return found[0] if rows[0][0].part is None else joined(found)


def _read_tensor(rows: list[tuple[Parameter, Deferred]]) -> Any:
    leaves = [in_memory(leaf) for _, leaf in rows]
    return _tensor(rows, [x if is_compressed(x) else np.asarray(x) for x in leaves])


class Table:
    """The tensors of a checkpoint as a person selects them: by path, with a layout."""

    def __init__(self, leaves: Leaves) -> None:
        self.leaves = leaves
        self.rows = self._known_rows()
        matrices = [n for n in leaves.keys() if len(leaves.info(n).shape) == 2 and self._weight(n)]
        self.names = {self.path(name): name for name in matrices}

    def linear_paths(self) -> list[str]:
        """Paths of the linear weights: what is compressed unless told otherwise."""
        found = [path for path, name in self.names.items() if self._is_linear(name)]
        if not found:
            raise InputError(f"{self.leaves.directory}: no linear weights found; name --include")
        return found

    def dims(self, name: str) -> Dims:
        """How the axes of a stored matrix factor: `[out, in]`, or `[in, out]` (GPT-2's)."""
        row = self.rows.get(name)
        return KERNEL if row and row.kind in ("linear", "head") and row.axes is None else STORED

    def is_linear_module(self, name: str) -> bool:
        """Whether the tensor is the `[out, in]` weight of a linear module, as far as one knows."""
        row = self.rows.get(name)
        if row is None:
            return name in self.names.values() and not self.rows
        return row.kind in ("linear", "head") and row.axes == (1, 0)

    def _known_rows(self) -> dict[str, Parameter]:
        family = FAMILIES.get(self.leaves.config.get("model_type", ""))
        if family is None:
            return {}
        table: NameMap = family.name_map(family.config.from_hf(self.leaves.config))
        known = {name: table.canonical(name) for name in self.leaves.keys()}
        return {name: table.by_name[row][0] for name, row in known.items() if row is not None}

    def path(self, name: str) -> str:
        """The path by which a person selects a tensor."""
        row = self.rows.get(name)
        return row.path if row else name.replace(".", "/")

    def _weight(self, name: str) -> bool:
        return name in self.rows if self.rows else name.endswith("weight")

    def _is_linear(self, name: str) -> bool:
        row = self.rows.get(name)
        if row is not None:
            return row.kind == "linear"
        return NOT_LINEAR.search(name.lower()) is None


def compressed_pieces(table: Table, run: Run, selection: Selection) -> dict[str, Piece]:
    """Every tensor of the checkpoint, the selected ones as functions that compress them."""
    leaves = table.leaves
    chosen = selection.resolve(table.names)
    run.survey(
        lambda: ((path, _read_matrix(table, table.names[path]), {}) for path in chosen), chosen
    )
    by_name = {table.names[path]: (path, own) for path, own in chosen.items()}
    pieces = {}
    for name in leaves.keys():
        linear = table.is_linear_module(name)
        if name in by_name:
            path, own = by_name[name]
            like = _abstract_result(table, run, name, own)
            apart = run.method.rowwise and _rows_stay_apart(like)
            pieces[name] = Piece(_compressing(table, run, name, path, own, apart), linear, like)
        else:
            pieces[name] = _untouched(leaves, name, linear)
    return pieces


def _rows_stay_apart(like: Any) -> bool:
    """Whether every buffer of the result has the matrix's rows: no scale is common to them."""
    if not is_compressed(like):
        return True
    return all(buffer.shape[-2] == like.rows for buffer in jax.tree.leaves(like))


def _compressing(
    table: Table, run: Run, name: str, path: str, own: Mapping[str, Any], rows_apart: bool
) -> Callable[[], Any]:
    def compute() -> Any:
        matrix = _read_matrix(table, name)
        stored = StoredMatrix(matrix, STORED)
        if rows_apart and not is_compressed(matrix) and matrix.nbytes > ROWS_BYTES:
            step = max(1, matrix.shape[0] * ROWS_BYTES // matrix.nbytes)
            parts = [
                run(Problem(path, jnp.asarray(matrix[at : at + step]), {}, own))
                for at in range(0, matrix.shape[0], step)
            ]
            result = jax.tree.map(lambda *buffers: np.concatenate(buffers, axis=-2), *parts)
        else:
            result = run(Problem(path, stored.matrix(), {}, own))
        return StoredMatrix(matrix, table.dims(name)).put_back(result)

    return compute


def _read_matrix(table: Table, name: str) -> Any:
    """The stored matrix `[N, K]` of a tensor; a compressed one with the dims `STORED`."""
    value = table.leaves.read(name)
    matrix = StoredMatrix(value, value.dims if is_compressed(value) else table.dims(name))
    if is_compressed(value) or matrix.dims == KERNEL:
        return matrix.matrix()
    return value


def _abstract_result(table: Table, run: Run, name: str, own: Mapping[str, Any]) -> Any:
    """What compressing a tensor will give, as shapes."""
    value = table.leaves.abstract(name)
    dense = value
    if not is_compressed(value) and table.dims(name) == KERNEL:
        value = jax.ShapeDtypeStruct(value.shape[::-1], value.dtype)
    options = {**run.options, **own}
    check_floating(table.path(name), value)
    try:
        found = jax.eval_shape(lambda w: run.method.function(w, **options), value)
    except InputError as error:
        raise InputError(f"{table.path(name)}: {error}") from None
    if is_compressed(found):
        return StoredMatrix(value, table.dims(name)).put_back(found)
    return jax.ShapeDtypeStruct(dense.shape, dense.dtype)


def _untouched(leaves: Leaves, name: str, linear: bool) -> Piece:
    form = leaves.abstract(name)
    if is_compressed(form):
        return Piece(lambda: leaves.read(name), linear, form)
    info = leaves.info(name)
    return Piece(
        TensorChunks(info.shape, info.dtype, _Again(lambda: row_chunks(leaves, name))), linear
    )


class _Again:
    """An iterable that begins anew each time it is iterated."""

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[Any]:
        return self._begin()


def _files_of(calibration: Any) -> list[Path]:
    return [Path(calibration)] if calibration and Path(calibration).is_file() else []


def _fingerprint(sources: Iterable[Path], how: list[Any]) -> str:
    """Digest of the command and of the files it reads, so that a killed run is taken up."""
    files = [f for s in sources for f in (sorted(s.iterdir()) if s.is_dir() else [s])]
    seen = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    text = json.dumps([jaxcompress.__version__, how, seen], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
