"""Checkpoints in which the weight of a module is several tensors: what their readers share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxcompress.checkpoints.tensors import TensorInfo, TensorSource, check_rows, unknown_tensor
from jaxcompress.core.arrays.base import dense
from jaxcompress.core.errors import InputError

DTYPES = {t.__name__: np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)}


class QuantizedModules:
    """A checkpoint as the tensors that it stands for: names and shapes are the dense ones.

    Args:
      checkpoint: the opened directory.
      config: its config.json.
      modules: names of the modules whose `weight` is stored as several tensors.
      parts: the names that these tensors may have behind the module's, and a dot.
    """

    what = ""  # the format's name, for messages

    def __init__(
        self,
        checkpoint: TensorSource,
        config: Mapping[str, Any],
        modules: Collection[str],
        parts: Collection[str],
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._stored = set(checkpoint.keys())
        self._parts = tuple(parts)
        self._modules = {f"{module}.weight": module for module in modules}
        hidden = {f"{module}.{part}" for module in modules for part in (*parts, "weight")}
        self._names = [name for name in checkpoint.keys() if name not in hidden]
        self._names += sorted(self._modules)

    @abstractmethod
    def decode(self, module: str, parts: dict[str, np.ndarray]) -> Any:
        """The weight of a module.

        Args:
          module: its name.
          parts: its tensors, by what their names end in.

        Raises:
          InputError: a format that is not read here.
          ValueError, KeyError, IndexError, TypeError: the tensors contradict each other.
        """

    @abstractmethod
    def shape(self, module: str) -> tuple[int, ...]:
        """Shape of the dense weight of a module."""

    @abstractmethod
    def dtype(self, module: str) -> np.dtype:
        """Dtype of the dense weight of a module."""

    def keys(self) -> list[str]:
        """Names of the tensors of the dense checkpoint."""
        return list(self._names)

    def read(self, name: str) -> Any:
        """A tensor: a compressed array, or a dense one.

        Raises:
          InputError: no such tensor, or its parts contradict each other.
        """
        if name not in self._modules:
            if name not in self._names:
                raise unknown_tensor(self.what, name, self._names)
            return self._checkpoint.read(name)
        module = self._modules[name]
        stored = [p for p in (*self._parts, "weight") if f"{module}.{p}" in self._stored]
        parts = {part: self._checkpoint.read(f"{module}.{part}") for part in stored}
        try:
            return self.decode(module, parts)
        except InputError:
            raise
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise InputError(f"{module}: its tensors contradict each other ({error})") from None

    def is_compressed(self, name: str) -> bool:
        """Whether `read` may give a compressed array."""
        return name in self._modules

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a dense tensor. What is not stored dense is decoded whole for it."""
        if name not in self._modules:
            return self._checkpoint.read_rows(name, start, stop)
        rows = np.asarray(dense(self.read(name)))
        check_rows(self.what, name, rows.shape, start, stop)
        return rows[start:stop]

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of the dense tensor."""
        if name not in self._modules:
            return self._checkpoint.info(name)
        module = self._modules[name]
        return TensorInfo(self.shape(module), self.dtype(module))


def modules_with(checkpoint: TensorSource, *parts: str) -> set[str]:
    """Names of the modules that have a tensor of one of these names."""
    split = (name.rpartition(".") for name in checkpoint.keys())
    return {module for module, _, part in split if part in parts}


def config_dtype(config: Mapping[str, Any], default: Any) -> np.dtype:
    """The dtype of the weights by config.json."""
    return DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), np.dtype(default))
