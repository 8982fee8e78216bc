"""Every architecture that can be loaded: model_type -> config, functions, name map."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.models import (
    decoder,
    encoder,
    gpt2,
    lstm,
    mobilenet,
    resnet,
    transformer_decoder,
    vgg,
)
from jaxcompress.models.config import ModelConfig
from jaxcompress.models.functions import Functions
from jaxcompress.models.names import NameMap
from jaxcompress.models.sharing import shared_functions, shared_name_map


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
      config: its config class.
      build: the pure functions of a config, cached by value.
      name_map: the table between parameters and checkpoint tensors.
      infer: `infer(shapes, **settings) -> config dict` from the shapes of the tensors, for
        checkpoints that carry no `config.json`; None where that cannot be told.
      complete: `complete(config, tensor names) -> config`, for what a `config.json` leaves open;
        None where it says everything.
    """

    config: type[ModelConfig]
    build: Callable[[Any], Functions]
    name_map: Callable[[Any], NameMap]
    infer: Callable[..., dict[str, Any]] | None = None
    complete: Callable[[Any, Collection[str]], Any] | None = None


_DECODER = Family(decoder.DecoderConfig, decoder.build, decoder.name_map)
FAMILIES: dict[str, Family] = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gpt2": Family(gpt2.GPT2Config, gpt2.build, gpt2.name_map),
    "bert": Family(
        encoder.EncoderConfig, encoder.build, encoder.name_map, encoder.infer, encoder.complete
    ),
    "cifar_resnet": Family(resnet.ResNetConfig, resnet.build, resnet.name_map, resnet.infer),
    "vgg": Family(vgg.VGGConfig, vgg.build, vgg.name_map, vgg.infer),
    "mobilenet": Family(
        mobilenet.MobileNetConfig, mobilenet.build, mobilenet.name_map, mobilenet.infer
    ),
    "lstm": Family(lstm.LSTMConfig, lstm.build, lstm.name_map, lstm.infer),
    "transformer_decoder": Family(
        transformer_decoder.TransformerDecoderConfig,
        transformer_decoder.build,
        transformer_decoder.name_map,
        transformer_decoder.infer,
    ),
}


def family_of(config: ModelConfig | Mapping[str, Any] | None) -> Family:
    """The family of a config, or of a `config.json` read into a dict.

    Raises:
      InputError: a `model_type` that has no model here, or no config at all.
    """
    if config is None:
        raise InputError("model: it has no config; load it with jaxcompress.load or build_model")
    kind = config.model_type if isinstance(config, ModelConfig) else config.get("model_type")
    if kind not in FAMILIES:
        raise InputError(f"config: model_type {kind!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def functions_of(config: ModelConfig) -> Functions:
    """The pure functions of a config."""
    build = family_of(config).build
    return shared_functions(build, config) if config.layer_map else build(config)


def name_map_of(config: ModelConfig) -> NameMap:
    """The table between the parameters and the checkpoint tensors of a config."""
    table = family_of(config).name_map(config)
    return shared_name_map(table, config.layer_map) if config.layer_map else table


def linear_paths(model: Model) -> tuple[str, ...]:
    """Paths of the weights worth compressing: kernels of products and convolutions.

    Not the embeddings, norms, biases and the output layer. As they stand in `model.params`
    (blocks stacked or not); empty for a model without config.
    """
    if model.config is None:
        return ()
    rows = name_map_of(model.config).of_kind("linear", "conv")
    stacked = model.config.scan_layers
    return tuple(dict.fromkeys(row.stacked_path if stacked else row.path for row in rows))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """A tree like the parameters whose leaves are tuples of logical axis names."""
    return name_map_of(config).logical_axes(config.scan_layers)


def build_model(config: ModelConfig, params: Any = None, *, seed: int = 0, **fields: Any) -> Model:
    """A model of this architecture.

    Args:
      config: the architecture.
      params: its parameters; None draws fresh ones.
      seed: of the fresh parameters.
      **fields: other fields of `Model` (tokenizer, source).
    """
    functions = functions_of(config)
    if params is None:
        params = jax.jit(functions.init)(jax.random.key(seed))
    return Model(functions.apply, params, blocks=functions.blocks, config=config, **fields)


def model_from_tensors(
    config: ModelConfig,
    read: Callable[[str], np.ndarray],
    names: Collection[str],
    *,
    dtype: Any = None,
    abstract: Callable[[str], Any] | None = None,
    **fields: Any,
) -> Model:
    """A model with the weights of a checkpoint, read tensor by tensor.

    Args:
      config: the architecture; its `dtype` says in which type is computed.
      read: gives the tensor of a name.
      names: the names in the checkpoint.
      dtype: cast floating parameters to it; None keeps them as stored.
      abstract: gives the shapes of the tensor of a name: then no tensor is read before it is
        needed, and the parameters are `Deferred`.
      **fields: other fields of `Model` (tokenizer, source).

    Raises:
      InputError: a tensor is missing, or has not the shape that the config says.
    """
    params = name_map_of(config).load(
        read,
        names,
        scan_layers=config.scan_layers,
        dtype=dtype,
        shapes=_unrolled_shapes(dataclasses.replace(config, scan_layers=False)),
        abstract=abstract,
    )
    if abstract is None:
        leaves, tree = jax.tree.flatten(params)
        del params
        for i, leaf in enumerate(leaves):  # so that no two copies of all of them are there at once
            leaves[i] = jnp.asarray(leaf)
        params = jax.tree.unflatten(tree, leaves)
    return build_model(config, params, **fields)


def abstract_params(config: ModelConfig) -> Any:
    """The parameters as shapes and dtypes, without memory."""
    return jax.eval_shape(functions_of(config).init, jax.random.key(0))


@functools.lru_cache(maxsize=64)
def _unrolled_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    flat = flatten_dict(abstract_params(config), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def from_state_dict(tensors: Mapping[str, Any], model_type: str, **settings: Any) -> Model:
    """A model from a PyTorch `state_dict` without a `config.json`.

    Args:
      tensors: name -> array (NumPy, or anything that `np.asarray` takes).
      model_type: one of `FAMILIES` whose config can be told from the shapes of its tensors.
      **settings: what shapes do not tell (for example `num_heads`), as in the config class.

    Raises:
      InputError: the architecture cannot be told from the shapes.
    """
    family = family_of({"model_type": model_type})
    if family.infer is None:
        raise InputError(f"{model_type}: its config cannot be told from shapes; use a config.json")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = family.config.from_hf(family.infer(shapes, **settings))
    return model_from_tensors(config, lambda name: np.asarray(tensors[name]), tensors)
