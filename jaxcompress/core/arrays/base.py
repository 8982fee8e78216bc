"""What every compressed array is: buffers `[*lead, r, c]` standing for a dense `[*lead, *tail]`.

A compressed array stores the matrix `[rows, contracted]` of a product: N output rows by K
contracted columns, under any number of leading axes (layers of a scan, experts, a vmap). How the
axes of the dense array factor over N and K is static; sizes are read off the buffers, and no
leading size and no K stands in the static part. So `leaf[i]`, `lax.scan`, `jax.vmap`,
`jnp.stack` and a K sharded inside `shard_map` need nothing special.

A new class declares its buffers with their roles, and how to decode them:

    @register
    class MyArray(CompressedArray):
        roles = {"codes": (ROWS, CONTRACTED), "scale": (ROWS, CONTRACTED)}
        trains = {"scale": "scales"}
        codes: Array
        scale: Array
        bits: int = 4                      # fields that are not in `roles` are static
        dims: Dims = KERNEL
        casts: tuple[str, ...] = ("float32",)

        @property
        def contracted(self): ...
        def decode(self): ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar, cast, dataclass_transform

import jax
import jax.numpy as jnp

Array = jax.Array
Dims = tuple[tuple[str, int], ...]

# Roles of the last two axes of a buffer. An axis with a role may have size 1 and broadcasts then.
ROWS = "rows"  # one entry per row of the stored matrix
CONTRACTED = "contracted"  # some fixed number of entries per run of contracted columns
INNER = "inner"  # neither: the rank of a factorization, the values kept of a row

KERNEL: Dims = (("k", -1), ("n", -1))  # [in, out], as Flax kernels lie
STORED: Dims = (("n", -1), ("k", -1))  # [out, in]: PyTorch weights; embeddings [vocab, features]


@dataclass(frozen=True)
class Partition:
    """Where a product with a compressed array lies on a mesh; static and hashable.

    A kernel cannot be partitioned by the compiler, so the array itself says over which mesh axes
    its product is to be split: rows (column parallel: each device makes its own output columns),
    contracted (row parallel: partial products are summed) and the batch of the other operand.

    Attributes:
      mesh: the mesh, concrete or abstract.
      rows: mesh axes over the rows N.
      contracted: mesh axes over the contracted columns K.
      batch: mesh axes over the leading free axis of the other operand.
    """

    mesh: Any
    rows: tuple[str, ...] = ()
    contracted: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()


C = TypeVar("C", bound="CompressedArray")
T = TypeVar("T")


def infer_first(dims: Dims) -> Dims:
    """`dims` with the size of the first axis of each kind left to the buffers (-1)."""
    seen: set[str] = set()
    out = []
    for kind, size in dims:
        out.append((kind, size if kind in seen else -1))
        seen.add(kind)
    return tuple(out)


def dims_of(tail: tuple[int, ...], contracted: tuple[int, ...]) -> Dims:
    """`dims` of a dense tail shape whose axes `contracted` (within the tail) are contracted."""
    return infer_first(
        tuple(("k" if axis in contracted else "n", size) for axis, size in enumerate(tail))
    )


def _matrix_order(dims: Dims) -> list[int]:
    return [i for kind in "nk" for i, (k, _) in enumerate(dims) if k == kind]


def to_matrix(dense: Array, dims: Dims) -> Array:
    """Dense `[*lead, *tail]` to the stored matrix `[*lead, N, K]`."""
    lead = dense.ndim - len(dims)
    rows = math.prod(dense.shape[lead + i] for i, (k, _) in enumerate(dims) if k == "n")
    order = [lead + i for i in _matrix_order(dims)]
    moved = dense.transpose(*range(lead), *order)
    return (
        moved.reshape(*dense.shape[:lead], rows, -1)
        if dense.size
        else moved.reshape(*dense.shape[:lead], rows, math.prod(dense.shape[lead:]) // max(rows, 1))
    )


def from_matrix(matrix: Array, dims: Dims) -> Array:
    """Stored matrix `[*lead, N, K]` to the dense `[*lead, *tail]`; inverse of `to_matrix`."""
    lead = matrix.ndim - 2
    sizes = tail_sizes(dims, matrix.shape[-2], matrix.shape[-1])
    order = _matrix_order(dims)
    split = matrix.reshape(*matrix.shape[:lead], *(sizes[i] for i in order))
    return split.transpose(*range(lead), *(lead + order.index(i) for i in range(len(dims))))


def tail_sizes(dims: Dims, rows: int, contracted: int) -> tuple[int, ...]:
    """Sizes of the dense tail axes, given the sizes of the stored matrix."""
    total = {"n": rows, "k": contracted}
    known = {kind: math.prod(size for k, size in dims if k == kind and size >= 0) for kind in total}
    return tuple(size if size >= 0 else total[k] // max(known[k], 1) for k, size in dims)


class CompressedArray:
    """Base of all compressed arrays. See the module's text for what a subclass declares."""

    roles: ClassVar[dict[str, tuple[str, str]]] = {}
    trains: ClassVar[dict[str, str]] = {}
    dims: Dims
    casts: tuple[str, ...]

    @property
    def buffers(self) -> dict[str, Any]:
        """Buffers by name; those that are None are left out."""
        named = {name: getattr(self, name) for name in self.roles}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes, carried by every buffer."""
        return tuple(jax.tree.leaves(self)[0].shape[:-2])

    @property
    def rows(self) -> int:
        """N, the rows of the stored matrix."""
        return max(
            jax.tree.leaves(value)[0].shape[-2]
            for name, value in self.buffers.items()
            if self.roles[name][0] == ROWS
        )

    @property
    def contracted(self) -> int:
        """K, the contracted columns of the stored matrix (without padding)."""
        raise NotImplementedError(f"{type(self).__name__} must say its K")

    @property
    def column_unit(self) -> int:
        """The columns of a K shard are a multiple of this; 0: K cannot be sharded."""
        return 1

    @property
    def tail(self) -> tuple[int, ...]:
        """Sizes of the dense axes after the leading ones."""
        return tail_sizes(self.dims, self.rows, self.contracted)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return self.lead + self.tail

    @property
    def ndim(self) -> int:
        """Number of axes of the dense array."""
        return len(self.lead) + len(self.dims)

    @property
    def size(self) -> int:
        """Number of entries of the dense array."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the dense array."""
        return jnp.dtype(self.casts[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def decode(self) -> Array:
        """The stored matrix `[*lead, N, K]` as the buffers say it, before `casts`."""
        raise NotImplementedError(f"{type(self).__name__} must say how it decodes")

    def matrix(self) -> Array:
        """The stored matrix `[*lead, N, K]` in the logical dtype."""
        out = self.decode()
        for dtype in self.casts:
            out = out.astype(dtype)
        return out

    def dense(self) -> Array:
        """The dense array `[*lead, *tail]`."""
        return from_matrix(self.matrix(), self.dims)

    def product(
        self, x: Array, over: str, *, precision: Any = None, preferred_element_type: Any = None
    ) -> Array:
        """`x @ w.T` (over="k") or `x @ w` (over="n"), w the stored matrix `[*lead, N, K]`.

        Args:
          x: `[*lead, M, K]` or `[*lead, M, N]`.
          over: the axis of w that is contracted, "k" or "n".
          precision: as for `lax.dot_general`.
          preferred_element_type: dtype of the result; None: as promoted.

        Returns:
          `[*lead, M, N]` or `[*lead, M, K]`.
        """
        from jaxcompress.core.arrays import chunked

        return chunked.product(
            self, x, over, precision=precision, preferred_element_type=preferred_element_type
        )

    def to_disk(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What a file holds of the array: buffers by name, and what `from_disk` must know besides.

        None besides: the buffers are those in memory. A class whose buffers are filled up to a
        rectangle leaves the filling out.
        """
        return self.buffers, None

    @classmethod
    def from_disk(
        cls: type[C], buffers: dict[str, Any], static: dict[str, Any], besides: dict[str, Any]
    ) -> C:
        """The array that `to_disk` wrote, in NumPy; called where there was something besides.

        Raises:
          ValueError: the parts do not fit each other.
        """
        raise ValueError(f"{cls.__name__} is written as it is in memory")

    def replace(self: C, **changes: Any) -> C:
        """A copy with other buffers or another static spec."""
        return replace(cast(Any, self), **changes)

    def map(self: C, fn: Callable[[Array], Any]) -> C:
        """The same array with `fn` applied to every buffer."""
        return jax.tree.map(fn, self)

    def map_roles(self: C, fn: Callable[[Any, tuple[str, str]], Any]) -> C:
        """The same array with `fn(buffer, (role of rows, role of columns))` on every buffer.

        A buffer that is itself a compressed array is entered: its rows and columns play the roles
        of the buffer's.
        """

        def apply(value: Any, roles: tuple[str, str]) -> Any:
            if not is_compressed(value):
                return fn(value, roles)
            outer = {ROWS: roles[0], CONTRACTED: roles[1], INNER: INNER}
            return value.map_roles(lambda x, inner: fn(x, (outer[inner[0]], outer[inner[1]])))

        return replace(
            cast(Any, self),
            **{name: apply(value, self.roles[name]) for name, value in self.buffers.items()},
        )

    def __getitem__(self: C, index: Any) -> C:
        """`leaf[i]`: index or slice leading axes; every buffer carries them."""
        parts = index if isinstance(index, tuple) else (index,)
        if Ellipsis in parts or len([p for p in parts if p is not None]) > len(self.lead):
            raise IndexError(
                f"{type(self).__name__} of shape {self.shape}: only its {len(self.lead)} leading "
                "axes can be indexed while compressed; index .dense() instead"
            )
        return self.map(lambda buffer: buffer[index])

    def __len__(self) -> int:
        """Size of the first axis."""
        return self.shape[0]

    def __iter__(self: C) -> Iterator[C]:
        """Items along the first leading axis."""
        return (self[i] for i in range(self.lead[0] if self.lead else 0))

    def __repr__(self) -> str:
        """Short: class, shape, dtype and the static spec."""
        static = {
            f.name: getattr(self, f.name)
            for f in fields(cast(Any, self))
            if f.name not in self.roles
        }
        static.pop("dims"), static.pop("casts")
        spec = ", ".join(f"{name}={value}" for name, value in static.items())
        try:
            return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, {spec})"
        except Exception:  # buffers may be specs, shardings or None inside tree_map
            return f"{type(self).__name__}({jax.tree.map(_brief, self.buffers)}, {spec})"


def _brief(x: Any) -> Any:
    return f"{x.dtype}{[*x.shape]}" if hasattr(x, "dtype") else x


@dataclass_transform(frozen_default=True)
def register(cls: type[C]) -> type[C]:
    """Class decorator: a frozen dataclass whose `roles` are pytree children, the rest static."""
    made = dataclass(frozen=True, repr=False)(cls)
    static = [f.name for f in fields(cast(Any, made)) if f.name not in made.roles]
    return jax.tree_util.register_dataclass(made, list(made.roles), static)


def is_compressed(x: Any) -> bool:
    """Whether `x` is a compressed array."""
    return isinstance(x, CompressedArray)


def dense(x: Any) -> Any:
    """`x.dense()` where `x` is a compressed array, else `x`."""
    return x.dense() if is_compressed(x) else x


def densify(tree: T) -> T:
    """`tree` with every compressed array replaced by its dense array."""
    return jax.tree.map(dense, tree, is_leaf=is_compressed)
