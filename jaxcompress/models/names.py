"""Which checkpoint tensor is which parameter: one table per architecture.

Each row gives our path (blocks unrolled), the checkpoint's name, the kind of weight, the logical
axis names, and how the stored layout becomes ours. Loading, saving, sharding rules and the
question "which are the linear weights?" are all read off this one table, tensor by tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcompress.core.arrays import views
from jaxcompress.core.arrays.base import INNER, dense, is_compressed
from jaxcompress.core.deferred import Deferred
from jaxcompress.core.errors import InputError

Kind = Literal["linear", "conv", "embedding", "head", "norm", "bias", "statistic"]

LAYERS = "layers"
# Wrappers that training scripts leave in front of every name (DataParallel, torch.compile).
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Parameter:
    """One parameter and the checkpoint tensor that holds it.

    Attributes:
      path: our path with unrolled blocks, `layers/0/attn/q_proj/kernel`.
      name: name of the tensor in the checkpoint.
      kind: "linear" for the kernel of a matrix product, "head" for that onto the vocabulary or
        classes, "conv", "embedding", "norm", "bias", or "statistic" (running mean, variance).
      logical: one logical name per axis, for sharding rules.
      axes: transposition from the checkpoint's axes to ours, or None.
      part: (i, n): this parameter is the i-th of n equal parts of the tensor's first axis.
      aliases: other names under which checkpoints hold the tensor (tied weights).
    """

    path: str
    name: str
    kind: Kind
    logical: tuple[str | None, ...]
    axes: tuple[int, ...] | None = None
    part: tuple[int, int] | None = None
    aliases: tuple[str, ...] = ()

    @property
    def layer(self) -> int | None:
        """Index of the block that the parameter belongs to, None outside of the blocks."""
        first, _, rest = self.path.partition("/")
        return int(rest.partition("/")[0]) if first == LAYERS else None

    @property
    def stacked_path(self) -> str:
        """The path where blocks are stacked: `layers/attn/q_proj/kernel`."""
        if self.layer is None:
            return self.path
        return f"{LAYERS}/{self.path.split('/', 2)[2]}"

    def from_checkpoint(self, tensor: Any) -> Any:
        """The parameter, from the checkpoint's tensor; a compressed one stays compressed."""
        if self.part is not None:
            index, count = self.part
            size = tensor.shape[0] // count
            tensor = _rows(tensor, index * size, (index + 1) * size)
        return _transposed(tensor, self.axes) if self.axes else tensor

    def to_checkpoint(self, array: Any) -> Any:
        """The checkpoint's tensor (or its part), from the parameter, compressed or not."""
        return _transposed(array, np.argsort(self.axes).tolist()) if self.axes else array


def _transposed(tensor: Any, axes: Sequence[int]) -> Any:
    if is_compressed(tensor):
        moved = views.transpose(tensor, axes)
        # Kernels of convolutions: PyTorch orders what is contracted in another way.
        return tensor.dense().transpose(axes) if moved is None else moved
    return tensor.transpose(axes)


def _rows(tensor: Any, start: int, stop: int) -> Any:
    if is_compressed(tensor):
        starts, limits = [0] * tensor.ndim, list(tensor.shape)
        starts[0], limits[0] = start, stop
        return views.lax_slice(tensor, starts, limits, None)
    return tensor[start:stop]


def _stacked(leaves: list[Any]) -> Any:
    """Leaves of all blocks along a new leading axis; dense where their formats differ."""
    if len({jax.tree.structure(leaf) for leaf in leaves}) == 1:
        roles: list[tuple[str, str]] = []

        def note(buffer: Any, role: tuple[str, str]) -> Any:
            roles.append(role)
            return buffer

        leaves[0].map_roles(note)
        buffers = [jax.tree.leaves(leaf) for leaf in leaves]
        if all(_stackable(list(same), role) for *same, role in zip(*buffers, roles)):
            grown = [_fill_up([np.asarray(b) for b in same]) for same in zip(*buffers)]
            return jax.tree.unflatten(jax.tree.structure(leaves[0]), grown)
    return np.stack([dense(leaf) for leaf in leaves])


def _stackable(buffers: list[Any], roles: tuple[str, str]) -> bool:
    """Whether buffers agree in size but for axes that zeros may fill up."""
    return all(
        role == INNER or len({buffer.shape[axis] for buffer in buffers}) == 1
        for axis, role in zip((-2, -1), roles)
    )


def _fill_up(buffers: list[np.ndarray]) -> np.ndarray:
    """Buffers stacked; shorter factors and rows of kept values end in zeros, which are nothing."""
    shape = np.max([buffer.shape for buffer in buffers], axis=0)
    out = np.zeros((len(buffers), *shape), buffers[0].dtype)
    for i, buffer in enumerate(buffers):
        out[i][tuple(slice(size) for size in buffer.shape)] = buffer
    return out


def joined(parts: list[Any]) -> Any:
    """Parts of a tensor along its first axis; those of one format stay compressed."""
    if any(is_compressed(part) for part in parts):
        together = views.concatenate(parts, 0)
        if together is not None:
            return together
    every = [dense(part) for part in parts]
    traced = any(isinstance(part, jax.core.Tracer) for part in every)
    return jnp.concatenate(every) if traced else np.concatenate(every)


@dataclass(frozen=True)
class NameMap:
    """The table of one architecture.

    Attributes:
      parameters: the rows, in the order of the network.
      prefix: what the name of the base model is preceded by (`model.`); checkpoints of the base
        model alone lack it.
      wrappers: what checkpoints of larger models put in front of all of these names (`bert.`).
    """

    parameters: tuple[Parameter, ...]
    prefix: str = ""
    wrappers: tuple[str, ...] = ()

    @cached_property
    def by_path(self) -> dict[str, tuple[Parameter, ...]]:
        """Rows by our path; a stacked path gives the rows of all blocks in order."""
        table: dict[str, list[Parameter]] = defaultdict(list)
        for row in self.parameters:
            for path in dict.fromkeys((row.path, row.stacked_path)):
                table[path].append(row)
        return {path: tuple(rows) for path, rows in table.items()}

    @cached_property
    def by_name(self) -> dict[str, tuple[Parameter, ...]]:
        """Rows by the checkpoint's name, aliases included."""
        table: dict[str, list[Parameter]] = defaultdict(list)
        for row in self.parameters:
            table[row.name].append(row)
        for row in self.parameters:
            for alias in row.aliases:
                if alias not in table:
                    table[alias].append(row)
        return {name: tuple(rows) for name, rows in table.items()}

    def canonical(self, name: str) -> str | None:
        """The table's name of a checkpoint tensor, None where no parameter takes it."""
        for wrapper in (*_WRAPPERS, *self.wrappers):
            name = name.removeprefix(wrapper)
        return next((n for n in (name, self.prefix + name) if n in self.by_name), None)

    def paths(self, name: str) -> tuple[str, ...]:
        """Our paths (unrolled) that a checkpoint tensor fills; empty for one that none takes."""
        known = self.canonical(name)
        return tuple(row.path for row in self.by_name[known]) if known else ()

    def names(self, path: str) -> tuple[str, ...]:
        """Checkpoint tensors behind one of our paths, stacked or unrolled."""
        return tuple(dict.fromkeys(row.name for row in self.by_path[path]))

    def of_kind(self, *kinds: Kind) -> tuple[Parameter, ...]:
        """Rows of these kinds; `of_kind("linear")` are the weights worth compressing."""
        return tuple(row for row in self.parameters if row.kind in kinds)

    def unmapped(self, available: Iterable[str]) -> list[str]:
        """Checkpoint tensors that no parameter takes (buffers such as causal masks)."""
        return [name for name in available if self.canonical(name) is None]

    def load(
        self,
        read: Callable[[str], np.ndarray],
        available: Collection[str],
        *,
        scan_layers: bool = False,
        dtype: Any = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        abstract: Callable[[str], Any] | None = None,
    ) -> dict[str, Any]:
        """The parameters, read tensor by tensor.

        Args:
          read: gives the tensor of a name.
          available: the names in the checkpoint.
          scan_layers: stack the blocks along a leading axis.
          dtype: cast floating tensors to it; None keeps each as stored.
          shapes: the shape that each path must have.
          abstract: gives the shapes of the tensor of a name: then nothing is read yet, and the
            leaves are `Deferred`; not with `scan_layers`.

        Returns:
          A nested dict of NumPy arrays.

        Raises:
          InputError: a tensor is missing or has another shape than `shapes` says.
        """
        stored: dict[str, str] = {}
        for name in available:
            known = self.canonical(name)
            # A table's own name wins over an alias that stands for the same parameter.
            if known is not None:
                stored[known] = name

        def named(row: Parameter) -> str:
            found = next((stored[n] for n in (row.name, *row.aliases) if n in stored), None)
            if found is None:
                raise InputError(f"checkpoint: tensor {row.name!r} (for {row.path}) is missing")
            return found

        def fetch(row: Parameter) -> Any:
            found = named(row)
            return taken(row, found, row.from_checkpoint(read(found)))

        def deferred(row: Parameter) -> Any:
            assert abstract is not None
            found = named(row)
            how = partial(taken, row, found)
            like = jax.eval_shape(lambda x: how(row.from_checkpoint(x)), abstract(found))
            return Deferred(lambda: jax.tree.map(jnp.asarray, fetch(row)), like)

        def taken(row: Parameter, found: str, array: Any) -> Any:
            wanted = array.shape if shapes is None else tuple(shapes[row.path])
            if array.shape != wanted:
                raise InputError(
                    f"checkpoint: tensor {found!r} gives {row.path} the shape {array.shape}, "
                    f"the config says {wanted}; is it the config of these weights?"
                )
            if dtype is None or row.kind == "statistic" or array.dtype.kind in "iub":
                return array
            if is_compressed(array):
                return views.convert_element_type(array, dtype)
            return array.astype(dtype)

        flat: dict[str, Any] = {}
        for row in self.parameters:
            if row.layer is None or not scan_layers:
                flat[row.path] = fetch(row) if abstract is None else deferred(row)
            elif row.stacked_path not in flat:
                # Filled in place: a list of layers to stack would hold the weights twice.
                rows = self.by_path[row.stacked_path]
                first = fetch(row)
                if is_compressed(first):
                    flat[row.stacked_path] = _stacked([first, *map(fetch, rows[1:])])
                    continue
                flat[row.stacked_path] = stack = np.empty((len(rows), *first.shape), first.dtype)
                stack[0] = first
                for index, other in enumerate(rows[1:], 1):
                    stack[index] = dense(fetch(other))
        return unflatten_dict(flat, sep="/")

    def walk(self, params: Mapping[str, Any]) -> Iterator[tuple[Parameter, Any]]:
        """Each row with its leaf; of stacked blocks `leaf[i]`. Leaves may be compressed."""
        flat = flatten_dict(dict(params), sep="/")
        for row in self.parameters:
            if row.path in flat:
                yield row, flat[row.path]
            elif row.stacked_path in flat and row.layer is not None:
                yield row, flat[row.stacked_path][self.by_path[row.stacked_path].index(row)]
            else:
                raise InputError(f"params: {row.path} is missing; other paths: {sorted(flat)[:4]}")

    def tensors(self, params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """(name, tensor) of the checkpoint, one at a time; compressed leaves stay compressed."""
        parts: dict[str, list[Any]] = defaultdict(list)
        for row, leaf in self.walk(params):
            array = row.to_checkpoint(leaf if is_compressed(leaf) else np.asarray(leaf))
            if row.part is None:
                yield row.name, array
                continue
            parts[row.name].append(array)
            if len(parts[row.name]) == row.part[1]:
                yield row.name, joined(parts.pop(row.name))

    def logical_axes(self, scan_layers: bool = False) -> dict[str, Any]:
        """A tree like the parameters whose leaves are tuples of logical axis names."""
        flat: dict[str, tuple[str | None, ...]] = {}
        for row in self.parameters:
            stacked = scan_layers and row.layer is not None
            flat[row.stacked_path if stacked else row.path] = (
                ("layers", *row.logical) if stacked else row.logical
            )
        return unflatten_dict(flat, sep="/")
