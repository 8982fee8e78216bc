"""safetensors files: a lazy reader that trusts no header, and a streaming writer.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, byte range), and the
tensors' bytes, little-endian and row-major, one after the other. Format:
https://github.com/huggingface/safetensors#format

Tensors are read with plain reads into memory of their own instead of through a memory map: the
pages of a map count as resident memory of the process, and a file that is truncated under a map
ends the process with SIGBUS instead of an error.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxcompress.checkpoints.tensors import (
    TensorInfo,
    atomic_file,
    check_rows,
    file_errors,
    raw_bytes,
    unknown_tensor,
)
from jaxcompress.core.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "C64": np.complex64,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """A safetensors file opened for lazy reading.

    Opening reads the header alone and checks every claim in it against the size of the file,
    before memory is taken for anything.

    Attributes:
      path: the file.
      metadata: the header's `__metadata__`, text by text.

    Raises:
      InputError: the file cannot be read, is truncated, or its header contradicts itself or the
        file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        with file_errors("read", self.path):
            self._file = open(self.path, "rb")  # noqa: SIM115 (closed by `close`)
        try:
            with file_errors("read", self.path):
                size = os.fstat(self._file.fileno()).st_size
                header, self._start = _read_header(self._file, self.path, size)
            self.metadata = _metadata(header, self.path)
            self._ranges = _check_ranges(header, self.path, size - self._start)
        except BaseException:
            self._file.close()
            raise

    def keys(self) -> list[str]:
        """Names of the tensors, in the order of their bytes."""
        return list(self._ranges)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor, without reading it."""
        return self._entry(name)[0]

    def read(self, name: str) -> np.ndarray:
        """A tensor, whole, in memory of its own."""
        info, begin = self._entry(name)
        return self._read_at(begin, info.shape, info.dtype)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor (entries along its first axis): `[stop - start, ...]`.

        Raises:
          InputError: the tensor is a scalar or has no such rows.
        """
        (shape, dtype), begin = self._entry(name)
        check_rows(str(self.path), name, shape, start, stop)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        return self._read_at(begin + start * row_bytes, (stop - start, *shape[1:]), dtype)

    def close(self) -> None:
        """Close the file; arrays already read stay valid."""
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entry(self, name: str) -> tuple[TensorInfo, int]:
        if name not in self._ranges:
            raise unknown_tensor(str(self.path), name, self._ranges)
        return self._ranges[name]

    def _read_at(self, begin: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        out = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        with self._lock, file_errors("read", self.path):
            self._file.seek(self._start + begin)
            count = self._file.readinto(out.data)
        if count != out.size:
            raise InputError(f"{self.path}: the file has become shorter since it was opened")
        return out.view(dtype).reshape(shape)


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor, or by rows, in constant memory.

    The file appears under its name only when it is complete: it grows under a temporary name,
    is flushed to the disk and renamed. Leaving the `with` block by an exception removes it.

        with SafetensorsWriter(path, {"a": ((2, 3), "float32")}) as writer:
            writer.write_rows("a", first)    # [1, 3]
            writer.write_rows("a", second)   # [1, 3]

    Args:
      path: the file to write; replaced if it is there.
      tensors: name -> (shape, dtype) of everything that will be written, in any order.
      metadata: text by text, for the header. transformers wants `{"format": "pt"}`.

    Raises:
      InputError: a dtype that the format does not know, or a path that cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, tuple[tuple[int, ...], Any]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        infos = {n: TensorInfo(tuple(shape), np.dtype(t)) for n, (shape, t) in tensors.items()}
        header, offsets = build_header(infos, metadata, str(self.path))
        self._infos = infos
        self._next = {name: len(header) + begin for name, begin in offsets.items()}
        self._left = {name: info.nbytes for name, info in infos.items()}
        self._atomic = atomic_file(self.path)
        self._file = self._atomic.__enter__()
        self._file.write(header)

    def write(self, name: str, array: np.ndarray) -> None:
        """Write a whole tensor.

        Raises:
          ValueError: not declared, another shape or dtype than declared, or written before.
        """
        array = np.asarray(array)
        if name in self._infos and array.shape != self._infos[name].shape:
            raise ValueError(f"{name}: {array.shape} written, {self._infos[name].shape} declared")
        self._append(name, array)

    def write_rows(self, name: str, rows: np.ndarray) -> None:
        """Append rows to a tensor; those of one tensor come in order.

        Raises:
          ValueError: not declared, another row shape or dtype than declared, or too many rows.
        """
        rows = np.asarray(rows)
        if name in self._infos and rows.shape[1:] != self._infos[name].shape[1:]:
            raise ValueError(f"{name}: rows {rows.shape} of a {self._infos[name].shape} tensor")
        self._append(name, rows)

    def _append(self, name: str, array: np.ndarray) -> None:
        if name not in self._infos:
            raise ValueError(f"{name}: not declared when the file was begun")
        if array.dtype != self._infos[name].dtype:
            raise ValueError(f"{name}: {array.dtype} written, {self._infos[name].dtype} declared")
        if array.nbytes > self._left[name]:
            raise ValueError(f"{name}: more written than its declared {self._infos[name].shape}")
        with file_errors("write", self.path):
            self._file.seek(self._next[name])
            self._file.write(raw_bytes(array))
        self._next[name] += array.nbytes
        self._left[name] -= array.nbytes

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        missing = [name for name, left in self._left.items() if left]
        if kind is None and missing:
            error = ValueError(f"{self.path}: not completely written: {', '.join(missing[:3])}")
            self._atomic.__exit__(ValueError, error, None)
            raise error
        self._atomic.__exit__(kind, error, trace)


def save_file(
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors that are in memory as one safetensors file, atomically."""
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    specs = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    with SafetensorsWriter(path, specs, metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def build_header(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None, where: str
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file and where each tensor begins after them.

    Tensors lie by falling item size, so that each is aligned for readers that map the file.
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    offsets, begin = {}, 0
    for name in sorted(infos, key=lambda n: (-infos[n].dtype.itemsize, n)):
        info = infos[name]
        if info.dtype not in NAMES:
            raise InputError(f"{where}: {name}: safetensors has no dtype {info.dtype}")
        if name == "__metadata__":
            raise InputError(f"{where}: a tensor cannot be named __metadata__ in safetensors")
        end = begin + info.nbytes
        header[name] = {
            "dtype": NAMES[info.dtype],
            "shape": [int(size) for size in info.shape],
            "data_offsets": [begin, end],
        }
        offsets[name], begin = begin, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _read_header(file: BinaryIO, path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header and the position of the first tensor byte."""
    if size < 8:
        raise InputError(f"{path}: {size} bytes are no safetensors file; is it truncated?")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise InputError(
            f"{path}: claims a header of {length} bytes in a file of {size}; "
            "it is truncated or no safetensors file"
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the header is no valid JSON ({str(error)[:80]})") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is no JSON object")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name stands twice")
    return out


def _metadata(header: dict[str, Any], path: Path) -> dict[str, str]:
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path}: __metadata__ of the header does not map text to text")
    return metadata


def _check_ranges(
    header: dict[str, Any], path: Path, available: int
) -> dict[str, tuple[TensorInfo, int]]:
    """Every entry as (info, first byte), by position; the ranges must tile the data exactly."""
    entries = []
    for name, entry in header.items():
        info, begin, end = _parse_entry(name, entry, path)
        if end > available:
            raise InputError(
                f"{path}: {name} claims bytes up to {end}, the file holds {available}; "
                "it is truncated or damaged"
            )
        if end - begin != info.nbytes:
            raise InputError(
                f"{path}: {name} of shape {list(info.shape)} and dtype {info.dtype} needs "
                f"{info.nbytes} bytes, the header gives it {end - begin}"
            )
        entries.append((begin, end, name, info))
    entries.sort(key=lambda e: e[:2])
    position = 0
    for begin, end, name, _ in entries:
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise InputError(f"{path}: {name} {what}; the file is damaged")
        position = end
    if position != available:
        raise InputError(f"{path}: {available - position} bytes after the last tensor")
    return {name: (info, begin) for begin, _, name, info in entries}


def _parse_entry(name: str, entry: Any, path: Path) -> tuple[TensorInfo, int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if any(type(n) is not int or n < 0 for n in (*shape, begin, end)) or begin > end:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{path}: the header's entry for {name} is malformed") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{path}: {name} has the unknown dtype {dtype!r}")
    return TensorInfo(tuple(shape), DTYPES[dtype]), begin, end
