"""In which type a model computes, whatever type its parameters have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.model import Blocks, Model
from jaxcompress.models.families import functions_of
from jaxcompress.models.loading import checked_dtype


def with_compute_dtype(model: Model, dtype: str) -> Model:
    """The same model and parameters, computing in `dtype`.

    The parameters keep their type (float32 master weights) and are cast where they are used; norms,
    softmax and losses of the reference models stay in float32.

    Args:
      model: a reference model, or any other: then parameters and floating inputs are cast.
      dtype: "float32", "bfloat16" or "float16".

    Raises:
      InputError: another dtype.
    """
    dtype = checked_dtype(dtype)
    if model.config is not None:
        config = dataclasses.replace(model.config, dtype=dtype)
        functions = functions_of(config)
        return model.replace(apply=functions.apply, blocks=functions.blocks, config=config)

    def casting(function: Callable[..., Any]) -> Callable[..., Any]:
        def cast(*arguments: Any, **options: Any) -> Any:
            return function(*_cast(arguments, dtype), **_cast(options, dtype))

        return cast

    blocks = model.blocks
    if blocks is not None:
        blocks = Blocks(
            casting(blocks.embed),
            casting(blocks.block),
            casting(blocks.head),
            blocks.where,
            None if blocks.trunk is None else casting(blocks.trunk),
        )
    return model.replace(apply=casting(model.apply), blocks=blocks)


def _cast(tree: Any, dtype: str) -> Any:
    def cast(leaf: Any) -> Any:
        is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if is_float else leaf

    return jax.tree.map(cast, tree)
