"""The architecture of Llama, Mistral, Qwen2 and Qwen3, read from and written to `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxcompress.core.errors import InputError
from jaxcompress.models.config import ModelConfig
from jaxcompress.models.kv_cache import check_kv_cache_dtype
from jaxcompress.models.rope import RopeConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SHARED = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "head_dim": None,
}
_QWEN = _SHARED | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
# A config.json may leave out whatever equals the default of the class in transformers.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _SHARED
    | {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
    },
    "mistral": _SHARED
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}


@dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """Architecture of the decoder; names as in transformers where they exist there.

    Attributes:
      attention_bias: query, key and value projections have a bias.
      attention_output_bias: so does the output projection.
      qk_norm: RMS norm over the head dimension of queries and keys (Qwen3).
      windows: per block, how many positions back a query sees; None: all.
      kv_cache_dtype: of the keys and values that are attended to; see `kv_cache`. No field of
        transformers, which ignores it.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    kv_cache_dtype: str | None = None

    def __post_init__(self) -> None:
        check_kv_cache_dtype(self.kv_cache_dtype)
        if len(set(self.windows)) <= 1:
            # One window for all: it need not be repeated when the number of layers changes.
            window = self.windows[0] if self.windows else None
            object.__setattr__(self, "windows", (window,) * self.num_hidden_layers)
        if len(self.windows) != self.num_hidden_layers:
            raise InputError(
                f"config: {len(self.windows)} attention windows for {self.num_hidden_layers} layers"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config: num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.num_hidden_layers

    @property
    def stock_refusal(self) -> str | None:
        """Why transformers cannot load this config; None: it can."""
        if self.model_type != "llama" or self.hidden_size % self.num_attention_heads == 0:
            return None
        return (
            f"LlamaConfig of transformers wants hidden_size ({self.hidden_size}) to be a multiple "
            f"of num_attention_heads ({self.num_attention_heads})"
        )

    def take_layers(self, indices: tuple[int, ...]) -> DecoderConfig:
        """The config of the network that keeps these blocks, in this order."""
        return dataclasses.replace(
            self,
            num_hidden_layers=len(indices),
            windows=tuple(self.windows[i] for i in indices),
        )

    def _fresh(self) -> dict[str, Any]:
        return {"model_type": self.model_type, "architectures": [_ARCHITECTURES[self.model_type]]}

    @classmethod
    def _read(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        kind = config.get("model_type")
        if kind not in _DEFAULTS:
            raise InputError(f"config: model_type {kind!r} is not one of {', '.join(_DEFAULTS)}")
        values = {key: config.get(key, default) for key, default in _DEFAULTS[kind].items()}
        heads = values["num_attention_heads"]
        values["num_key_value_heads"] = values["num_key_value_heads"] or heads
        values["head_dim"] = values["head_dim"] or values["hidden_size"] // heads
        bias = bool(config.get("attention_bias", False)) and kind in ("llama", "qwen3")
        return values | {
            "model_type": kind,
            "rope": RopeConfig.from_hf({"max_position_embeddings": 0} | values | dict(config)),
            "attention_bias": bias or kind == "qwen2",
            "attention_output_bias": bias,
            "mlp_bias": bool(config.get("mlp_bias", False)) and kind == "llama",
            "qk_norm": kind == "qwen3",
            "windows": _read_windows(kind, values["num_hidden_layers"], config),
            "kv_cache_dtype": config.get("kv_cache_dtype"),
        }

    def _write(self, name: str, out: dict[str, Any]) -> None:
        if name == "rope":
            out.pop("rope_scaling", None)
            out.pop("rope_theta", None)
            out["rope_parameters"] = self.rope.to_hf()
        elif name == "windows":
            self._write_windows(out)
        elif name in ("qk_norm", "attention_output_bias"):
            raise InputError(f"config: a {self.model_type} model cannot have another {name}")
        else:
            out[name] = getattr(self, name)

    def _write_windows(self, out: dict[str, Any]) -> None:
        sizes = {w for w in self.windows if w is not None}
        mixed = len(set(self.windows)) > 1
        if len(sizes) > 1 or (sizes and self.model_type == "llama"):
            raise InputError(
                f"config: a {self.model_type} model cannot have windows {self.windows}"
            )
        if self.model_type == "mistral":
            if mixed:
                raise InputError("config: a mistral model has one sliding window for all layers")
            out["sliding_window"] = self.windows[0]
        elif self.model_type in ("qwen2", "qwen3"):
            out["use_sliding_window"] = bool(sizes)
            if sizes:
                out["sliding_window"] = sizes.pop()
            out["layer_types"] = [
                "full_attention" if w is None else "sliding_attention" for w in self.windows
            ]
        else:
            # Nothing is written for Llama, which has no windows; only their number changed.
            out["num_hidden_layers"] = self.num_hidden_layers


def _read_windows(kind: str, layers: int, config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The attention window of each block."""
    if kind == "mistral":
        return (config.get("sliding_window", 4096),) * layers
    if kind == "llama":
        return (None,) * layers
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if t == "sliding_attention" else None for t in types[:layers])
