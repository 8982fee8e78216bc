"""Config files, and the fields that a command line changes."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcompress.core.errors import InputError
from jaxcompress.recipe.config import DataFields, MeshFields, ModelFields, read_config

SECTIONS: dict[str, type[Any]] = {"model": ModelFields, "data": DataFields, "mesh": MeshFields}


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
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file}: cannot read the config ({reason[:300]})") from None
    read_config(config)  # names a field that the file misspells before those that are changed
    if changes:
        config = _with_defaults(config)
    for change in changes:
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


def _with_defaults(config: Any) -> Any:
    """The config with the fields that it leaves out, so that they can be changed too."""
    from ml_collections import config_dict

    config = config_dict.ConfigDict(config).unlock()
    for section, fields in SECTIONS.items():
        if section not in config:
            config[section] = config_dict.ConfigDict()
        hints = typing.get_type_hints(fields)
        for field in dataclasses.fields(fields):
            if field.name in config[section] or field.default is dataclasses.MISSING:
                continue
            value = field.default
            if value is None:
                kinds = [t for t in typing.get_args(hints[field.name]) if t in (str, int, float)]
                value = config_dict.placeholder(kinds[0])
            config[section][field.name] = value
    return config.lock()
