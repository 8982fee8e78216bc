"""Meshes of devices, and where every parameter and batch lies on them.

Axes of a mesh: `data` (copies of the model), `fsdp` (parameters split, gathered where they are
used), `tensor` (products split). A batch is split over `data` and `fsdp`.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress.core.activations import BATCH_AXES
from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.arrays.sharding import fitting_spec, shardings_of, with_partition
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.models import logical_axes

AnyMesh = Mesh | AbstractMesh
AXES = ("data", "fsdp", "tensor")
BATCH = P(BATCH_AXES)
# The mesh axis that splits each logical axis of the reference models' parameters.
RULES: dict[str, str] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
}
# Where configs say how many heads there are: a head is never split.
_HEADS = {
    "heads": ("num_attention_heads", "num_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices; one size may be -1: what remains.

    Args:
      data: copies of the model.
      fsdp: pieces of the parameters.
      tensor: pieces of each product.
      devices: by default all of them, of all processes.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _sizes(data, fsdp, tensor, len(devices))
    return Mesh(_arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_mesh(devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh of so many devices that need not be there, see `make_mesh`: enough to plan with."""
    sizes = _sizes(data, fsdp, tensor, devices)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def _sizes(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """Sizes of the axes, -1 replaced by what remains."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    wrong = next((n for n, size in sizes.items() if size < 1 and size != -1), None)
    if wrong is not None or len(free) > 1:
        name = wrong or free[1]
        raise InputError(f"mesh.{name} {sizes[name]}: sizes are 1 or more, and one may be -1")
    if devices % known or (not free and known != devices):
        raise InputError(
            f"mesh {data} x {fsdp} x {tensor} (data x fsdp x tensor): there are {devices} "
            f"devices; {_fitting(devices, sizes)}"
        )
    for name in free:
        sizes[name] = devices // known
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def _arranged(sizes: tuple[int, int, int], devices: list[Any]) -> np.ndarray:
    """Devices by mesh axes, neighbours of the `tensor` axis being near each other."""
    from jax.experimental import mesh_utils

    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Slices are joined by a slow network: what is sent between them are sums of gradients only.
    data, fsdp, tensor = sizes
    if data % slices:
        raise InputError(f"mesh.data {data}: must be a multiple of the {slices} slices")
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp, tensor), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def _fitting(devices: int, sizes: dict[str, int]) -> str:
    fixed = {n: math.gcd(s, devices) for n, s in sizes.items() if n != "data" and s > 0}
    rest = devices
    for name, size in fixed.items():
        fixed[name] = math.gcd(size, rest)
        rest //= fixed[name]
    shown = ", ".join(f"mesh.{name}={size}" for name, size in {"data": rest, **fixed}.items())
    return f"{shown} fits"


def param_specs(model: Model, mesh: AnyMesh, rules: Mapping[str, str | None] = RULES) -> Any:
    """A tree like `model.params` with the `PartitionSpec` of each dense array.

    Reference models: by their logical axes and `rules`. Others: the longest axis that `fsdp`
    divides. An axis (or number of heads) that does not divide, or a split that a compressed leaf
    cannot take (a shard of its columns must hold whole words and groups), stays whole.

    Args:
      model: its parameters may be `jax.ShapeDtypeStruct`s.
      mesh: only the sizes of its axes matter.
      rules: logical axis -> mesh axis.
    """
    named = {}
    if model.config is not None:
        flat = jax.tree_util.tree_flatten_with_path(
            logical_axes(model.config), is_leaf=lambda x: isinstance(x, tuple)
        )[0]
        named = {"/".join(str(k.key) for k in path): axes for path, axes in flat}
        rules = {axis: name for axis, name in rules.items() if _heads_fit(axis, name, model, mesh)}
    leaves = leaves_with_paths(model.params)
    tree = jax.tree.structure(model.params, is_leaf=is_compressed)
    specs = []
    for path, leaf in leaves:
        wanted = _wanted(named[path], rules) if path in named else None
        specs.append(_spec(leaf, wanted, mesh))
    return jax.tree.unflatten(tree, specs)


def _wanted(axes: tuple[str | None, ...], rules: Mapping[str, str | None]) -> list[str | None]:
    """The mesh axis of each axis; vectors of features stay whole, as gathering them takes longer
    than holding them is worth."""
    wanted = [None if axis is None else rules.get(axis) for axis in axes]
    is_vector = sum(axis not in (None, "layers") for axis in axes) == 1
    return [None if is_vector and name in BATCH_AXES else name for name in wanted]


def _heads_fit(axis: str, name: str | None, model: Model, mesh: AnyMesh) -> bool:
    heads = [getattr(model.config, field, None) for field in _HEADS.get(axis, ())]
    return name is None or all(n % mesh.shape[name] == 0 for n in heads if n is not None)


def _spec(leaf: Any, wanted: list[str | None] | None, mesh: AnyMesh) -> P:
    shape = np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape
    if wanted is None:
        wanted = [None] * len(shape)
        fitting = [i for i, size in enumerate(shape) if size % mesh.shape["fsdp"] == 0]
        if len(shape) > 1 and fitting:
            wanted[max(fitting, key=lambda i: shape[i])] = "fsdp"
    entries: list[str | None] = []
    for name, size in zip(wanted, shape, strict=True):
        fits = name is not None and name not in entries and size % mesh.shape[name] == 0
        entries.append(name if fits else None)
    return fitting_spec(leaf, P(*entries), mesh)


def dense_shardings(model: Model, mesh: AnyMesh, rules: Mapping[str, str | None] = RULES) -> Any:
    """A tree like `model.params` with the `NamedSharding` of each dense array (see `place`)."""
    specs = param_specs(model, mesh, rules)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )


def param_shardings(model: Model, mesh: AnyMesh, rules: Mapping[str, str | None] = RULES) -> Any:
    """A tree like `model.params` with the `NamedSharding` of every buffer (see `param_specs`)."""
    return shardings_of(model.params, dense_shardings(model, mesh, rules))


def partitioned(model: Model, mesh: Mesh, rules: Mapping[str, str | None] = RULES) -> Model:
    """The model with every quantized leaf told how its products split over the mesh.

    For parameters that do not train, such as a teacher's; otherwise the compiler, which knows
    nothing of packed codes, may gather or decode more of a leaf than a product needs.
    """
    params = jax.tree.map(
        lambda leaf, sharding: with_partition(leaf, sharding, BATCH_AXES),
        model.params,
        dense_shardings(model, mesh, rules),
        is_leaf=is_compressed,
    )
    return model.replace(params=params)


def spread(tree: Any, shardings: Any) -> Any:
    """`tree` under these shardings.

    On several processes each must hold the same values, or all of them an array of the same mesh.
    """

    def put(leaf: Any, sharding: NamedSharding) -> Any:
        if getattr(leaf, "sharding", None) == sharding:
            return leaf
        here = getattr(leaf, "is_fully_addressable", True)
        if sharding.is_fully_addressable or not here:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def global_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The global arrays of a batch, arrays or tuples of them; each process has its own rows."""
    sharding = NamedSharding(mesh, BATCH)
    processes = jax.process_count()
    if processes == 1 or _has_own_rows(sharding):
        return jax.tree.map(
            functools.partial(jax.make_array_from_process_local_data, sharding), batch
        )
    from jax.experimental import multihost_utils

    def from_whole(rows: np.ndarray) -> jax.Array:
        whole = multihost_utils.process_allgather(rows, tiled=True)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(from_whole, batch)


@functools.lru_cache(maxsize=8)
def _has_own_rows(sharding: NamedSharding) -> bool:
    """Whether no two processes need the same rows, as they do where they share one model."""
    shards = math.prod(sharding.mesh.shape[name] for name in BATCH_AXES)
    places: Any = sharding.devices_indices_map((shards,)).items()
    owners = {(device.process_index, rows.start) for device, (rows,) in places}
    of_each = Counter(process for process, _ in owners)
    return len(owners) == shards and len(set(of_each.values())) == 1


def check_batch(batch_size: int, mesh: AnyMesh, accumulate: int = 1) -> None:
    """Raise `InputError` unless a batch divides over the mesh and its micro-batches."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = shards * accumulate
    if batch_size < 1 or batch_size % unit:
        near = max(unit, round(batch_size / unit) * unit)
        raise InputError(
            f"batch_size {batch_size}: does not divide over mesh.data {mesh.shape['data']} x "
            f"mesh.fsdp {mesh.shape['fsdp']} x accumulate {accumulate} = {unit}; the nearest "
            f"that does is {near}"
        )
