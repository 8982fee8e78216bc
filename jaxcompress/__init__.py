"""jaxcompress: prune, quantize and factorize any JAX model, as data in its parameter pytree.

Names are imported when first used, so that `import jaxcompress` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxcompress.api import (
        evaluate,
        inspect,
        load,
        load_params,
        save,
        save_state_dict,
    )
    from jaxcompress.core.arrays.base import CompressedArray, dense, densify, is_compressed
    from jaxcompress.core.arrays.sharding import place
    from jaxcompress.core.errors import InputError
    from jaxcompress.core.model import Blocks, Model
    from jaxcompress.core.nnx import from_nnx
    from jaxcompress.core.partition import merge, split
    from jaxcompress.core.readers.capture import capture
    from jaxcompress.core.readers.contractions import contractions
    from jaxcompress.core.readers.coupling import coupling, verify
    from jaxcompress.core.readers.cut import cut, masked
    from jaxcompress.core.readers.lift import lift, materialized
    from jaxcompress.methods import compress, prune, quantize
    from jaxcompress.models import generate, quantize_kv_cache, take_layers
    from jaxcompress.recipe import run

_WHERE = {
    "api": ("evaluate", "inspect", "load", "load_params", "save", "save_state_dict"),
    "core.arrays.base": ("CompressedArray", "dense", "densify", "is_compressed"),
    "core.arrays.sharding": ("place",),
    "core.errors": ("InputError",),
    "core.model": ("Blocks", "Model"),
    "core.nnx": ("from_nnx",),
    "core.partition": ("merge", "split"),
    "core.readers.capture": ("capture",),
    "core.readers.contractions": ("contractions",),
    "core.readers.coupling": ("coupling", "verify"),
    "core.readers.cut": ("cut", "masked"),
    "core.readers.lift": ("lift", "materialized"),
    "methods": ("compress", "prune", "quantize"),
    "models": ("generate", "quantize_kv_cache", "take_layers"),
    "recipe": ("run",),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    *sorted(_MODULE_OF),
]


def __getattr__(name: str) -> Any:
    """The public name `name`, imported from where it lives."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'jaxcompress' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jaxcompress.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted({*globals(), *_MODULE_OF})
