"""PyTorch files (.pth, .pt, .th, .bin): weights only, read and written without PyTorch.

A PyTorch file holds a pickle of the state dict, in which every tensor is a view (offset, shape,
strides) of a numbered storage, and the storages' bytes: as entries of an uncompressed zip archive
(PyTorch 1.6 and later) or one after the other (before).

Nothing in a file is ever executed (`torch_unpickler.py`), and sizes are checked against the file
before memory is taken.
"""

from __future__ import annotations

import io
import math
import os
import struct
import threading
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxcompress.checkpoints.tensors import (
    TensorInfo,
    check_rows,
    file_errors,
    nested,
    unknown_tensor,
)
from jaxcompress.checkpoints.torch_unpickler import StoredTensor, unpickle
from jaxcompress.core.errors import InputError

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_EXPANDED_BYTES = 256 << 20  # a tensor larger than its storage (stride 0) may have this size
MAX_ENTRIES = 10_000_000
MAX_DEPTH = 64
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "params", "weights")


class TorchFile:
    """A PyTorch file opened for lazy reading; a `TensorSource` over its state dict.

    Attributes:
      path: the file.
      tree: the unpickled object, with `StoredTensor` where tensors are.

    Raises:
      InputError: unreadable, truncated, no PyTorch file, or a pickle that asks for anything but
        tensors and plain data; the message names what it asked for.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        with file_errors("read", self.path):
            self._file = open(self.path, "rb")  # noqa: SIM115 (closed by `close`)
        try:
            with file_errors("read", self.path):
                self._size = os.fstat(self._file.fileno()).st_size
                read = _read_zip if self._file.read(4) == ZIP_MAGIC else _read_legacy
                self.tree, self._storages = read(self._file, self.path, self._size)
            self._tensors = _flatten(find_state_dict(self.tree), self.path)
            for name, tensor in self._tensors.items():
                _check_tensor(tensor, self._storages, f"{self.path}: {name}")
        except BaseException:
            self._file.close()
            raise

    def keys(self) -> list[str]:
        """Names of the tensors of the state dict, levels joined by `.`, in the file's order."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor, without reading it."""
        tensor = self._tensor(name)
        return TensorInfo(tensor.shape, tensor.dtype)

    def read(self, name: str) -> np.ndarray:
        """A tensor, whole, row-major, in memory of its own."""
        return self._read_view(self._tensor(name))

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor: `[stop - start, ...]`."""
        tensor = self._tensor(name)
        check_rows(str(self.path), name, tensor.shape, start, stop)
        return self._read_view(
            tensor._replace(
                offset=tensor.offset + start * tensor.strides[0],
                shape=(stop - start, *tensor.shape[1:]),
            )
        )

    def close(self) -> None:
        """Close the file; arrays already read stay valid."""
        self._file.close()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise unknown_tensor(str(self.path), name, self._tensors)
        return self._tensors[name]

    def _read_view(self, tensor: StoredTensor) -> np.ndarray:
        span = _span(tensor.shape, tensor.strides)
        item = tensor.dtype.itemsize
        raw = np.empty(span * item, np.uint8)
        with self._lock, file_errors("read", self.path):
            self._file.seek(self._storages[tensor.storage][0] + tensor.offset * item)
            count = self._file.readinto(raw.data)
        if count != raw.size:
            raise InputError(f"{self.path}: the file has become shorter since it was opened")
        strides = tuple(stride * item for stride in tensor.strides)
        view: np.ndarray = np.ndarray(tensor.shape, tensor.dtype, raw.data, strides=strides)
        return view if span == view.size and view.flags.c_contiguous else view.copy()


def load_state_dict(path: str | os.PathLike[str], *, nest: bool = False) -> dict[str, Any]:
    """The state dict of a PyTorch file as NumPy arrays.

    Args:
      path: the file.
      nest: False: `{"layer1.weight": array}`; True: `{"layer1": {"weight": array}}`.

    Raises:
      InputError: see `TorchFile`.
    """
    with TorchFile(path) as file:
        flat = {name: file.read(name) for name in file.keys()}
    return nested(flat) if nest else flat


def find_state_dict(tree: Any) -> Any:
    """The state dict inside a training checkpoint.

    `{"state_dict": {...}, "epoch": 3}` and its like (`STATE_DICT_KEYS`) hold it under a key; any
    other object is the state dict itself. Prefixes such as `module.` stay.
    """
    for _ in range(MAX_DEPTH):
        if not isinstance(tree, dict) or any(isinstance(v, StoredTensor) for v in tree.values()):
            break
        found = [key for key in STATE_DICT_KEYS if isinstance(tree.get(key), dict)]
        if not found:
            break
        tree = tree[found[0]]
    return tree


Storages = dict[str, tuple[int, int]]  # key -> position in the file, bytes


def _read_zip(file: BinaryIO, path: Path, size: int) -> tuple[Any, Storages]:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as error:
        raise InputError(f"{path}: damaged zip archive ({str(error)[:80]})") from None
    roots = [name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise InputError(f"{path}: a zip archive without a data.pkl; no PyTorch file")
    if roots[0] + "constants.pkl" in entries:
        raise InputError(f"{path}: a TorchScript archive, which is code; save its state_dict()")
    positions = {name: _entry_range(file, info, path, size) for name, info in entries.items()}

    def content(name: str) -> bytes:
        position, length = positions[name]
        file.seek(position)
        return file.read(length)

    if roots[0] + "byteorder" in entries and content(roots[0] + "byteorder") != b"little":
        raise InputError(f"{path}: written on a big-endian machine, which is not supported")
    program = content(roots[0] + "data.pkl")
    tree, claims = unpickle(io.BytesIO(program), len(program), path)
    storages = {}
    for key, claim in claims.items():
        name = f"{roots[0]}data/{key}"
        if name not in positions:
            raise InputError(f"{path}: the pickle names a storage {key} that is not there")
        position, length = positions[name]
        if length < claim.entries * claim.dtype.itemsize:
            raise InputError(
                f"{path}: storage {key} should hold {claim.entries} {claim.dtype} and has "
                f"{length} bytes"
            )
        storages[key] = (position, length)
    return tree, storages


def _entry_range(file: BinaryIO, info: zipfile.ZipInfo, path: Path, size: int) -> tuple[int, int]:
    """Position and length of an uncompressed entry's bytes."""
    file.seek(max(info.header_offset, 0))
    local = file.read(30)
    if info.header_offset < 0 or len(local) < 30 or local[:4] != ZIP_MAGIC:
        raise InputError(f"{path}: damaged zip archive at {info.filename}")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    position = info.header_offset + 30 + name_length + extra_length
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise InputError(f"{path}: {info.filename} is compressed, which PyTorch never does")
    if position + info.file_size > size:
        raise InputError(f"{path}: {info.filename} ends after the file; it is truncated")
    return position, info.file_size


def _read_legacy(file: BinaryIO, path: Path, size: int) -> tuple[Any, Storages]:
    file.seek(0)
    if file.read(1) != b"\x80":
        raise InputError(f"{path}: no PyTorch file (neither a zip archive nor a pickle)")
    file.seek(0)
    magic, _ = unpickle(file, size, path)
    if magic != LEGACY_MAGIC:
        raise InputError(f"{path}: a pickle, but no PyTorch file; save a state_dict()")
    protocol, _ = unpickle(file, size, path)
    system, _ = unpickle(file, size, path)
    if protocol != LEGACY_PROTOCOL or not isinstance(system, dict):
        raise InputError(f"{path}: unknown version {str(protocol)[:40]} of the PyTorch format")
    if system.get("little_endian") is False:
        raise InputError(f"{path}: written on a big-endian machine, which is not supported")
    tree, claims = unpickle(file, size, path)
    keys, _ = unpickle(file, size, path)
    if not isinstance(keys, list) or not set(claims) <= {str(key) for key in keys}:
        raise InputError(f"{path}: storages are missing at the end of the file")
    storages = {}
    for key in (str(key) for key in keys):
        if key not in claims:
            raise InputError(f"{path}: a storage {key[:40]} that no tensor uses")
        head = file.read(8)
        count = int.from_bytes(head, "little")
        length = count * claims[key].dtype.itemsize
        if len(head) < 8 or count < claims[key].entries or file.tell() + length > size:
            raise InputError(f"{path}: storage {key} is shorter than its tensors; truncated?")
        storages[key] = (file.tell(), length)
        file.seek(length, os.SEEK_CUR)
    return tree, storages


def _flatten(tree: Any, path: Path) -> dict[str, StoredTensor]:
    """Tensors of nested dicts and lists by name; other leaves (epochs, options) are left out."""
    tensors: dict[str, StoredTensor] = {}
    visited = 0

    def visit(node: Any, name: str, depth: int) -> None:
        nonlocal visited
        visited += 1
        if depth > MAX_DEPTH or visited > MAX_ENTRIES:
            raise InputError(f"{path}: nested too deeply, or in a circle")
        if isinstance(node, StoredTensor):
            tensors[name or "tensor"] = node
        elif isinstance(node, dict):
            for key, child in node.items():
                visit(child, f"{name}.{key}" if name else str(key), depth + 1)
        elif isinstance(node, (list, tuple)):
            for i, child in enumerate(node):
                visit(child, f"{name}.{i}" if name else str(i), depth + 1)

    visit(tree, "", 0)
    return tensors


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided view, both included."""
    if not all(shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _check_tensor(tensor: StoredTensor, storages: Storages, where: str) -> None:
    """Raise `InputError` unless the view lies within its storage and has a sane size."""
    _, dtype, offset, shape, strides = tensor
    numbers = (*shape, *strides, offset)
    if not isinstance(dtype, np.dtype) or len(shape) != len(strides) or len(shape) > MAX_DEPTH:
        raise InputError(f"{where}: malformed tensor")
    if any(type(n) is not int or n < 0 for n in numbers):
        raise InputError(f"{where}: malformed shape {shape}, strides {strides}, offset {offset}")
    available = storages[tensor.storage][1]
    if (offset + _span(shape, strides)) * dtype.itemsize > available:
        raise InputError(
            f"{where}: a tensor of shape {list(shape)} and dtype {dtype} reaches beyond its "
            f"storage of {available} bytes"
        )
    if math.prod(shape) * dtype.itemsize > max(available, MAX_EXPANDED_BYTES):
        raise InputError(f"{where}: {list(shape)} {dtype} out of a storage of {available} bytes")
