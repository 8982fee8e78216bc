"""`from_nnx`: a Flax NNX module as a `Model`. The only file that imports `flax.nnx`, lazily."""

from __future__ import annotations

from typing import Any

import jax

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model


def from_nnx(module: Any, *, method: str = "__call__") -> Model:
    """A Flax NNX module as a `Model`: its state as nested dicts, its graph in `apply`.

    The parameters are plain arrays under the names of the module's attributes
    (`layers/0/kernel`); batch statistics, random state and all other variables are among them.
    `apply` returns what the module returns; what it changes in itself (batch statistics, random
    counters) is dropped: put the module in evaluation mode first.

    Args:
      module: an `nnx.Module`.
      method: the method that `apply` calls.

    Raises:
      InputError: this Flax cannot import NNX under this JAX, or `module` is no NNX module.
    """
    try:
        from flax import nnx
    except Exception as error:  # Flax and JAX break each other in several ways
        import flax

        raise InputError(
            f"from_nnx: flax {flax.__version__} has no working NNX under jax {jax.__version__} "
            f"({type(error).__name__}: {error}); install a pair of versions that work together"
        ) from error
    if not isinstance(module, nnx.Module):
        raise InputError(f"from_nnx: {type(module).__name__} is not an nnx.Module")
    graph, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    paths = [path for path, _ in flat]
    metadata = [variable for _, variable in flat]
    params = _nested({path: variable.get_value() for path, variable in flat})

    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        variables = [
            variable.replace(_at(params, path))
            for path, variable in zip(paths, metadata, strict=True)
        ]
        merged = nnx.merge(graph, nnx.from_flat_state(zip(paths, variables, strict=True)))
        return getattr(merged, method)(*args, **kwargs)

    return Model(apply, params)


def _nested(flat: dict[tuple[Any, ...], Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, value in flat.items():
        *outer, last = map(str, path)
        inner = out
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return out


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[str(key)]
    return tree
