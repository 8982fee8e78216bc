"""A checkpoint as the leaves it stands for, whatever it is stored as.

Names are those of the dense checkpoint; a leaf that is stored compressed is read as a compressed
array. All of the formats look the same through this.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcompress.checkpoints import native as native_format
from jaxcompress.checkpoints.awq import AWQ
from jaxcompress.checkpoints.bitsandbytes import BitsAndBytes
from jaxcompress.checkpoints.compressed_tensors_reader import CompressedTensors
from jaxcompress.checkpoints.gptq import CONFIG_FILE, GPTQ
from jaxcompress.checkpoints.huggingface import Checkpoint, open_checkpoint, read_json
from jaxcompress.checkpoints.prune import MASK, ORIGINAL, fold_pruned
from jaxcompress.checkpoints.tensors import TensorInfo
from jaxcompress.core.errors import InputError

READERS: dict[str, Any] = {
    "compressed-tensors": CompressedTensors,
    "gptq": GPTQ,
    "awq": AWQ,
    "bitsandbytes": BitsAndBytes,
}


class Leaves:
    """Leaves of an opened checkpoint, read lazily.

    Attributes:
      directory: where it lies.
      config: config.json without its `quantization_config`.
      stored: "dense", "native" or a name of `READERS`.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.directory: Path = checkpoint.directory
        self.config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        quantization = checkpoint.config.get("quantization_config")
        if quantization is None and (self.directory / CONFIG_FILE).exists():
            quantization = read_json(self.directory / CONFIG_FILE)
        self._source: Any = checkpoint
        self.stored = "dense"
        if native_format.is_native(checkpoint):
            self._source, self.stored = native_format.Native(checkpoint), "native"
        elif quantization is not None:
            method = quantization.get("quant_method", "gptq")  # AutoGPTQ's own file says none
            if method not in READERS:
                raise InputError(
                    f"{self.directory}: quantized by {method!r}; {', '.join(READERS)}, native and "
                    "dense checkpoints can be read"
                )
            config = {**checkpoint.config, "quantization_config": quantization}
            self._source, self.stored = READERS[method](checkpoint, config), method
        names = list(self._source.keys())
        self._pruned = {
            name.removesuffix(ORIGINAL)
            for name in names
            if name.endswith(ORIGINAL) and name.removesuffix(ORIGINAL) + MASK in names
        }
        hidden = {base + end for base in self._pruned for end in (ORIGINAL, MASK)}
        self._names = [name for name in names if name not in hidden] + sorted(self._pruned)

    def keys(self) -> list[str]:
        """Names of the leaves; `torch.nn.utils.prune`'s weight and mask count as the one leaf."""
        return list(self._names)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of the dense leaf, without reading it."""
        return self._source.info(name + ORIGINAL if name in self._pruned else name)

    def read(self, name: str) -> Any:
        """The leaf: a NumPy array or a compressed array."""
        if name in self._pruned:
            parts = {name + end: self._source.read(name + end) for end in (ORIGINAL, MASK)}
            return fold_pruned(parts)[0][name]
        return self._source.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a leaf that is stored dense."""
        if name in self._pruned:
            return self.read(name)[start:stop]
        return self._source.read_rows(name, start, stop)

    def abstract(self, name: str) -> Any:
        """The leaf as shapes and dtypes; a compressed one with its static fields."""
        if name not in self._pruned and self._source.is_compressed(name):
            # Small beside the dense leaf, and it tells every static field for certain.
            return jax.eval_shape(lambda: self.read(name))
        info = self.info(name)
        return jax.ShapeDtypeStruct(info.shape, info.dtype)


def open_leaves(path: str | os.PathLike[str]) -> Leaves:
    """Open a model directory or weight file. Raises `InputError` as `open_checkpoint` does."""
    return Leaves(open_checkpoint(path))
