"""Hugging Face model directories: config.json, weights in one or several files, companions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.checkpoints.safetensors import SafetensorsFile
from jaxcompress.checkpoints.tensors import (
    TensorInfo,
    TensorSource,
    file_errors,
    unknown_tensor,
)
from jaxcompress.checkpoints.torch_pickle import TorchFile
from jaxcompress.core.errors import InputError

STEM = "model"  # transformers opens model.safetensors, and nothing of another name
NATIVE_STEM = "native"  # so that it refuses what it would misread
TORCH_SINGLE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

# Files that hold weights, or describe how weights are stored: they do not travel with new weights.
_TORCH_SUFFIXES = {".bin", ".pt", ".pth", ".th", ".ckpt"}
WEIGHT_SUFFIXES = _TORCH_SUFFIXES | {
    ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz", ".tflite", ".partial",
}  # fmt: skip
STORAGE_FILES = frozenset(
    {"config.json", "quantize_config.json", "hf_quant_config.json", "recipe.yaml"}
)
MAX_COMPANION_BYTES = 256 << 20


class Checkpoint:
    """A model directory opened for lazy reading: a `TensorSource` over all of its weight files.

    Attributes:
      directory: where it lies.
      config: the parsed `config.json`; empty where there is none.
    """

    def __init__(
        self, directory: Path, config: dict[str, Any], sources: dict[str, TensorSource]
    ) -> None:
        self.directory = directory
        self.config = config
        self._sources = sources

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._sources)

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor, without reading it."""
        return self._source(name).info(name)

    def read(self, name: str) -> np.ndarray:
        """A tensor, whole, in memory of its own."""
        return self._source(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor: `[stop - start, ...]`."""
        return self._source(name).read_rows(name, start, stop)

    def is_compressed(self, name: str) -> bool:
        """False: every tensor is what it says."""
        return False

    @property
    def metadata(self) -> dict[str, str]:
        """`__metadata__` of all weight files, later files before earlier ones."""
        files = {id(source): source for source in self._sources.values()}.values()
        merged: dict[str, str] = {}
        for file in files:
            merged.update(getattr(file, "metadata", {}))
        return merged

    @property
    def companions(self) -> list[Path]:
        """Files that travel along with the weights, relative to the directory.

        Tokenizer, generation config, chat templates, processors, model card, licence, custom
        code (copied, never run); not config.json and nothing that describes stored weights.
        """
        return companions_of(self.directory)

    def _source(self, name: str) -> TensorSource:
        if name not in self._sources:
            raise unknown_tensor(str(self.directory), name, self._sources)
        return self._sources[name]


def open_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face directory, or one weight file, without reading any tensor.

    Weights are looked for in this order: `model.safetensors`, the sharded
    `model.safetensors.index.json`, any single other `*.safetensors`, `pytorch_model.bin`, its
    index. Headers of all shards are read and checked at once, so that a damaged shard is found
    before hours of work and not after.

    Raises:
      InputError: missing, unreadable or damaged files.
    """
    root = Path(directory)
    if root.is_file():
        return Checkpoint(root.parent, _config_of(root.parent), _open_file(root))
    if not root.is_dir():
        raise InputError(f"{root}: no such directory or file")
    for stem in (STEM, NATIVE_STEM):
        if (root / single_name(stem)).exists():
            return Checkpoint(root, _config_of(root), _open_file(root / single_name(stem)))
        if (root / index_name(stem)).exists():
            return Checkpoint(root, _config_of(root), _open_shards(root, index_name(stem)))
    others = sorted(root.glob("*.safetensors"))
    if len(others) == 1:
        return Checkpoint(root, _config_of(root), _open_file(others[0]))
    if others:
        raise InputError(f"{root}: {len(others)} safetensors files but no index to join them")
    if (root / TORCH_SINGLE).exists():
        return Checkpoint(root, _config_of(root), _open_file(root / TORCH_SINGLE))
    if (root / TORCH_INDEX).exists():
        return Checkpoint(root, _config_of(root), _open_shards(root, TORCH_INDEX))
    raise InputError(f"{root}: no weights here (safetensors or {TORCH_SINGLE})")


def single_name(stem: str) -> str:
    """Name of the weight file where there is one."""
    return f"{stem}.safetensors"


def index_name(stem: str) -> str:
    """Name of the file that joins several weight files."""
    return f"{stem}.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      InputError: unreadable, no valid JSON, or not an object.
    """
    try:
        with file_errors("read", path):
            value = json.loads(path.read_bytes())
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no valid JSON ({str(error)[:80]})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object was expected")
    return value


def companions_of(directory: Path) -> list[Path]:
    """See `Checkpoint.companions`."""
    candidates = [*directory.iterdir(), *directory.glob("chat_templates/*.jinja")]
    candidates += directory.glob("[0-9]_*/config.json")  # modules of sentence-transformers
    return sorted(
        path.relative_to(directory)
        for path in candidates
        if path.is_file()
        and path.suffix not in WEIGHT_SUFFIXES
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
        and not (path.parent == directory and path.name in STORAGE_FILES)
        and path.stat().st_size <= MAX_COMPANION_BYTES
    )


def _config_of(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    return read_json(path) if path.exists() else {}


def _open_file(path: Path) -> dict[str, TensorSource]:
    is_torch = path.suffix in _TORCH_SUFFIXES
    source: TensorSource = TorchFile(path) if is_torch else SafetensorsFile(path)
    return dict.fromkeys(source.keys(), source)


def _open_shards(root: Path, index_file: str) -> dict[str, TensorSource]:
    index = root / index_file
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no weight_map in it")
    opened: dict[str, dict[str, TensorSource]] = {}
    sources: dict[str, TensorSource] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise InputError(f"{index}: {name} lies in {file!r}, which is no plain file name")
        if file not in opened:
            if not (root / file).is_file():
                raise InputError(f"{index}: names {file}, which is not in {root}")
            opened[file] = _open_file(root / file)
        if name not in opened[file]:
            raise InputError(f"{index}: {name} should be in {file} and is not")
        sources[name] = opened[file][name]
    return sources
