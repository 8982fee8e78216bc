"""The model that a recipe begins with, and its data."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import typing
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import api
from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import path_str
from jaxcompress.data.batches import Batches
from jaxcompress.data.bpe import train_tokenizer
from jaxcompress.data.digests import summary
from jaxcompress.data.images import Prepare, image_dataset, normalize
from jaxcompress.data.language import text_dataset
from jaxcompress.data.sources import load_documents
from jaxcompress.models import (
    ModelConfig,
    Tokenizer,
    abstract_params,
    build_model,
    family_of,
    find_checkpoint,
)
from jaxcompress.models.loading import checked_dtype, load_shapes
from jaxcompress.models.precision import with_compute_dtype
from jaxcompress.recipe.config import DataFields, ModelFields, Recipe, checked

NEW_TOKENIZER = "train:"
ROLES = ("train", "heldout", "calibration")


def load_model(recipe: Recipe) -> Model:
    """The model of `config.model`, its parameters float32.

    Raises:
      InputError: neither or both of a path and an architecture, a field that the one or the other
        has no use for, or what `load` raises.
    """
    fields = recipe.model
    _check_fields(fields)
    if fields.path is None:
        config, tokenizer = _fresh(recipe)
        return _computing(build_model(config, seed=recipe.seed, tokenizer=tokenizer), fields)
    with naming("config.model.path"):
        model = api.load(
            fields.path,
            arch=fields.arch,
            scan_layers=fields.scan_layers,
            dtype="float32",
            revision=fields.revision,
        )
    return _computing(model, fields)


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """What goes wrong within is the fault of this field."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{field}: {error}") from None


def stored_dtype(model: Model) -> str:
    """The dtype in which the model's weights came: that of its config.json, float32 without."""
    original = getattr(model.config, "original", None) or {}
    return str(original.get("dtype") or original.get("torch_dtype") or "float32")


def params_digest(params: Any) -> str:
    """SHA-256 of parameters in memory: paths, shapes, dtypes and bytes of all their buffers."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        array = np.asarray(leaf)
        found.update(f"{path_str(path)} {array.shape} {array.dtype}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def checkpoint_digest(name: str, revision: str | None = None) -> str:
    """SHA-256 of a model's weight files and config, in the order of their names."""
    path = find_checkpoint(name, revision)
    kinds = ("*.safetensors", "*.bin", "config.json")
    files = [path] if path.is_file() else sorted(f for kind in kinds for f in path.glob(kind))
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()


def model_shapes(recipe: Recipe) -> Model:
    """The model of `load_model` with shapes for parameters: no weight is read or drawn."""
    fields = recipe.model
    _check_fields(fields)
    if fields.path is None:
        config, tokenizer = _fresh(recipe)
        return _computing(build_model(config, abstract_params(config), tokenizer=tokenizer), fields)
    with naming("config.model.path"):
        model = load_shapes(
            fields.path,
            scan_layers=fields.scan_layers,
            dtype="float32",
            revision=fields.revision,
        )
    return _computing(model, fields)


def _check_fields(fields: ModelFields) -> None:
    if (fields.path is None) == (not fields.architecture):
        raise InputError("config.model: give either path, or architecture for a fresh model")
    is_fresh = fields.path is None
    for name in ("arch", "revision") if is_fresh else ("tokenizer",):
        if getattr(fields, name) is not None:
            kind = "fresh" if is_fresh else "loaded"
            raise InputError(
                f"config.model.{name}: has no meaning for a {kind} model; leave it out"
            )


def _computing(model: Model, fields: ModelFields) -> Model:
    """The model, which computes and remembers as the fields say."""
    with naming("config.model.compute_dtype"):
        checked_dtype(fields.compute_dtype)
    if model.config is not None and fields.remat:
        config = dataclasses.replace(model.config, remat=True)
        made = build_model(config, model.params)
        model = model.replace(apply=made.apply, blocks=made.blocks, config=config)
    return with_compute_dtype(model, fields.compute_dtype)


def _fresh(recipe: Recipe) -> tuple[ModelConfig, Tokenizer | None]:
    fields = recipe.model
    entries = {"dtype": "float32", **fields.architecture}
    tokenizer = _tokenizer(recipe)
    if tokenizer is not None:
        entries.setdefault("vocab_size", tokenizer.vocab_size)
    config = _architecture(entries)
    config = dataclasses.replace(
        config, scan_layers=fields.scan_layers, dtype="float32", param_dtype="float32"
    )
    return config, tokenizer


def _architecture(entries: dict[str, Any]) -> ModelConfig:
    where = "config.model.architecture"
    with naming(where):
        family = family_of(entries)
        try:
            config = family.config.from_hf(entries)
        except TypeError as error:  # text where a number is reckoned with
            raise InputError(f"an entry is of the wrong type ({error})") from None
    hints = typing.get_type_hints(family.config)
    for name in family.config.architecture():
        checked(getattr(config, name), hints[name], f"{where}.{name}")
    return config


def _tokenizer(recipe: Recipe) -> Tokenizer | None:
    name = recipe.model.tokenizer
    if name is None:
        return None
    if not name.startswith(NEW_TOKENIZER):
        with naming("config.model.tokenizer"):
            found = Tokenizer.from_directory(find_checkpoint(name))
            if found is None:
                raise InputError(f"{name}: no tokenizer.json in it")
        return found
    size = name.removeprefix(NEW_TOKENIZER)
    if not size.isdecimal():
        raise InputError(f"config.model.tokenizer {name!r}: give train:SIZE, such as train:2048")
    with naming("config.data.train"):
        rows = load_documents(_given(recipe.data, "train"), column=recipe.data.column)
    with naming("config.model.tokenizer"):
        inner = train_tokenizer((row["text"] for row in rows), int(size))
    return Tokenizer(inner, bos_id=0, eos_ids=(0,))


def _given(fields: DataFields, role: str) -> Any:
    source = getattr(fields, role)
    if source is None:
        raise InputError("is needed; name a file, a data set or python-stdlib")
    return source


class Inputs:
    """The data of a recipe, read when they are first asked for."""

    def __init__(self, fields: DataFields, model: Model, seed: int) -> None:
        self.fields, self.tokenizer, self.seed = fields, model.tokenizer, seed
        self.is_text = hasattr(model.config, "vocab_size")
        if model.config is None:
            self.is_text = model.tokenizer is not None

    @property
    def roles(self) -> list[str]:
        """The roles for which data are given."""
        return [role for role in ROLES if getattr(self.fields, role) is not None]

    @functools.cache  # noqa: B019 (lives as long as the run)
    def dataset(self, role: str) -> Any:
        """Rows of windows or images of a role: "train", "heldout" or "calibration"."""
        if role == "calibration" and self.fields.calibration is None:
            role = "train"
        fields = self.fields
        with naming(f"config.data.{role}"):
            source = _given(fields, role)
            if self.is_text:
                return text_dataset(source, self.tokenizer, fields.ctx, column=fields.column)
            return image_dataset(source)

    def batches(self, batch_size: int, seed: int) -> Batches:
        """Endless batches of the training data."""
        transform = None if self.is_text else Prepare(augment=self.fields.augment)
        return Batches(self.dataset("train"), batch_size, seed=seed, transform=transform)

    @functools.cache  # noqa: B019 (lives as long as the run)
    def measured(self, role: str) -> Any:
        """What quality is measured on: ids `[tokens]`, or images and labels."""
        rows, count = self.dataset(role), len(self.dataset("heldout"))
        if self.is_text:
            if self.fields.tokens is not None:
                count = min(count, self.fields.tokens // self.fields.ctx)
            if count < 1:
                raise InputError(
                    f"config.data.tokens {self.fields.tokens}: less than one window of ctx "
                    f"{self.fields.ctx}"
                )
            return rows[: min(count, len(rows))]["ids"].reshape(-1)
        if self.fields.images is not None:
            count = min(count, self.fields.images)
        if count < 1:
            raise InputError(f"config.data.images {self.fields.images}: must be 1 or more")
        found = rows[: min(count, len(rows))]
        return found["images"], found["labels"]

    def drawn(self, role: str, count: int) -> np.ndarray:
        """Windows `[count, ctx]`, or normalized images, at random, in the order of the data."""
        return self._drawn(role, count)[0]

    def calibration(self, count: int) -> Any:
        """Drawn calibration data: windows, or (images, labels)."""
        found = self._drawn("calibration", count)
        return found[0] if self.is_text else found

    def _drawn(self, role: str, count: int) -> tuple[np.ndarray, ...]:
        rows = self.dataset(role)
        if not 1 <= count <= len(rows):
            raise InputError(f"{count} asked of data that hold {len(rows)}; take 1 to {len(rows)}")
        chosen = np.sort(np.random.default_rng(self.seed).choice(len(rows), count, replace=False))
        found = rows[chosen]
        return (found["ids"],) if self.is_text else (normalize(found["images"]), found["labels"])

    @functools.cached_property
    def summaries(self) -> list[dict[str, Any]]:
        """Name, role, SHA-256 and size of each data set, for the report."""
        return [
            summary(self.dataset(role), str(getattr(self.fields, role)), role)
            for role in self.roles
        ]

    def digests(self) -> dict[str, str]:
        """SHA-256 by role."""
        return {told["role"]: told["sha256"] for told in self.summaries}


def deployed(model: Model, dtype: str) -> Model:
    """The model as it would be stored: dense floating parameters in `dtype`."""

    def cast(leaf: Any) -> Any:
        is_float = hasattr(leaf, "dtype") and leaf.dtype == jnp.float32
        return leaf.astype(dtype) if is_float else leaf

    params = jax.tree.map(
        lambda leaf: leaf if is_compressed(leaf) else cast(leaf),
        model.params,
        is_leaf=is_compressed,
    )
    if model.config is None:
        return model.replace(params=params)
    return model.replace(params=params, config=dataclasses.replace(model.config, param_dtype=dtype))


def on_one_device(params: Any) -> Any:
    """Parameters on this process's first device, whole."""
    device = jax.local_devices()[0]

    def local(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if not leaf.is_fully_addressable:
            mesh = leaf.sharding.mesh  # type: ignore[attr-defined]
            everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            leaf = jax.jit(lambda x: x, out_shardings=everywhere)(leaf).addressable_data(0)
        return jax.device_put(leaf, device)

    return jax.tree.map(local, params)
