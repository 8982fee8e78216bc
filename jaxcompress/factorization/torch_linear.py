"""Low rank for PyTorch: a state dict in which such a layer is two, and a module file that loads it.

A linear layer `X` of low rank W = A B is `X.0` with the weight B `[rank, in]` and `X.1` with the
weight A `[out, rank]` and the bias of `X`: what `nn.Sequential(nn.Linear, nn.Linear)` calls them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.checkpoints.torch_writer import write_state_directory
from jaxcompress.core.arrays.base import densify
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.models import name_map_of

WEIGHTS, MODULE = "two_linear.pth", "two_linear.py"


def write_two_linear(
    model: Model, out: str | os.PathLike[str], *, overwrite: bool = False
) -> list[str]:
    """Write `two_linear.pth`, `two_linear.py` and, of a Hugging Face model, `config.json`.

    In the directory, `from two_linear import load; load()` gives the model in PyTorch (of
    transformers), and `load(module)` puts the weights into a module of one's own whose layers have
    these names. Low rank weights of linear layers are two layers; all other compressed weights are
    written dense. `torch.load(..., weights_only=True)` reads the weights.

    Args:
      model: a reference model.
      out: the directory to make.
      overwrite: replace `out`.

    Returns:
      What there is to say.

    Raises:
      InputError: `out` exists, or a model without config, whose names in PyTorch nobody knows.
    """
    if model.config is None:
        raise InputError("two-linear: the model has no config, so that its names are unknown")
    state, split = two_linear_state(dict(name_map_of(model.config).tensors(model.params)))
    source = Path(__file__).with_name("torch_source") / MODULE
    size = write_state_directory(
        out, WEIGHTS, state, model.config.to_hf(), beside=[source], overwrite=overwrite
    )
    return [f"{out}: {WEIGHTS}, {split} linear layers as two, {size:,} bytes; load it by {MODULE}"]


def two_linear_state(tensors: dict[str, Any]) -> tuple[dict[str, np.ndarray], int]:
    """A state dict with two layers for each linear layer of low rank, and how many those are.

    Args:
      tensors: by their names in PyTorch; leaves may be compressed.
    """
    split = {
        name.removesuffix(".weight")
        for name, leaf in tensors.items()
        if isinstance(leaf, LowRank) and name.endswith(".weight") and leaf.ndim == 2
    }
    state: dict[str, np.ndarray] = {}
    for name, leaf in tensors.items():
        layer, _, what = name.rpartition(".")
        if layer in split and what == "weight":
            state[f"{layer}.0.weight"] = np.asarray(leaf.b.astype(leaf.dtype))
            state[f"{layer}.1.weight"] = np.asarray(leaf.a.astype(leaf.dtype))
        elif layer in split:
            state[f"{layer}.1.{what}"] = np.asarray(leaf)
        else:
            state[name] = np.asarray(densify(leaf))
    return state, len(split)
