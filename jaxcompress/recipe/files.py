"""Config files, and the fields that a command line changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcompress.core.errors import InputError
from jaxcompress.recipe.config import read_config


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
    config_flags.DEFINE_config_file("config", flag_values=values)
    known = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=known)
    try:
        known(["jaxcompress", f"--config={path}"])
        config = known["config"].value
    except Exception as error:  # whatever the file's own code raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file}: cannot read the config ({reason[:300]})") from None
    read_config(config)  # names a misspelt field before a change of it is looked at
    try:
        values(["jaxcompress", f"--config={path}", *changes])
        return values["config"].value
    except Exception as error:  # absl and ml_collections raise several classes
        reason = " ".join(str(error).split())
        raise InputError(f"{' '.join(changes)}: {reason[:300]}") from None
