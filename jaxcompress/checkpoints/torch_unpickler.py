"""The pickles of PyTorch state dicts, interpreted without executing anything.

A pickle is a program for a small stack machine that may call any function by name. This
interpreter knows just the instructions and the few names that state dicts need, and refuses the
rest by name. Tensors come out as `StoredTensor`: where their values lie, not the values.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from jaxcompress.core.errors import InputError

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
    "UntypedStorage": np.dtype(np.uint8),
}
DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
}


class StoredTensor(NamedTuple):
    """A tensor of the file, not read: a strided view of a storage, counted in elements."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    offset: int  # elements; legacy files have views of storages


class StorageClaim(NamedTuple):
    """What a storage must hold for the tensors that refer to it."""

    dtype: np.dtype
    entries: int


class _StorageType(NamedTuple):
    dtype: np.dtype


class _Call(NamedTuple):
    """A function that the pickle may call, and only by the instruction REDUCE."""

    function: Callable[..., Any]


def _rebuild_tensor_v2(
    storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any
) -> StoredTensor:
    return StoredTensor(
        storage.key, storage.dtype, storage.offset + offset, tuple(shape), tuple(strides)
    )


def _rebuild_tensor_v3(
    storage: _Storage,
    offset: int,
    shape: tuple,
    strides: tuple,
    _grad: bool,
    _hooks: Any,
    dtype: np.dtype,
    *_: Any,
) -> StoredTensor:
    typed = _Storage(storage.key, dtype, storage.offset // dtype.itemsize)
    return _rebuild_tensor_v2(typed, offset, shape, strides)


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Call(lambda items=(): dict(items)),
    ("torch._utils", "_rebuild_tensor"): _Call(_rebuild_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): _Call(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Call(lambda data, *_: data),
    ("torch._utils", "_rebuild_parameter_with_state"): _Call(lambda data, *_: data),
    ("torch", "Size"): _Call(lambda sizes=(): tuple(sizes)),
    ("torch", "device"): _Call(lambda *parts: ":".join(str(part) for part in parts)),
    ("builtins", "set"): _Call(lambda items=(): items),
    ("__builtin__", "set"): _Call(lambda items=(): items),
    ("builtins", "complex"): _Call(lambda re, im=0.0: complex(re, im)),
    **{("torch", name): _StorageType(dtype) for name, dtype in STORAGES.items()},
    **{("torch.cuda", name): _StorageType(dtype) for name, dtype in STORAGES.items()},
    ("torch.storage", "UntypedStorage"): _StorageType(np.dtype(np.uint8)),
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
}
# The instructions of torch.save, and those that newer pickle protocols need to reach a name, so
# that what is refused is refused by its name.
_INSTRUCTIONS = [
    "PROTO", "STOP", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "MARK", "POP", "POP_MARK", "DUP",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT",
    "SETITEM", "SETITEMS", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "FRAME", "MEMOIZE",
    "SHORT_BINUNICODE", "STACK_GLOBAL",
]  # fmt: skip


class _Refused(pickle.UnpicklingError):
    """The pickle asked for something that state dicts do not need."""


class _Bounded:
    """A file whose reads never ask for more than is left, so that a claim costs no memory."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise EOFError("it ends too early")
        return self._file.read(count)


def _refusal(instruction: str) -> Callable[[Any], NoReturn]:
    def refuse(_: Any) -> NoReturn:
        raise _Refused(f"uses the instruction {instruction}")

    return refuse


# The Python implementation and not the C one: its instructions can be exchanged, and its memo is
# a dict, where the C memo is a list that a forged index makes as long as it likes.
class _Unpickler(pickle._Unpickler):
    """Runs the pickles of state dicts and refuses all others."""

    stack: list[Any]

    def __init__(self, file: _Bounded, storages: dict[str, StorageClaim]) -> None:
        super().__init__(file, encoding="utf-8")
        self._claims = storages

    def find_class(self, module: str, name: str) -> Any:
        """One of the harmless stand-ins above, whatever is installed under that name."""
        if (module, name) not in _GLOBALS:
            raise _Refused(f"asks for {module}.{name}"[:120])
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: noted with the size that it must have."""
        kind, storage_type, key, _location, count, *view = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise _Refused(f"refers to a {str(kind)[:40]!r}")
        offset = 0
        if view and view[0] is not None:
            key, offset, count = view[0][0], view[0][1], view[0][1] + view[0][2]
        key = str(key)
        claimed = self._claims.get(key, StorageClaim(storage_type.dtype, 0))
        self._claims[key] = StorageClaim(storage_type.dtype, max(count, claimed.entries))
        return _Storage(key, storage_type.dtype, offset)

    def load_reduce(self) -> None:
        """Call a stand-in; never anything else that is on the stack."""
        arguments = self.stack.pop()
        called = self.stack[-1]
        if not isinstance(called, _Call):
            raise _Refused(f"calls {str(called)[:40]!r}")
        self.stack[-1] = called.function(*arguments)

    def load_build(self) -> None:
        """Drop the attributes of a state dict (`_metadata`): nothing is set on any object."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise _Refused("sets attributes")

    dispatch: ClassVar[dict[int, Any]] = {
        code[0]: _refusal(name)
        for name, code in vars(pickle).items()
        if isinstance(code, bytes) and len(code) == 1
    }
    for _name in _INSTRUCTIONS:
        _code = getattr(pickle, _name)[0]
        dispatch[_code] = pickle._Unpickler.dispatch[_code]
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build


def unpickle(file: BinaryIO, size: int, path: Path) -> tuple[Any, dict[str, StorageClaim]]:
    """Interpret the pickle that begins at the position of `file`, of `size` bytes.

    Returns:
      The object, and for every storage that its tensors refer to, what it must hold.

    Raises:
      InputError: truncated or damaged, or asking for anything but tensors and plain data.
    """
    claims: dict[str, StorageClaim] = {}
    try:
        return _Unpickler(_Bounded(file, size), claims).load(), claims
    except _Refused as error:
        raise InputError(
            f"{path}: the pickle {error}; only tensors and plain data are loaded, and nothing was "
            "executed. Save the model's state_dict() instead"
        ) from None
    except Exception as error:  # a forged program can fail in any way, all of them bad input
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise InputError(f"{path}: the pickle cannot be read ({reason})") from None
