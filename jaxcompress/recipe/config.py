"""The config of a recipe: which fields there are, and a clear line for each wrong one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.selection import nearest

SEEDS = 2**31  # so that a seed and the place of a stage still make one


@dataclass(frozen=True)
class ModelFields:
    """`config.model`: where the recipe begins.

    Attributes:
      path: a directory, a hub name, `builtin:NAME` or a weight file; or None for a fresh model.
      architecture: of a fresh model: entries of its `config.json`.
      tokenizer: of a fresh model: a directory with a tokenizer, or `train:SIZE` for a byte-level
        one of so many tokens, trained on the training text.
      arch: what a bare state dict is, see `jaxcompress.load`.
      revision: branch, tag or commit on the hub.
      compute_dtype: in which is computed; parameters that train are float32.
      scan_layers: blocks stacked and run by one `scan`.
      remat: recompute each block in the backward pass.
    """

    path: str | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    arch: str | None = None
    revision: str | None = None
    compute_dtype: str = "float32"
    scan_layers: bool = False
    remat: bool = False


@dataclass(frozen=True)
class DataFields:
    """`config.data`: text or images (see `jaxcompress.data.sources` for what may be named).

    Attributes:
      train: what stages train on.
      heldout: what quality is measured on, and no stage sees.
      calibration: for methods that need data; None: `train`.
      ctx: tokens in a window.
      tokens: of each measured text at most so many; None: all of the held-out one, and as many of
        the training one.
      images: of each measured set of images at most so many.
      slices: parts of the measured data whose spread is told.
      speed: whether the forward pass is timed behind every stage.
      column: of a data set that holds the text.
      augment: images are cropped and flipped at random in training.
    """

    train: str | Sequence[str] | None = None
    heldout: str | Sequence[str] | None = None
    calibration: str | Sequence[str] | None = None
    ctx: int = 512
    tokens: int | None = None
    images: int | None = None
    slices: int = 5
    speed: bool = False
    column: str = "text"
    augment: bool = True


@dataclass(frozen=True)
class MeshFields:
    """`config.mesh`: sizes of the mesh of all devices, one of them -1: what remains.

    Attributes:
      data: copies of the model.
      fsdp: pieces of the parameters.
      tensor: pieces of each product.
      parallel: "jit", or "pmap" for plain data parallelism in one process.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    parallel: str = "jit"


@dataclass(frozen=True)
class Recipe:
    """A config whose fields were checked.

    Attributes:
      name: of the run, in its report.
      seed: of fresh parameters, data order, draws and random keys.
      model: where it begins.
      data: what is trained and measured on.
      mesh: of devices.
      stages: `{"method": NAME, option: value, ...}` in order.
    """

    name: str = "recipe"
    seed: int = 0
    model: ModelFields = field(default_factory=ModelFields)
    data: DataFields = field(default_factory=DataFields)
    mesh: MeshFields = field(default_factory=MeshFields)
    stages: tuple[Mapping[str, Any], ...] = ()

    def plain(self) -> dict[str, Any]:
        """The whole config as JSON-able values, defaults filled in."""
        return dict(json.loads(json.dumps(dataclasses.asdict(self), default=list)))


def read_config(config: Any) -> Recipe:
    """A checked recipe of an `ml_collections.ConfigDict` or nested dicts.

    Raises:
      InputError: a field that is unknown (names the nearest), of the wrong type or out of range.
    """
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise InputError(f"config: a {type(config).__name__}, must be a ConfigDict or a dict")
    recipe: Recipe = _build(Recipe, _plain(config, "config"), "config")
    if not 0 <= recipe.seed < SEEDS:
        raise InputError(f"config.seed {recipe.seed}: must be 0 or more, and less than {SEEDS}")
    return recipe


def _plain(value: Any, where: str) -> Any:
    """`value` as what JSON holds, lists as tuples; the config is kept beside the results."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} {value}: must be a finite number")
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise InputError(
            f"{where}: is a {type(value).__name__}; must be a number, text, True, False or None, "
            "or a list or dict of them"
        )
    return value


def _build(cls: type[Any], given: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    for name in given:
        if name not in hints:
            raise InputError(f"{where}.{name}: no such field; {nearest(name, hints)}")
    made = {}
    for name, value in given.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise InputError(f"{where}.{name} {value!r}: must be a dict of fields")
            made[name] = _build(typing.cast(type, hint), value, f"{where}.{name}")
        else:
            made[name] = checked(value, hint, f"{where}.{name}")
    return cls(**made)


def checked(value: Any, hint: Any, where: str) -> Any:
    """`value`, if it is of the type `hint`; whole numbers serve as floats.

    Raises:
      InputError: it is not; names `where`.
    """
    choices = typing.get_args(hint) if _is_union(hint) else (hint,)
    for choice in choices:
        origin = typing.get_origin(choice) or choice
        if origin is typing.Literal:
            allowed = typing.get_args(choice)
            if value not in allowed:
                raise InputError(f"{where} {value!r}: use one of {', '.join(map(str, allowed))}")
            return value
        if origin is Any or (origin is float and type(value) is int):
            return value
        if isinstance(origin, type) and isinstance(value, origin):
            is_flag = isinstance(value, bool) and origin in (int, float)
            is_text = isinstance(value, str) and origin not in (str, object)
            if is_flag or is_text:
                continue
            if origin in (tuple, Sequence):
                item, listed = typing.get_args(choice)[0], list(typing.cast(Sequence[Any], value))
                return tuple(checked(v, item, f"{where}[{i}]") for i, v in enumerate(listed))
            if origin is Mapping:
                item, table = typing.get_args(choice)[1], typing.cast(Mapping[str, Any], value)
                return {name: checked(v, item, f"{where}.{name}") for name, v in table.items()}
            return value
    wanted = " or ".join(_name(choice) for choice in choices)
    raise InputError(f"{where} {value!r}: must be {wanted}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _name(hint: Any) -> str:
    if hint is type(None):
        return "None"
    kind = typing.get_origin(hint) or hint
    words = {Mapping: "a dict", Sequence: "a list", tuple: "a list", str: "text"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def differences(before: Any, now: Any, where: str = "config") -> list[str]:
    """What changed between two JSON-able values, a line for each field."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found = []
        for name in {**before, **now}:
            found += differences(before.get(name), now.get(name), f"{where}.{name}")
        return found
    if isinstance(before, list) and isinstance(now, list):
        found = []
        if len(before) != len(now):
            found.append(f"{where}: {len(before)} entries before, {len(now)} now")
        for i, pair in enumerate(zip(before, now)):
            found += differences(*pair, f"{where}[{i}]")
        return found
    return [] if before == now else [f"{where}: {_short(before)} before, {_short(now)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
