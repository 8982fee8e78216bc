"""`lift(fn)`: run any JAX function over parameters of which some are compressed.

The function is traced on dense shapes and its jaxpr evaluated: products, views and control flow
that meet a compressed array have rules, anything else gets the dense array and is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxcompress.core.arrays import sharding
from jaxcompress.core.arrays.base import densify, is_compressed
from jaxcompress.core.readers import unofficial
from jaxcompress.core.readers.array_rules import ARRAY_RULES
from jaxcompress.core.readers.rules import RULES
from jaxcompress.core.readers.tracing import Tracer, unwrap_static
from jaxcompress.core.readers.unofficial import Body
from jaxcompress.core.readers.walk import Materialized, Walk

__all__ = ["Lifted", "Materialized", "densify", "lift", "materialized"]


class Lifted:
    """`lift(fn)`; call it as `fn`. See `lift`.

    Attributes:
      walk: its caches, and the records of what went dense.
    """

    def __init__(self, fn: Callable[..., Any], shardings: Any = None, always: bool = False) -> None:
        unofficial.warn_if_unknown()
        self.fn, self.shardings, self.always = fn, shardings, always
        self.walk = Walk(RULES, ARRAY_RULES)
        self.tracer = Tracer(fn, self.walk.traces)
        self.__name__ = self.__qualname__ = getattr(fn, "__name__", "lifted")
        self.__doc__ = getattr(fn, "__doc__", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`fn(*args, **kwargs)`, compressed arrays standing where dense ones may."""
        leaves = jax.tree.leaves((args, kwargs), is_leaf=is_compressed)
        if not self.always and not any(map(is_compressed, leaves)):
            return self.fn(*args, **kwargs)
        if self.shardings is not None:
            args = _with_partitions(args, self.shardings)
        traced = self.tracer(args, kwargs)
        body = Body.of(traced.closed)
        inputs = [*body.consts, *traced.values]
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(inputs)):
            outputs, _ = self.walk.run(body, traced.values, None, None)
        else:  # compiled once, where evaluating one equation after the other would be slow
            open_body = Body(traced.closed.jaxpr)
            run = self.walk.jitted(open_body, self.__name__, None, hoisted=len(body.consts))
            outputs, _ = run(None, *inputs)
        return unwrap_static(jax.tree.unflatten(traced.out_tree, outputs))

    def materialized(self) -> list[Materialized]:
        """Where compressed arrays had to be made dense, in all that was traced so far."""
        return self.walk.materialized()


def lift(fn: Callable[..., Any], shardings: Any = None) -> Lifted:
    """`fn`, with compressed arrays wherever it takes, carries or returns dense ones.

    Array leaves of the arguments are traced; booleans, strings, None, callables and Python numbers
    are static. Without a compressed leaf in a call, `fn` itself is called. The result may be put
    under `jit`, `grad`, `vmap`, `shard_map` and the others, and `fn` may contain them.

    Args:
      fn: any JAX function, usually `fn(params, *inputs)`.
      shardings: NamedShardings of the dense arguments, as a prefix of the positional arguments
        (None: unknown): products of arrays so placed then run as column- or row-parallel kernels.

    Returns:
      A callable with `fn`'s signature; its `materialized()` lists what had to go dense.
    """
    return Lifted(fn, shardings)


def materialized(fn: Callable[..., Any]) -> Callable[..., list[Materialized]]:
    """`materialized(fn)(params, *inputs)`: where `lift(fn)` has to make compressed arrays dense.

    Nothing is computed: shapes are enough, `jax.ShapeDtypeStruct` leaves too.
    """

    def records(*args: Any, **kwargs: Any) -> list[Materialized]:
        lifted = Lifted(fn)
        traced = lifted.tracer(args, kwargs)
        jax.eval_shape(
            lambda values: lifted.walk.run(Body.of(traced.closed), values, None, None)[0],
            traced.values,
        )
        return lifted.materialized()

    return records


def _with_partitions(args: tuple[Any, ...], shardings: Any) -> tuple[Any, ...]:
    """Compressed arguments with the partition that their dense shardings mean."""
    given = shardings if isinstance(shardings, tuple) else (shardings,)
    given = (*given, *[None] * (len(args) - len(given)))
    batch = _batch_axes(given[1:])

    def place(wanted: Any, subtree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: sharding.with_partition(leaf, wanted, batch),
            subtree,
            is_leaf=is_compressed,
        )

    return tuple(
        jax.tree.map(place, wanted, arg, is_leaf=_is_sharding)
        for wanted, arg in zip(given, args, strict=True)
    )


def _batch_axes(shardings: tuple[Any, ...]) -> tuple[str, ...]:
    """Mesh axes over the first axis of the first sharded input after the parameters."""
    for given in jax.tree.leaves(shardings, is_leaf=_is_sharding):
        if isinstance(given, jax.sharding.NamedSharding) and given.spec and given.spec[0]:
            names = given.spec[0]
            return (names,) if isinstance(names, str) else tuple(names)
    return ()


def _is_sharding(x: Any) -> bool:
    return x is None or isinstance(x, jax.sharding.Sharding)
