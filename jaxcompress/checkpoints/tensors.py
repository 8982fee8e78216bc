"""What every checkpoint format here has in common: named tensors, read whole or by rows."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from jaxcompress.core.errors import InputError

CHUNK_BYTES = 64 << 20  # a piece of a large tensor, where one is walked through in pieces


class TensorInfo(NamedTuple):
    """Shape and dtype of a stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's values."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors on disk. Nothing is in memory before it is asked for."""

    def keys(self) -> list[str]:
        """Names of the tensors, in the order of the file."""

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor, without reading it."""

    def read(self, name: str) -> np.ndarray:
        """A tensor, whole, in memory of its own."""

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries `start` to `stop` along the first axis of a tensor."""


@dataclass(frozen=True)
class TensorChunks:
    """A tensor that arrives in pieces: `chunks` concatenate along axis 0 to `shape`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Iterable[np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def row_chunks(
    source: TensorSource, name: str, max_bytes: int = CHUNK_BYTES
) -> Iterator[np.ndarray]:
    """A tensor in pieces along axis 0, each of at most `max_bytes` (one row at least)."""
    shape, dtype = source.info(name)
    if not shape:
        yield source.read(name)
        return
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    step = max(1, max_bytes // max(row_bytes, 1))
    for start in range(0, shape[0], step):
        yield source.read_rows(name, start, min(start + step, shape[0]))


def check_rows(where: str, name: str, shape: tuple[int, ...], start: int, stop: int) -> None:
    """Raise `InputError` unless `start:stop` are rows of a tensor of this shape."""
    if not shape or not 0 <= start <= stop <= shape[0]:
        raise InputError(f"{where}: {name} of shape {list(shape)} has no rows {start}:{stop}")


def unknown_tensor(where: str, name: str, names: Iterable[str]) -> InputError:
    """The error for a name that is not there, with the names most like it."""
    near = difflib.get_close_matches(name, list(names), n=3)
    hint = f"; near it: {', '.join(near)}" if near else ""
    return InputError(f"{where}: no tensor {name!r}{hint}")


def nested(flat: dict[str, np.ndarray], separator: str = ".") -> dict:
    """`{"a.b": x}` as `{"a": {"b": x}}`.

    Raises:
      InputError: one name is a prefix of another, so that it would be leaf and branch at once.
    """
    tree: dict = {}
    for name, value in flat.items():
        *branches, leaf = name.split(separator)
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise InputError(f"tensor {name!r}: {branch!r} on its path is a tensor already")
        if leaf in node:
            raise InputError(f"tensor {name!r} is also a prefix of another tensor's name")
        node[leaf] = value
    return tree


@contextlib.contextmanager
def file_errors(doing: str, path: Path | str) -> Iterator[None]:
    """Turn the system's refusal (missing, forbidden, full disk, ...) into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot {doing} {path}: {reason}") from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under `path` only when the block ends without an error.

    It grows as `path.partial`, is flushed to the disk and renamed; an error removes it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with file_errors("write", path), open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    with file_errors("write", path):
        os.replace(partial, path)
        sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, and its directory, that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power cut, where the system allows it."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def raw_bytes(array: np.ndarray) -> memoryview:
    """The values of an array as bytes, row-major, without a copy where they lie so already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
