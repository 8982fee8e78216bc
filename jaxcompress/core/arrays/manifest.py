"""What a checkpoint must say about compressed arrays beside their bytes.

Checkpointers such as orbax store and compare buffers only: a tree of the wrong bits or group is
restored without a word, and without a target come plain dicts. The manifest is the rest, as JSON:

    manifest(params)                        # to be written beside the checkpoint
    check_manifest(params, saved)           # whether a tree is what was saved
    abstract(saved)                         # a tree of ShapeDtypeStructs to restore into
    from_manifest(saved, plain)             # compressed arrays out of the plain dicts
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, cast

import jax
import numpy as np

from jaxcompress.core.arrays.base import CompressedArray, is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import path_str
from jaxcompress.core.selection import nearest

VERSION = 1
# Where an array lies is not part of what it is.
PLACEMENT = ("partition",)


def manifest(tree: Any) -> dict[str, Any]:
    """Classes, static specs, shapes and dtypes of all leaves of `tree`, JSON-able.

    Returns:
      `{"version", "versions": {package: version}, "leaves": {path: entry}}`. An entry has the
      `keys` of its path (integers index sequences) and either `shape` and `dtype`, or the `class`
      of a compressed array, its `static` fields and an entry for each of its `buffers`.

    Raises:
      InputError: a static field cannot be written as JSON.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_compressed)
    leaves = {}
    for path, leaf in flat:
        leaves[path_str(path)] = {
            "keys": [_key(key) for key in path],
            **_entry(leaf, path_str(path)),
        }
    return {
        "version": VERSION,
        "versions": {name: importlib.metadata.version(name) for name in ("jaxcompress", "jax")},
        "leaves": leaves,
    }


def check_manifest(tree: Any, saved: dict[str, Any]) -> None:
    """Raise unless `tree` has the leaves that `saved` describes, bit for bit of the same format.

    Raises:
      InputError: names the first path that differs, and how.
    """
    _check_version(saved)
    here, there = manifest(tree)["leaves"], saved["leaves"]
    for path, entry in there.items():
        if path not in here:
            raise InputError(f"{path}: in the checkpoint, but not here; {nearest(path, here)}")
        _compare(here[path], entry, path)
    for path in here:
        if path not in there:
            raise InputError(f"{path}: not in the checkpoint; {nearest(path, there)}")


def abstract(saved: dict[str, Any]) -> Any:
    """The tree that was saved, with a `jax.ShapeDtypeStruct` for every array.

    Its containers are dicts and lists, whatever they were.

    Raises:
      InputError: the manifest is of another version, or names a class that is not imported.
    """
    _check_version(saved)
    out: Any = None
    for path, entry in saved["leaves"].items():
        leaf = _build(entry, path, lambda e, _: jax.ShapeDtypeStruct(e["shape"], e["dtype"]), None)
        out = _put(out, entry["keys"], leaf)
    return out


def from_manifest(saved: dict[str, Any], plain: Any) -> Any:
    """What was saved, from the nested dicts and lists that a restore without a target gives.

    Raises:
      InputError: an array is missing from `plain`, or is of another shape or dtype; names it.
    """
    _check_version(saved)
    out: Any = None
    for path, entry in saved["leaves"].items():
        found = plain
        for key in entry["keys"]:
            found = _child(found, key, path)
        out = _put(out, entry["keys"], _build(entry, path, _checked, found))
    return out


def _entry(leaf: Any, path: str) -> dict[str, Any]:
    if not is_compressed(leaf):
        return _array_entry(leaf, path)
    static = {}
    for field in fields(cast(Any, leaf)):
        if field.name not in leaf.roles and field.name not in PLACEMENT:
            static[field.name] = _jsonable(getattr(leaf, field.name), f"{path}: {field.name}")
    buffers = {name: _entry(value, f"{path}/{name}") for name, value in leaf.buffers.items()}
    return {"class": type(leaf).__name__, "static": static, "buffers": buffers}


def _array_entry(leaf: Any, path: str) -> dict[str, Any]:
    if not hasattr(leaf, "shape"):
        leaf = np.asarray(leaf)
    if leaf.dtype == object or leaf.dtype.kind in "US":
        raise InputError(f"{path}: a leaf that is no array cannot be saved")
    return {"shape": [*leaf.shape], "dtype": str(leaf.dtype)}


def _jsonable(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_jsonable(item, where) for item in value]
    raise InputError(f"{where}: a static field of type {type(value).__name__} cannot be saved")


def _key(key: Any) -> str | int:
    """A sequence's index stays a number, so that lists can be told from dicts."""
    return key.idx if isinstance(key, jax.tree_util.SequenceKey) else path_str((key,))


def _compare(here: dict[str, Any], there: dict[str, Any], path: str) -> None:
    for what in ("class", "shape", "dtype"):
        if here.get(what) != there.get(what):
            raise InputError(
                f"{path}: {what} is {_shown(here, what)} here, "
                f"{_shown(there, what)} in the checkpoint"
            )
    for name in {**there.get("static", {}), **here.get("static", {})}:
        mine, saved = here["static"].get(name), there["static"].get(name)
        if mine != saved:
            raise InputError(f"{path}: {name} is {mine!r} here, {saved!r} in the checkpoint")
    mine, saved = here.get("buffers", {}), there.get("buffers", {})
    for name in {**saved, **mine}:
        if name not in mine or name not in saved:
            where = "here" if name in mine else "in the checkpoint"
            raise InputError(f"{path}: has a {name} {where} only")
        _compare(mine[name], saved[name], f"{path}/{name}")


def _shown(entry: dict[str, Any], what: str) -> Any:
    return entry.get(what, "a plain array" if what == "class" else entry.get("class"))


def _check_version(saved: dict[str, Any]) -> None:
    if saved.get("version") != VERSION:
        raise InputError(
            f"manifest: version {saved.get('version')!r}, this jaxcompress reads {VERSION}"
        )


def _build(
    entry: dict[str, Any], path: str, make: Callable[[dict[str, Any], Any], Any], found: Any
) -> Any:
    """The leaf of an entry; `make(entry, what was found for it)` makes its arrays."""
    if "class" not in entry:
        try:
            return make(entry, found)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    classes = {cls.__name__: cls for cls in _subclasses(CompressedArray)}
    if entry["class"] not in classes:
        raise InputError(
            f"{path}: class {entry['class']!r} is unknown; import the module that defines it"
        )
    cls = classes[entry["class"]]
    buffers = dict.fromkeys(cls.roles)
    for name, inner in entry["buffers"].items():
        child: Any = None if found is None else _child(found, name, path)
        buffers[name] = _build(inner, f"{path}/{name}", make, child)
    return cls(**buffers, **{name: _tupled(value) for name, value in entry["static"].items()})


def _checked(entry: dict[str, Any], found: Any) -> Any:
    for what, value in _array_entry(found, "").items():
        if value != entry[what]:
            raise InputError(f"{what} is {value}, {entry[what]} in the manifest")
    return found


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value


def _child(tree: Any, key: str | int, path: str) -> Any:
    """The child that `key` names: of a sequence, a dict (also with indices as text), an object."""
    if isinstance(tree, (list, tuple)) and isinstance(key, int) and key < len(tree):
        return tree[key]
    if isinstance(tree, dict):
        for name in (key, str(key)):
            if name in tree:
                return tree[name]
    elif isinstance(key, str) and hasattr(tree, key):
        return getattr(tree, key)
    raise InputError(f"{path}: {key!r} is missing from the restored tree")


def _put(tree: Any, keys: list[str | int], leaf: Any) -> Any:
    """`tree` with `leaf` at `keys`; grows dicts and lists as needed."""
    if not keys:
        return leaf
    key, *rest = keys
    if isinstance(key, int):
        tree = [] if tree is None else tree
        tree.extend([None] * (key + 1 - len(tree)))
        tree[key] = _put(tree[key], rest, leaf)
        return tree
    tree = {} if tree is None else tree
    tree[key] = _put(tree.get(key), rest, leaf)
    return tree
