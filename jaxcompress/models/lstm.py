"""The LSTM language model: `nn.Embedding`, `nn.LSTM`, `nn.Linear` of PyTorch.

Hochreiter and Schmidhuber 1997; gates in PyTorch's order: input, forget, cell, output.
Parameters: `embed/embedding` `[vocab, e]`, `layers/0/ih/kernel` `[in, 4 h]`,
`layers/0/hh/kernel` `[h, 4 h]`, their `bias`, `head/kernel` `[h, vocab]`, `head/bias`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Blocks
from jaxcompress.models.config import ModelConfig
from jaxcompress.models.functions import Functions
from jaxcompress.models.layers import Embedding, Linear
from jaxcompress.models.names import NameMap, Parameter


@dataclass(frozen=True)
class LSTMConfig(ModelConfig):
    """Architecture of the LSTM language model.

    Attributes:
      vocab_size: entries of the embedding and of the output.
      embedding_dim: width of the embedding.
      hidden_size: width of every layer.
      num_hidden_layers: number of layers.
      bias: layers have biases (two each, as in PyTorch).
      output_bias: so has the output.
      names: what the checkpoint calls the embedding, the LSTM and the output.
    """

    model_type: str = "lstm"
    vocab_size: int = 1000
    embedding_dim: int = 128
    hidden_size: int = 128
    num_hidden_layers: int = 1
    bias: bool = True
    output_bias: bool = True
    names: tuple[str, ...] = ("embedding", "lstm", "fc")

    def __post_init__(self) -> None:
        if self.scan_layers:
            raise InputError("config: layers of an LSTM differ in shape; set scan_layers=False")

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.num_hidden_layers

    def take_layers(self, indices: tuple[int, ...]) -> LSTMConfig:
        """The config of the network that keeps these layers, in this order."""
        if indices[0] != 0 and self.embedding_dim != self.hidden_size:
            raise InputError(
                f"lstm: layer 0 must stay first, it takes the embedding of {self.embedding_dim} "
                f"features and the others {self.hidden_size}"
            )
        return dataclasses.replace(self, num_hidden_layers=len(indices))


class LSTMLayer(nn.Module):
    """One layer, from a zero state."""

    config: LSTMConfig

    def setup(self) -> None:
        cfg = self.config
        self.ih = Linear(4 * cfg.hidden_size, cfg.bias, cfg.dtype, cfg.param_dtype)
        self.hh = Linear(4 * cfg.hidden_size, cfg.bias, cfg.dtype, cfg.param_dtype)

    def __call__(self, x: Array) -> Array:
        """`[batch, seq, in]` to `[batch, seq, h]`, tagged `hidden`."""
        scan = nn.scan(
            LSTMLayer.step,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        zeros = jnp.zeros((x.shape[0], self.config.hidden_size), self.config.dtype)
        # What the inputs contribute to the gates is one product for all steps.
        _, out = scan(self, (zeros, zeros), self.ih(x))
        return checkpoint_name(out, "hidden")

    def step(self, state: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
        """State and one step of gate inputs `[batch, 4 h]` to the state and its output."""
        hidden, cell = state
        i, f, g, o = jnp.split(inputs + self.hh(hidden), 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (hidden, cell), hidden


class _Layers(nn.Module):
    """Children `0`, `1`, ..."""

    config: LSTMConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layer = nn.remat(LSTMLayer) if self.config.remat else LSTMLayer
        for index in range(self.config.num_hidden_layers):
            x = layer(self.config, name=str(index))(x)
        return x


class LSTM(nn.Module):
    """Token ids `[batch, seq]` to logits `[batch, seq, vocab]`."""

    config: LSTMConfig

    def setup(self) -> None:
        cfg = self.config
        self.embed = Embedding(cfg.vocab_size, cfg.embedding_dim, cfg.dtype, cfg.param_dtype)
        self.layers = _Layers(cfg)
        self.head = Linear(cfg.vocab_size, cfg.output_bias, cfg.dtype, cfg.param_dtype)

    def __call__(self, ids: Array) -> Array:
        """Logits."""
        return self.head(self.layers(self.embed(ids)))

    def embed_ids(self, ids: Array) -> Array:
        """Token ids to embeddings `[batch, seq, e]`."""
        return self.embed(ids)

    def logits(self, hidden: Array) -> Array:
        """Output of the last layer to logits."""
        return self.head(hidden)


@functools.lru_cache(maxsize=64)
def build(config: LSTMConfig) -> Functions:
    """The pure functions of an LSTM; equal configs give the same function objects."""
    module, layer = LSTM(config), LSTMLayer(config)

    def apply(params: Any, ids: Array) -> Any:
        return module.apply({"params": params}, ids)

    return Functions(
        apply=apply,
        init=lambda key: module.init(key, jnp.zeros((1, 1), jnp.int32))["params"],
        blocks=Blocks(
            embed=lambda params, ids: module.apply({"params": params}, ids, method="embed_ids"),
            block=lambda params, hidden: layer.apply({"params": params}, hidden),
            head=lambda params, hidden: module.apply({"params": params}, hidden, method="logits"),
        ),
    )


def name_map(config: LSTMConfig) -> NameMap:
    """The table between parameters and the `state_dict` of the PyTorch model."""
    embedding, lstm, output = config.names
    rows = [Parameter("embed/embedding", f"{embedding}.weight", "embedding", ("vocab", "embed"))]
    for layer in range(config.num_hidden_layers):
        for ours in ("ih", "hh"):
            path = f"layers/{layer}/{ours}"
            axes = ("embed" if ours == "ih" else "hidden", "gates")
            rows.append(
                Parameter(
                    f"{path}/kernel", f"{lstm}.weight_{ours}_l{layer}", "linear", axes, (1, 0)
                )
            )
            if config.bias:
                rows.append(
                    Parameter(f"{path}/bias", f"{lstm}.bias_{ours}_l{layer}", "bias", ("gates",))
                )
    rows.append(Parameter("head/kernel", f"{output}.weight", "head", ("hidden", "vocab"), (1, 0)))
    if config.output_bias:
        rows.append(Parameter("head/bias", f"{output}.bias", "bias", ("vocab",)))
    return NameMap(tuple(rows))


def infer(shapes: Mapping[str, tuple[int, ...]], **settings: Any) -> dict[str, Any]:
    """The config of a `state_dict`, from the names and shapes of its tensors.

    Raises:
      InputError: tensors that are not those of one embedding, one LSTM and one output layer.
    """
    shapes = {name.removeprefix("module."): shape for name, shape in shapes.items()}
    lstm = {m[1] for name in shapes if (m := re.fullmatch(r"(.+)\.weight_hh_l0", name))}
    others = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    ]
    if len(lstm) != 1 or len(others) != 2 or any("_reverse" in name for name in shapes):
        raise InputError(
            f"checkpoint: an embedding, a one-directional LSTM and an output layer were expected, "
            f"found {sorted(shapes)[:6]}"
        )
    name = lstm.pop()
    # The output takes the hidden states, so its table comes last; PyTorch keeps that order.
    embedding, output = others
    gates, hidden = shapes[f"{name}.weight_hh_l0"]
    if gates != 4 * hidden:
        raise InputError(f"checkpoint: {name} has {gates} gates for {hidden} units; no LSTM")
    return {
        "model_type": "lstm",
        "vocab_size": shapes[f"{embedding}.weight"][0],
        "embedding_dim": shapes[f"{embedding}.weight"][1],
        "hidden_size": hidden,
        "num_hidden_layers": sum(f"{name}.weight_hh_l" in key for key in shapes),
        "bias": f"{name}.bias_hh_l0" in shapes,
        "output_bias": f"{output}.bias" in shapes,
        "names": [embedding, name, output],
    } | settings
