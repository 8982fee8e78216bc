"""Writes PyTorch state dicts (.pth) without PyTorch: the zip format of PyTorch 1.6 and later."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.checkpoints.huggingface_writer import check_replaceable
from jaxcompress.checkpoints.tensors import atomic_file, raw_bytes
from jaxcompress.checkpoints.torch_unpickler import DTYPES, STORAGES
from jaxcompress.core.errors import InputError

_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}
_DTYPE_NAME = {dtype: name for name, dtype in DTYPES.items()}


def save_state_dict(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write `state` so that `torch.load(path, weights_only=True)` reads it; atomically.

    Args:
      path: the file; replaced if it is there.
      state: names to arrays, or to further such mappings. Equal arrays are stored twice.

    Raises:
      InputError: a dtype that PyTorch does not have, or a path that cannot be written.
    """
    storages: list[np.ndarray] = []
    program = b"\x80\x02" + _dict_program(state, storages) + b"."
    with (
        atomic_file(Path(path)) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"little")
        for key, array in enumerate(storages):
            entry = zipfile.ZipInfo(f"archive/data/{key}")
            with archive.open(entry, "w", force_zip64=array.nbytes >= 2**31) as out:
                out.write(raw_bytes(array))
        archive.writestr("archive/version", b"3\n")


def write_state_directory(
    out: str | os.PathLike[str],
    name: str,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    beside: Iterable[Path] = (),
    overwrite: bool = False,
) -> int:
    """Write a state dict as a directory with a config.json, which appears complete or not at all.

    Args:
      out: the directory to make.
      name: of the file of the state dict.
      state: see `save_state_dict`.
      config: contents of config.json.
      beside: files to put beside it.
      overwrite: replace `out`.

    Returns:
      Bytes of the state dict.

    Raises:
      InputError: `out` exists; see `save_state_dict`.
    """
    folder = Path(os.path.abspath(out))
    check_replaceable(folder, overwrite)
    growing = folder.with_name(folder.name + ".partial")
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir(parents=True)
    save_state_dict(growing / name, state)
    for file in beside:
        shutil.copyfile(file, growing / file.name)
    (growing / "config.json").write_text(json.dumps(config, indent=2))
    if folder.exists():
        shutil.rmtree(folder)
    growing.rename(folder)
    return (folder / name).stat().st_size


def _dict_program(state: Mapping[str, Any], storages: list[np.ndarray]) -> bytes:
    """Pickle instructions that rebuild `state`; appends the arrays to `storages`."""
    items = []
    for name, value in state.items():
        program = (
            _dict_program(value, storages)
            if isinstance(value, Mapping)
            else _tensor_program(name, np.asarray(value), storages)
        )
        items.append(_text(name) + program)
    return _ORDERED_DICT + b"(" + b"".join(items) + b"u"


def _tensor_program(name: str, array: np.ndarray, storages: list[np.ndarray]) -> bytes:
    if array.dtype not in _DTYPE_NAME:
        raise InputError(f"{name}: PyTorch has no dtype {array.dtype}")
    typed = array.dtype in _STORAGE_OF
    storage_type = (
        f"ctorch\n{_STORAGE_OF[array.dtype]}\n" if typed else ("ctorch.storage\nUntypedStorage\n")
    )
    storage = b"(" + _text("storage") + storage_type.encode() + _text(str(len(storages)))
    storage += _text("cpu") + _integer(array.size if typed else array.nbytes) + b"tQ"
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    rebuild = "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"
    dtype = b"" if typed else f"ctorch\n{_DTYPE_NAME[array.dtype]}\n".encode()
    storages.append(array)
    return (
        f"ctorch._utils\n{rebuild}\n(".encode()
        + storage
        + _integer(0)
        + _integers(array.shape)
        + _integers(strides)
        + pickle.NEWFALSE
        + _ORDERED_DICT
        + dtype
        + b"tR"
    )


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _integers(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(_integer(int(value)) for value in values) + b"t"
