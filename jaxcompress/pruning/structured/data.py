"""Calibration data of a structured cut, and what the network does with them.

All statistics are those of the dense network, sums over the data; everything that is decided
later is a function of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.readers.contractions import ContractedAxes, contractions
from jaxcompress.layerwise.observe import ACTIVATIONS, Observer

TOGETHER = 2048  # tokens, or so many pixels over 32, that pass through the network at a time
MOMENTS_BYTES = 1 << 30  # of second moments that are held at a time
_EXAMPLE_TOKENS, _EXAMPLE_PIXELS = 5, 32


@dataclass(frozen=True)
class Data:
    """Inputs of a network, in chunks.

    Attributes:
      inputs: the arguments behind the parameters, `[chunks, samples, ...]` each.
      labels: `[chunks, samples]` classes, where the loss wants them; else None.
      example: nobody gave data: only shapes mean something.
    """

    inputs: tuple[Any, ...]
    labels: Any = None
    example: bool = False

    @property
    def first(self) -> tuple[Any, ...]:
        """The inputs of the first chunk."""
        return tuple(x[0] for x in self.inputs)

    def batches(self) -> list[Any]:
        """Chunks as a loss takes them: token ids, or (images, labels)."""
        if self.labels is not None:
            return list(zip(self.inputs[0], self.labels, strict=True))
        return list(self.inputs[0] if len(self.inputs) == 1 else zip(*self.inputs, strict=True))


def data_of(model: Model, calibration: Any) -> Data:
    """Calibration data in chunks; without any, inputs of the right shape for a reference model.

    Args:
      model: whose inputs they are.
      calibration: None, an array `[samples, ...]` or a tuple of them; a tuple that ends in integer
        `[samples]` ends in labels.

    Raises:
      InputError: no data for a model without config, or data without a sample.
    """
    if calibration is None:
        return Data(tuple(x[None] for x in example_inputs(model)), example=True)
    arrays = calibration if isinstance(calibration, (tuple, list)) else (calibration,)
    arrays = tuple(map(np.asarray, arrays))
    samples = len(arrays[0]) if arrays[0].ndim else 0
    if not samples or any(x.ndim == 0 or len(x) != samples for x in arrays):
        raise InputError("calibration: every input needs the same number of samples, at least one")
    each = math.prod(arrays[0].shape[1:3]) / (32 if arrays[0].ndim == 4 else 1)
    most = max(1, min(samples, int(TOGETHER / max(each, 1))))
    together = max(c for c in range(1, most + 1) if samples % c == 0)
    cut = tuple(jnp.asarray(x.reshape(-1, together, *x.shape[1:])) for x in arrays)
    labelled = len(arrays) > 1 and arrays[-1].ndim == 1 and arrays[-1].dtype.kind in "iu"
    return Data(cut[:-1], cut[-1]) if labelled else Data(cut)


def example_inputs(model: Model) -> tuple[Any, ...]:
    """Inputs of a reference model, by its config; enough to trace it.

    Raises:
      InputError: the model has no config that says what it reads.
    """
    config = model.config
    if hasattr(config, "vocab_size"):
        length = min(_EXAMPLE_TOKENS, config.max_length or _EXAMPLE_TOKENS)
        ids = np.arange(2 * length, dtype=np.int32).reshape(2, length) % config.vocab_size
        return (jnp.asarray(ids),)
    if hasattr(config, "channels"):
        shape = (2, _EXAMPLE_PIXELS, _EXAMPLE_PIXELS, config.channels)
        return (jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32),)
    raise InputError(
        "model: it has no config that says what it reads; pass calibration=, some of its inputs"
    )


@dataclass(frozen=True)
class Seen:
    """A network and its calibration data, to be asked for statistics.

    Attributes:
      model: the dense network.
      data: the calibration data.
      axes: contracted axes of every weight that a product reads, by path.
    """

    model: Model
    data: Data
    axes: dict[str, ContractedAxes]

    @classmethod
    def of(cls, model: Model, data: Data) -> Seen:
        """Reads the contracted axes off the model."""
        return cls(model, data, contractions(model.apply)(model.params, *data.first))

    def need(self, what: str) -> Data:
        """The data. Raises `InputError` where nobody gave any."""
        if self.data.example:
            raise InputError(
                f"{what}: needs calibration data; pass calibration= (command line: --calibration)"
            )
        return self.data

    def activations(
        self, paths: Collection[str], names: Sequence[str]
    ) -> dict[str, dict[str, jax.Array]]:
        """`{path: {name: sum}}` over the inputs of the weights, with `count`.

        Args:
          paths: of weights that products read.
          names: of `layerwise.observe.ACTIVATIONS`.
        """
        data = self.need(", ".join(names))
        assert set(names) <= set(ACTIVATIONS)
        apply = self.model.apply
        observer = Observer(lambda params, inputs: apply(params, *inputs), list(paths), list(names))
        return observer.statistics(list(paths), self.model.params, data.inputs)

    def by_memory(self, sizes: dict[str, int]) -> list[list[str]]:
        """Paths in runs whose second moments, of so many entries each, fit into memory."""
        runs: list[list[str]] = [[]]
        left = MOMENTS_BYTES
        for path, entries in sizes.items():
            if runs[-1] and 4 * entries > left:
                runs.append([])
                left = MOMENTS_BYTES
            runs[-1].append(path)
            left -= 4 * entries
        return runs
