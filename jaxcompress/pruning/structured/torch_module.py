"""A network for PyTorch: its state dict, and a short module file beside it that loads it.

For architectures that no library has a class for once their layers differ in width: the pruned
ResNet, VGG, MobileNet and LSTM.
"""

from __future__ import annotations

import os
import pprint
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.checkpoints.tensors import atomic_file
from jaxcompress.checkpoints.torch_writer import save_state_dict
from jaxcompress.core.arrays.base import dense
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import map_with_paths
from jaxcompress.models import ModelConfig, ResNetConfig, name_map_of

SOURCES = Path(__file__).parent / "torch_source"
_PLACE = "CONFIG: dict = {}\n"


def write_torch_module(
    model: Model, directory: str | os.PathLike[str], name: str = "network"
) -> tuple[Path, Path]:
    """Writes `name.pth` and `name.py`; `from name import load; load()` gives the network.

    The module file needs PyTorch alone. `torch.load(..., weights_only=True)` reads the weights.

    Args:
      model: a convolutional network or LSTM of `jaxcompress.models`; compressed leaves are
        written dense.
      directory: made if it is not there.
      name: of the files, a Python identifier.

    Returns:
      The two paths.

    Raises:
      InputError: another architecture, or a name that Python cannot import.
    """
    config = model.config
    source = SOURCES / f"{getattr(config, 'model_type', None)}.py"
    if config is None or not source.is_file():
        known = sorted(path.stem for path in SOURCES.glob("[a-z]*.py"))
        raise InputError(
            f"torch module: written for {', '.join(known)}; "
            "language models leave as Hugging Face directories, jaxcompress.save"
        )
    if not name.isidentifier():
        raise InputError(f"torch module: {name!r} is no name that Python can import")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    weights, module = folder / f"{name}.pth", folder / f"{name}.py"
    params = map_with_paths(lambda _, leaf: np.asarray(dense(leaf)), model.params)
    save_state_dict(weights, dict(name_map_of(config).tensors(params)))
    text = pprint.pformat(_entries(config), width=96, sort_dicts=False)
    made = source.read_text().replace("from network import", f"from {name} import")
    with atomic_file(module) as file:
        file.write(made.replace(_PLACE, f"CONFIG: dict = {text}\n").encode())
    return weights, module


def _entries(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config, with what it leaves to be told from others."""
    entries = {name: getattr(config, name) for name in config.architecture()}
    if isinstance(config, ResNetConfig):
        stages = config.stages()
        entries["inner_widths"] = tuple(block.inner for stage in stages for block in stage)
        entries["pads"] = tuple(stage[0].front for stage in stages[1:])
    return entries
