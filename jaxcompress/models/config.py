"""What the architecture configs share: reading and writing a Hugging Face `config.json`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from jaxcompress.core.errors import InputError

Config = TypeVar("Config", bound="ModelConfig")

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelConfig:
    """Switches that every architecture has; subclasses add the architecture itself.

    Configs are compared and hashed by value (not by `original`), so they serve as static
    arguments of `jax.jit`.

    Attributes:
      scan_layers: parameters of the blocks stacked along a leading axis and run by one `scan`;
        otherwise one child `0`, `1`, ... per block.
      remat: recompute each block in the backward pass.
      remat_policy: name in `jax.checkpoint_policies` of what is saved all the same.
      dtype: in which activations are computed.
      param_dtype: in which parameters are initialised.
      layer_map: which of the distinct blocks each layer is, where layers share them; see `sharing`.
      original: the `config.json` this was read from; `to_hf` keeps its unknown fields.
    """

    gives_logits: ClassVar[bool] = True  # of tokens or classes

    model_type: str = ""
    scan_layers: bool = False
    remat: bool = False
    remat_policy: str = "nothing_saveable"
    dtype: str = "float32"
    param_dtype: str = "float32"
    layer_map: tuple[int, ...] = ()
    original: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_hf(cls: type[Config], config: Mapping[str, Any]) -> Config:
        """Reads a `config.json`; fields left out have the defaults of transformers.

        Raises:
          InputError: the config asks for something that the model does not compute.
        """
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        stored = stored.removeprefix("torch.")
        if stored not in _DTYPES:
            raise InputError(f"config: dtype {stored!r} is none of {', '.join(_DTYPES)}")
        return cls(
            **cls._read(config),
            dtype=stored,
            param_dtype=stored,
            layer_map=tuple(config.get("layer_map") or ()),
            original=copy.deepcopy(dict(config)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this architecture.

        Starts from `original` and writes only what differs from it, until reading the result
        gives this config back: unknown fields and old spellings stay as they were.
        """
        out = copy.deepcopy(dict(self.original)) or self._fresh()
        # Twice: a changed field (heads) may change what an absent one (head_dim) defaults to.
        for _ in range(2):
            known = type(self).from_hf(out)
            for name in self.architecture():
                if getattr(known, name) != getattr(self, name):
                    self._write(name, out)
            if known.param_dtype != self.param_dtype:
                for key in {"dtype"} | ({"torch_dtype"} & out.keys()):
                    out[key] = self.param_dtype
        out.pop("layer_map", None)
        return out | ({"layer_map": list(self.layer_map)} if self.layer_map else {})

    @classmethod
    def architecture(cls) -> tuple[str, ...]:
        """Names of the fields that describe the architecture, without the switches."""
        switches = {f.name for f in dataclasses.fields(ModelConfig)}
        return tuple(f.name for f in dataclasses.fields(cls) if f.name not in switches)

    @property
    def num_layers(self) -> int:
        """Number of blocks.

        Raises:
          InputError: an architecture that is no list of like blocks.
        """
        raise InputError(f"{self.model_type} models cannot be cut in depth: no list of like blocks")

    @property
    def max_length(self) -> int | None:
        """The longest sequence that can be computed at all, None where there is no limit."""
        return None

    @property
    def stock_refusal(self) -> str | None:
        """Why the library that the format comes from cannot load this config; None: it can."""
        return None

    def take_layers(self: Config, indices: tuple[int, ...]) -> Config:
        """The config of the network that keeps these blocks, in this order."""
        raise InputError(f"{self.model_type} models cannot be cut in depth: no list of like blocks")

    def _fresh(self) -> dict[str, Any]:
        return {"model_type": self.model_type}

    @classmethod
    def _read(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor arguments from a `config.json` whose keys are the field names."""
        values = {name: config[name] for name in cls.architecture() if name in config}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return {"model_type": config["model_type"], **values}

    def _write(self, name: str, out: dict[str, Any]) -> None:
        """Writes one field of the architecture into a `config.json`."""
        value = getattr(self, name)
        out[name] = list(value) if isinstance(value, tuple) else value
