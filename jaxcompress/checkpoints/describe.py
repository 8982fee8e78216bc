"""What a checkpoint or a pytree holds, tensor by tensor: shapes, formats, bits, sparsity, bytes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcompress.checkpoints.huggingface import open_checkpoint
from jaxcompress.checkpoints.leaves import Leaves
from jaxcompress.checkpoints.tensors import row_chunks
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import CompressedArray
from jaxcompress.core.arrays.block_sparse import BlockSparse
from jaxcompress.core.arrays.codebook import Codebook
from jaxcompress.core.arrays.floats import Float
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.arrays.shared_rows import SharedRows
from jaxcompress.core.arrays.sparse import NMSparse
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths

Found = Iterator[tuple[str, Any, str, Iterable[np.ndarray]]]


def describe(what: Any, *, sparsity: bool = True) -> dict[str, Any]:
    """A table of the tensors of a checkpoint (file or directory, by its path) or of a pytree.

    Tensors are read one at a time and in pieces, a compressed leaf whole.

    Args:
      what: a path, or a pytree of arrays and compressed arrays.
      sparsity: whether to count zeros, which reads everything.

    Returns:
      `tensors`: a list of `name`, `shape` (dense), `dtype`, `format` (see `format_of`; `as stored`
      where the format has no reader here), `bits` (stored per entry, scales counted), `sparsity`
      (fraction of zeros among the dense values, or None) and `bytes`; and `total`: `parameters`,
      `bytes`, `bits_per_weight`.

    Raises:
      InputError: the path cannot be read, or is damaged.
    """
    found = _of_path(Path(what)) if isinstance(what, (str, os.PathLike)) else _of_tree(what)
    rows = [_row(*row, sparsity) for row in found]
    parameters = sum(int(np.prod(row["shape"], dtype=np.int64)) for row in rows)
    size = sum(row["bytes"] for row in rows)
    total = {
        "parameters": parameters,
        "bytes": size,
        "bits_per_weight": 8 * size / max(parameters, 1),
    }
    return {"tensors": rows, "total": total}


def format_of(leaf: Any) -> str:
    """How a leaf is stored, in a few words: `dense`, `int4 g128`, `nf4 g64`, a class."""
    if not isinstance(leaf, CompressedArray):
        return "dense"
    if isinstance(leaf, Float):
        coded = leaf.scale_format != "float"
        return _float_name(leaf) if coded else f"{_float_name(leaf)} {_unit(leaf)}"
    if isinstance(leaf, Codebook) and leaf.fixed:
        return f"{leaf.fixed} {_unit(leaf)}"
    if not isinstance(leaf, Affine):
        inner = [b for b in leaf.buffers.values() if isinstance(b, CompressedArray)]
        of = f"({' + '.join(format_of(buffer) for buffer in inner)})" if inner else ""
        return f"{type(leaf).__name__}{_detail(leaf)}{of}"
    return f"int{leaf.bits} {_unit(leaf)}" + ("" if leaf.symmetric else " asymmetric")


def _unit(leaf: Affine | Float | Codebook) -> str:
    """What shares a scale, and how the scales are stored if not as plain floats."""
    scale: Any = leaf.scale
    if isinstance(scale, SharedRows):
        return f"block{leaf.group_size}"
    if leaf.groups > 1:
        unit = f"g{leaf.group_size}"
    else:
        unit = "tensor" if scale.size < leaf.rows else "channel"
    return f"{unit}, scales of {scale.bits} bits" if isinstance(scale, Codebook) else unit


def _float_name(leaf: Float) -> str:
    """`fp8`, `mxfp4`, `nvfp4`; other elements than the usual one of their width by their name."""
    family = {"float": "fp", "e8m0": "mxfp", "e4m3fn": "nvfp"}[leaf.scale_format]
    usual = leaf.element in ("e4m3fn", "e2m3", "e2m1")
    return f"{family}{leaf.bits}" + ("" if usual else f"_{leaf.element}")


def _detail(leaf: CompressedArray) -> str:
    match leaf:
        case NMSparse():
            return f" {leaf.n}:{leaf.m}"
        case BlockSparse():
            return f" {leaf.block[0]}x{leaf.block[1]}"
        case LowRank():
            return f" rank {leaf.rank}"
        case Codebook():
            return f" of {2**leaf.bits}"
    return ""


def _of_path(path: Path) -> Found:
    checkpoint = open_checkpoint(path)
    try:
        leaves = Leaves(checkpoint)
    except InputError:  # a format that has no reader here
        for name in checkpoint.keys():
            stored = jax.ShapeDtypeStruct(*checkpoint.info(name))
            yield name, stored, "as stored", row_chunks(checkpoint, name)
        return
    for name in leaves.keys():
        leaf = leaves.abstract(name)
        if isinstance(leaf, CompressedArray):
            leaf = leaves.read(name)
            yield name, leaf, format_of(leaf), _matrices(leaf)
        else:
            yield name, leaf, "dense", row_chunks(leaves, name)


def _of_tree(tree: Any) -> Found:
    for name, leaf in leaves_with_paths(tree):
        if isinstance(leaf, CompressedArray):
            yield name, leaf, format_of(leaf), _matrices(leaf)
        else:
            array = np.asarray(leaf)
            yield name, array, "dense", [array]


def _matrices(leaf: CompressedArray) -> Iterator[np.ndarray]:
    """The decoded matrices of a leaf, one for each index of its leading axes."""
    for index in itertools.product(*(range(n) for n in leaf.lead)):
        yield np.asarray((leaf[index] if index else leaf).matrix())


def _row(
    name: str, leaf: Any, form: str, chunks: Iterable[np.ndarray], sparsity: bool
) -> dict[str, Any]:
    shape = [int(n) for n in leaf.shape]
    entries = int(np.prod(shape, dtype=np.int64))
    compressed = isinstance(leaf, CompressedArray)
    size = int(leaf.nbytes) if compressed else entries * np.dtype(leaf.dtype).itemsize
    kept = sum(int(np.count_nonzero(chunk)) for chunk in chunks) if sparsity else 0
    return {
        "name": name,
        "shape": shape,
        "dtype": str(leaf.dtype),
        "format": form,
        "bits": 8 * size / max(entries, 1),
        "sparsity": 1 - kept / entries if sparsity and entries else None,
        "bytes": size,
    }
