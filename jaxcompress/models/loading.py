"""A checkpoint to a model, and a model to the tensors of a checkpoint."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.checkpoints.leaves import Leaves, open_leaves
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.selection import nearest
from jaxcompress.models.config import ModelConfig
from jaxcompress.models.families import (
    FAMILIES,
    abstract_params,
    build_model,
    family_of,
    model_from_tensors,
    name_map_of,
)
from jaxcompress.models.tokenizer import Tokenizer

# What a model needs; checkpoints on the hub carry the same weights in other formats besides.
BUILTIN = "builtin:"  # models that come with the package
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "pytorch_model*.bin")


def load(
    path: str | os.PathLike[str],
    *,
    scan_layers: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
    deferred: bool = False,
) -> Model:
    """A model from a Hugging Face directory, a hub name, or a file of weights.

    Args:
      path: a directory with `config.json`, a name on the Hugging Face hub, or a weight file
        (safetensors, PyTorch) whose architecture its tensors tell.
      scan_layers: stack the blocks along a leading axis and run them by one `scan`.
      dtype: of parameters and computation; None: as stored.
      revision: branch, tag or commit on the hub.
      config: entries that complete or replace those of `config.json`.
      deferred: leave the weights where they are; the parameters are `core.deferred.Deferred`, of
        which a walk reads those of a block when it comes to it. Not with `scan_layers`.

    Raises:
      InputError: no such path or name, an architecture that has no model here, or weights that
        are missing or do not fit the config.
    """
    checkpoint, architecture = _opened(path, scan_layers, dtype, revision, config)
    return model_from_tensors(
        architecture,
        checkpoint.read,
        checkpoint.keys(),
        dtype=None if dtype is None else architecture.param_dtype,
        abstract=checkpoint.abstract if deferred else None,
        tokenizer=Tokenizer.from_directory(checkpoint.directory),
        source=str(checkpoint.directory) if checkpoint.config else None,
    )


def load_shapes(
    path: str | os.PathLike[str],
    *,
    scan_layers: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Model:
    """The model that `load` gives, with shapes for parameters: no weight is read.

    Weights that are stored compressed count as dense.

    Args:
      path: see `load`, like the rest.
    """
    checkpoint, architecture = _opened(path, scan_layers, dtype, revision, config)
    tokenizer = Tokenizer.from_directory(checkpoint.directory)
    return build_model(architecture, abstract_params(architecture), tokenizer=tokenizer)


def _opened(
    path: str | os.PathLike[str],
    scan_layers: bool,
    dtype: str | None,
    revision: str | None,
    config: Mapping[str, Any] | None,
) -> tuple[Leaves, ModelConfig]:
    """A checkpoint, and the architecture of what it holds."""
    local = find_checkpoint(path, revision)
    checkpoint = open_leaves(local)
    names = checkpoint.keys()
    entries = {**checkpoint.config, **(config or {})}
    if "model_type" not in entries or local.is_file():
        shapes = {name: tuple(checkpoint.info(name)[0]) for name in names}
        entries = infer_config(shapes, entries, str(local))
    family = family_of(entries)
    architecture = family.config.from_hf(entries)
    if family.complete is not None:
        architecture = family.complete(architecture, names)
    stored = _stored_dtype(checkpoint, names, architecture.param_dtype)
    computed = stored if dtype is None else checked_dtype(dtype)
    architecture = dataclasses.replace(
        architecture, scan_layers=scan_layers, dtype=computed, param_dtype=computed
    )
    return checkpoint, architecture


def find_checkpoint(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local directory or file of `path`, downloaded first where it is a hub name.

    Raises:
      InputError: neither a local path nor a name that can be downloaded.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    name = os.fspath(path)
    if name.startswith(BUILTIN):
        return _builtin(name.removeprefix(BUILTIN))
    if local.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such directory or file")
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(HUB_FILES)
        )
    except Exception as error:  # hub, network and cache errors have no common base
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name}: not a local directory, and not loaded from the Hugging Face hub: {first}"
        ) from None
    return Path(found)


def _builtin(name: str) -> Path:
    shipped = Path(__file__).parent / "builtin"
    if not (shipped / name / "config.json").is_file():
        names = [folder.name for folder in sorted(shipped.glob("*")) if folder.is_dir()]
        raise InputError(f"{BUILTIN}{name}: no such model comes along; {nearest(name, names)}")
    return shipped / name


def infer_config(
    shapes: Mapping[str, tuple[int, ...]], entries: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The config of weights that carry none, from the names and shapes of their tensors.

    Args:
      shapes: of the tensors, by name.
      entries: what is known already, `model_type` perhaps.
      where: the checkpoint, for messages.

    Raises:
      InputError: no architecture fits.
    """
    settings = {key: value for key, value in entries.items() if key != "model_type"}
    wanted = entries.get("model_type")
    reasons = []
    for kind, family in FAMILIES.items():
        if family.infer is None or wanted not in (None, kind):
            continue
        try:
            return family.infer(shapes, **settings)
        except InputError as error:
            reasons.append(str(error))
    if wanted in FAMILIES and FAMILIES[wanted].infer is None:
        return dict(entries)
    hint = reasons[-1] if wanted is not None and reasons else "add a config.json beside it"
    raise InputError(f"{where}: the architecture cannot be told from the tensors; {hint}")


def to_checkpoint_tensors(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """(checkpoint name, tensor) of a model whose parameters are dense, one at a time."""
    return name_map_of(model.config).tensors(model.params)


def checked_dtype(dtype: Any) -> str:
    """The name of a floating dtype.

    Raises:
      InputError: not float32, bfloat16 or float16.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype {name!r}: use float32, bfloat16 or float16")
    return name


def _stored_dtype(checkpoint: Any, names: list[str], default: str) -> str:
    """The dtype of the largest floating tensor: configs are often wrong about it."""
    sizes = {
        name: int(np.prod(info[0]))
        for name in names
        if jnp.issubdtype((info := checkpoint.info(name))[1], jnp.floating)
    }
    if not sizes:
        return default
    name = jnp.dtype(checkpoint.info(max(sizes, key=lambda name: sizes[name]))[1]).name
    return name if name in ("float32", "bfloat16", "float16") else default
