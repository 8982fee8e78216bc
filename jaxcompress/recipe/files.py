"""Config files, and the fields that a command line changes."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcompress.core.errors import InputError
from jaxcompress.core.selection import nearest
from jaxcompress.recipe.config import DataFields, MeshFields, ModelFields, Recipe, read_config
from jaxcompress.recipe.stages import is_stage, type_of_option

SECTIONS: dict[str, type[Any]] = {"model": ModelFields, "data": DataFields, "mesh": MeshFields}

# A field, its place in a list, and the field within: `--config.stages[1].steps=10`.
_CHANGE = re.compile(r"--config\.(\w+)(?:\[(\d+)\])?(?:\.(\w+))?")


def read_file(path: str, changes: Sequence[str] = ()) -> Any:
    """The `ConfigDict` that a config file gives, with some fields changed.

    Args:
      path: a Python file that defines `get_config()`; `FILE:ARG` calls `get_config(ARG)`.
      changes: such as `--config.mesh.fsdp=4` or `--config.stages[1].steps=10`.

    Raises:
      InputError: no such file, an error in it, or a change of a field that does not exist.
    """
    from absl import flags
    from ml_collections import config_flags

    other = next((c for c in changes if not c.startswith("--config.")), None)
    if other is not None:
        raise InputError(f"{other}: unknown; fields of the config are --config.FIELD=VALUE")
    file = path.split(":", 1)[0]
    if not Path(file).is_file():
        raise InputError(f"{file}: no such config file")
    values = flags.FlagValues()
    command = ["jaxcompress", f"--config={path}"]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    try:
        values(command)
        config = values["config"].value
    except Exception as error:  # whatever the file's own code raises
        text = str(error)  # the last line of a traceback says what it was
        words = text.splitlines()[-1] if "Traceback" in text else text
        reason = " ".join(words.split()) or type(error).__name__
        raise InputError(f"{file}: cannot read the config ({reason[:300]})") from None
    recipe = read_config(config)  # names what the file misspells before what is changed
    if changes:
        config = _with_defaults(config)
    for change in changes:
        _check_name(config, change, recipe)
        config = _changed(config, change)
    return config


def _changed(config: Any, change: str) -> Any:
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    command = ["jaxcompress", change]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command)
        values(command)
        return values["config"].value
    except Exception as error:  # absl and ml_collections raise several classes
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{change}: no such field, or no value for it ({reason})") from None


def _check_name(config: Any, change: str, recipe: Recipe) -> None:
    """Raise `InputError` unless the field exists; an option that a stage leaves out is put in."""
    found = _CHANGE.match(change)
    name, place, inner = found.groups() if found else ("", None, None)
    fields = [field.name for field in dataclasses.fields(Recipe)]
    if name not in fields:
        raise InputError(f"{change}: no such field; {nearest(name, fields)}")
    if inner is not None and name in SECTIONS:
        fields = [field.name for field in dataclasses.fields(SECTIONS[name])]
        if inner not in fields:
            raise InputError(f"{change}: no such field; {nearest(inner, fields)}")
    if inner is None or place is None or int(place) >= len(recipe.stages):
        return
    given = recipe.stages[int(place)]
    if inner not in given and is_stage(given.get("method")):
        hint = type_of_option(given["method"], inner, f"config.stages[{place}]")
        kinds = [t for t in (hint, *typing.get_args(hint)) if t in (bool, int, float, str)]
        if kinds:
            config.stages[int(place)][inner] = kinds[0]()  # the type as which the change is read


def _with_defaults(config: Any) -> Any:
    """The config with the fields that it leaves out, so that they can be changed too."""
    from ml_collections import config_dict

    def fill(given: Any, fields: type[Any]) -> None:
        hints = typing.get_type_hints(fields)
        for field in dataclasses.fields(fields):
            if field.name in given or field.default is dataclasses.MISSING:
                continue
            value = field.default
            if value is None:
                kinds = [t for t in typing.get_args(hints[field.name]) if t in (str, int, float)]
                value = config_dict.placeholder(kinds[0])
            given[field.name] = value

    config = config_dict.ConfigDict(config).unlock()
    fill(config, Recipe)
    for section, fields in SECTIONS.items():
        if section not in config:
            config[section] = config_dict.ConfigDict()
        fill(config[section], fields)
    return config.lock()
