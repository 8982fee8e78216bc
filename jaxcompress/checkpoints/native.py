"""The native convention: any pytree with compressed leaves in safetensors, every bit kept.

`docs/formats.md` describes it for other readers. The files are named `native*.safetensors`:
transformers would open a `model.safetensors` and start the leaves that it does not know at random.

A dense leaf is one tensor named by its path (`layers/0/mlp/kernel`). A compressed leaf is one
tensor per buffer (`kernel#codes`; nested where a buffer is compressed itself:
`kernel#values#codes`), and `kernel#spec`: JSON as bytes, with its class, its static fields, and
the shape and dtype that it must have once rebuilt. The containers of a tree that is more than a
flat dict stand in the `__metadata__` of the files.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxcompress.checkpoints.huggingface import NATIVE_STEM, Checkpoint, open_checkpoint
from jaxcompress.checkpoints.huggingface_writer import CheckpointWriter
from jaxcompress.checkpoints.safetensors import NAMES, build_header
from jaxcompress.checkpoints.tensors import TensorInfo, check_rows, unknown_tensor
from jaxcompress.core import arrays
from jaxcompress.core.arrays.base import CompressedArray, Partition, dense
from jaxcompress.core.errors import InputError

VERSION = 1
SPEC = "#spec"
TREE_KEY = "jaxcompress.tree"


def write_native(
    directory: str | os.PathLike[str],
    params: Any,
    config: Mapping[str, Any] | None = None,
    *,
    companions_from: str | os.PathLike[str] | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    fingerprint: str | None = None,
) -> Path:
    """Write a pytree so that `read_native` gives it back bit for bit.

    Args:
      directory: the directory to make; it appears, complete and verified, at the very end.
      params: dicts (with text as keys), lists, tuples and None, of arrays and compressed arrays.
        A leaf may also be a function of no arguments that returns one: it is called when its turn
        comes, so one leaf is in memory at a time, and not at all where a killed run of the same
        `fingerprint` wrote the leaf already.
      config: contents of config.json, or None.
      companions_from: see `CheckpointWriter`, like the rest.

    Returns:
      The directory.

    Raises:
      InputError: a container or leaf of another type, named by its path; see `CheckpointWriter`.
    """
    leaves: dict[str, Any] = {}
    tree = _structure(params, "", leaves)
    if not leaves:
        raise InputError(f"{directory}: no array in the tree to write")
    with CheckpointWriter(
        directory,
        config,
        companions_from=companions_from,
        max_shard_bytes=max_shard_bytes,
        fingerprint=fingerprint,
        overwrite=overwrite,
        metadata={TREE_KEY: json.dumps(tree)},
        stem=NATIVE_STEM,
    ) as writer:
        for name, leaf in leaves.items():
            if name in writer or name + SPEC in writer:
                continue
            for tensor, array in encode_leaf(name, leaf() if callable(leaf) else leaf).items():
                if tensor not in writer:  # a killed run may have written some of a leaf
                    writer.add(tensor, array)
    return writer.directory


def native_bytes(params: Any) -> int:
    """Bytes of the one file in which `write_native` would keep a tree; nothing is written.

    Args:
      params: as in `write_native`; arrays may be `jax.ShapeDtypeStruct`s. Their filling (of rows
        that keep unequally many) is counted then, for shapes do not tell it.
    """
    leaves: dict[str, Any] = {}
    tree = _structure(params, "", leaves)
    infos: dict[str, TensorInfo] = {}

    def emit(name: str, array: Any) -> None:
        infos[name] = TensorInfo(tuple(array.shape), np.dtype(array.dtype))

    for name, leaf in leaves.items():
        held = not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaf))
        spec = _encode(name, leaf, emit, held)
        if spec is not None:
            emit(name + SPEC, np.frombuffer(_spec_text(spec), np.uint8))
    metadata = {"format": "pt", TREE_KEY: json.dumps(tree)}
    header, _ = build_header(infos, metadata, NATIVE_STEM)
    return len(header) + sum(info.nbytes for info in infos.values())


def read_native(directory: str | os.PathLike[str]) -> Any:
    """The pytree of a directory that `write_native` made; arrays are JAX arrays.

    Dtypes that JAX would change (64 bits, unless they are enabled) stay NumPy arrays.

    Raises:
      InputError: no native directory, a version or class that is not known, or parts that do not
        make up what their spec says.
    """
    return Native(open_checkpoint(directory)).tree()


def encode_leaf(name: str, leaf: Any) -> dict[str, np.ndarray]:
    """The tensors of one leaf; the spec, where there is one, comes last.

    Args:
      name: of the leaf: its path, or whatever the checkpoint calls it.
      leaf: an array or a compressed array.

    Raises:
      InputError: an object that is no array, or a static field that JSON does not hold.
    """
    tensors: dict[str, np.ndarray] = {}
    spec = _encode(name, leaf, lambda key, array: tensors.update({key: np.asarray(array)}), True)
    if spec is not None:
        tensors[name + SPEC] = np.frombuffer(_spec_text(spec), np.uint8)
    return tensors


def _spec_text(spec: dict[str, Any]) -> bytes:
    return json.dumps({"version": VERSION, **spec}).encode()


def names_of_leaf(name: str, leaf: Any) -> list[str]:
    """Names of the tensors of `encode_leaf`; buffers may be shapes (`jax.ShapeDtypeStruct`)."""
    names: list[str] = []
    spec = _encode(name, leaf, lambda key, _: names.append(key), False)
    return names if spec is None else [*names, name + SPEC]


def is_native(checkpoint: Checkpoint) -> bool:
    """Whether an opened checkpoint is in this convention."""
    names = checkpoint.keys()
    return TREE_KEY in checkpoint.metadata or any(name.endswith(SPEC) for name in names)


class Native:
    """A native directory opened for lazy reading, leaf by leaf.

    Args:
      checkpoint: the opened files; `.config` and `.companions` are there.

    Raises:
      InputError: the directory is in another convention.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        if not is_native(checkpoint):
            raise InputError(f"{checkpoint.directory}: not written in the native convention")
        self.checkpoint = checkpoint
        names = checkpoint.keys()
        self._specified = {n.removesuffix(SPEC) for n in names if n.endswith(SPEC)}
        self._names = [n for n in names if "#" not in n and n not in self._specified]
        self._names += sorted(self._specified)
        self._specs: dict[str, dict[str, Any]] = {}

    def keys(self) -> list[str]:
        """Names of the leaves."""
        return list(self._names)

    def is_compressed(self, name: str) -> bool:
        """Whether the leaf is a compressed array."""
        return "class" in (self._spec(name) or ())

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of the dense leaf, without reading it."""
        spec = self._spec(name)
        if spec is None:
            return self.checkpoint.info(name)
        try:
            return TensorInfo(tuple(spec["shape"]), _dtype(spec["dtype"]))
        except (KeyError, TypeError) as error:
            raise self._damaged(name, error) from None

    def read(self, name: str) -> Any:
        """One leaf, rebuilt and checked.

        Raises:
          InputError: see `read_native`.
        """
        spec = self._spec(name)
        if spec is None:
            return _on_device(self.checkpoint.read(name))
        try:
            return jax.tree.map(_on_device, self._rebuild(name, spec))
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise self._damaged(name, error) from None

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a dense leaf. A compressed one is decoded whole for it."""
        if self._spec(name) is None:
            return self.checkpoint.read_rows(name, start, stop)
        array = np.asarray(dense(self.read(name)))
        check_rows(str(self.checkpoint.directory), name, array.shape, start, stop)
        return array[start:stop]

    def tree(self) -> Any:
        """The whole pytree; a flat dict by names where the files tell of no other."""
        text = self.checkpoint.metadata.get(TREE_KEY)
        if text is None:
            return {name: self.read(name) for name in self._names}
        try:
            structure = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._damaged(TREE_KEY, error) from None
        return self._container(structure)

    def _container(self, node: Any) -> Any:
        match node:
            case str():
                return self.read(node)
            case None:
                return None
            case {"dict": dict(children)}:
                return {key: self._container(child) for key, child in children.items()}
            case {"list": list(children)}:
                return [self._container(child) for child in children]
            case {"tuple": list(children)}:
                return tuple(self._container(child) for child in children)
        raise self._damaged(TREE_KEY, "an unknown container")

    def _spec(self, name: str) -> dict[str, Any] | None:
        if name not in self._specified:
            if name not in self.checkpoint:
                raise unknown_tensor(str(self.checkpoint.directory), name, self._names)
            return None
        if name not in self._specs:
            try:
                spec = json.loads(self.checkpoint.read(name + SPEC).tobytes())
                version = spec["version"]
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise self._damaged(name, error) from None
            if version != VERSION:
                raise InputError(
                    f"{self.checkpoint.directory}: {name}: native version {str(version)[:20]}, "
                    f"only {VERSION} is known; a newer jaxcompress reads it"
                )
            self._specs[name] = spec
        return self._specs[name]

    def _rebuild(self, name: str, spec: dict[str, Any] | None) -> Any:
        """The leaf in NumPy."""
        if spec is None:
            return self.checkpoint.read(name)
        if "class" not in spec:
            stored, dtype = self.checkpoint.read(name), _dtype(spec["dtype"])
            if stored.dtype != np.uint8 or stored.shape != (*spec["shape"], dtype.itemsize):
                raise ValueError(f"{stored.dtype} {stored.shape} for {spec['dtype']}")
            return stored.view(dtype)[..., 0]
        cls = _class_named(spec["class"], name)
        static = {key: _tuples(value) for key, value in spec["static"].items()}
        known = {field.name for field in fields(cast(Any, cls))} - set(cls.roles)
        if not set(static) <= known or not set(spec["buffers"]) <= set(cls.roles):
            raise ValueError(f"fields that {spec['class']} does not have")
        buffers = {
            key: None if inner is False else self._rebuild(f"{name}#{key}", inner)
            for key, inner in spec["buffers"].items()
        }
        besides = spec.get("besides")
        leaf = (
            cls(**buffers, **static)
            if besides is None
            else cls.from_disk(buffers, static, {key: _tuples(v) for key, v in besides.items()})
        )
        if list(leaf.shape) != spec["shape"] or str(leaf.dtype) != spec["dtype"]:
            raise ValueError(f"{leaf.shape} {leaf.dtype}, not {spec['shape']} {spec['dtype']}")
        return leaf

    def _damaged(self, name: str, error: Any) -> InputError:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        return InputError(
            f"{self.checkpoint.directory}: {name}: its parts do not make up what is said of it "
            f"({reason})"
        )


def _structure(node: Any, path: str, leaves: dict[str, Any]) -> Any:
    """Containers of a tree as JSON, leaves by name; `leaves` collects them."""

    def children(items: Any) -> Iterator[tuple[str, Any]]:
        for key, child in items:
            if not isinstance(key, str):
                raise InputError(f"{path or 'params'}: the key {key!r} is not text")
            name = key.replace("%", "%25").replace("/", "%2F").replace("#", "%23")
            yield key, _structure(child, f"{path}/{name}" if path else name, leaves)

    if node is None:
        return None
    if type(node) is dict:
        return {"dict": dict(children(node.items()))}
    if type(node) in (list, tuple):
        kept = [child for _, child in children((str(i), x) for i, x in enumerate(node))]
        return {type(node).__name__: kept}
    arrays_ = (
        CompressedArray,
        jax.Array,
        jax.ShapeDtypeStruct,
        np.ndarray,
        np.generic,
        int,
        float,
    )
    if not isinstance(node, arrays_) and not callable(node):
        raise InputError(
            f"{path or 'params'}: {type(node).__name__} has no native form; "
            "dicts, lists and tuples of arrays have"
        )
    leaves[path] = node
    return path


def _encode(
    name: str, leaf: Any, emit: Callable[[str, Any], Any], held: bool
) -> dict[str, Any] | None:
    """Emit the tensors of a leaf; returns what its spec says, None where nothing need be said.

    In `buffers` of a spec null stands for an ordinary tensor and false for a buffer that is None.
    `held`: the buffers are arrays, not shapes, and are emitted in their form on disk.
    """
    if not isinstance(leaf, CompressedArray):
        return _encode_dense(name, leaf, emit)
    buffers, besides = leaf.to_disk() if held else (leaf.buffers, None)
    spec: dict[str, Any] = {"class": type(leaf).__name__, "static": {}, "buffers": {}}
    if besides is not None:
        spec["besides"] = besides
    for field in fields(cast(Any, leaf)):
        value = getattr(leaf, field.name)
        if field.name in leaf.roles:
            spec["buffers"][field.name] = (
                False
                if value is None
                else _encode(f"{name}#{field.name}", buffers[field.name], emit, held)
            )
        elif not isinstance(value, Partition):  # belongs to a mesh, not to the weights
            if not _plain(value):
                raise InputError(f"{name}: {field.name} of {spec['class']} is no plain value")
            spec["static"][field.name] = value
    return {**spec, "shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _encode_dense(name: str, leaf: Any, emit: Callable[[str, Any], Any]) -> dict[str, Any] | None:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        array: Any = leaf
    else:
        array = np.asarray(leaf)
        if array.dtype.hasobject:
            raise InputError(f"{name}: {type(leaf).__name__} is no array of numbers")
    if array.dtype in NAMES:
        emit(name, array)
        return None
    dtype = np.dtype(array.dtype)
    spec = {"shape": list(array.shape), "dtype": str(dtype)}
    if isinstance(array, np.ndarray):  # int4, complex128, ...: the bytes of each entry
        array = np.ascontiguousarray(array)[..., None].view(np.uint8)
        array = array.reshape(*spec["shape"], dtype.itemsize)
    emit(name, array)
    return spec


def _on_device(array: np.ndarray) -> Any:
    """A JAX array, unless JAX would change the dtype."""
    return (
        jnp.asarray(array) if jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype else array
    )


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _tuples(value: Any) -> Any:
    """JSON lists as tuples: static fields are hashable."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _class_named(name: Any, leaf: str) -> type[CompressedArray]:
    """The compressed class of a name: ours, or one that the caller has imported."""
    for module in pkgutil.iter_modules(arrays.__path__):
        importlib.import_module(f"{arrays.__name__}.{module.name}")
    found: dict[str, type[CompressedArray]] = {}
    waiting = CompressedArray.__subclasses__()
    while waiting:
        cls = waiting.pop()
        found[cls.__name__] = cls
        waiting += cls.__subclasses__()
    if name not in found:
        raise InputError(f"{leaf}: unknown class {name!r}; import the module that defines it first")
    return found[name]
