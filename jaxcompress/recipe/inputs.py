"""The model that a recipe begins with, and its data."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import api
from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.data.batches import Batches, digest, summary
from jaxcompress.data.bpe import train_tokenizer
from jaxcompress.data.images import Prepare, image_dataset
from jaxcompress.data.language import text_dataset
from jaxcompress.data.sources import load_documents
from jaxcompress.models import Tokenizer, build_model, family_of, find_checkpoint
from jaxcompress.models.precision import with_compute_dtype
from jaxcompress.recipe.config import DataFields, ModelFields, Recipe

NEW_TOKENIZER = "train:"


def load_model(recipe: Recipe) -> Model:
    """The model of `config.model`, its parameters float32.

    Raises:
      InputError: neither or both of a path and an architecture, or what `load` raises.
    """
    fields = recipe.model
    if (fields.path is None) == (not fields.architecture):
        raise InputError("config.model: give either path, or architecture for a fresh model")
    if fields.path is not None:
        model = api.load(
            fields.path,
            arch=fields.arch,
            scan_layers=fields.scan_layers,
            dtype="float32",
            revision=fields.revision,
        )
        model = _switched(model, remat=fields.remat)
    else:
        model = _fresh(recipe)
    return with_compute_dtype(model, fields.compute_dtype)


def stored_dtype(model: Model) -> str:
    """The dtype in which the model's weights came: that of its config.json, float32 without."""
    original = getattr(model.config, "original", None) or {}
    return str(original.get("dtype") or original.get("torch_dtype") or "float32")


def model_digest(fields: ModelFields) -> str | None:
    """SHA-256 of the model's weight files and config, in the order of their names."""
    if fields.path is None:
        return None
    path = find_checkpoint(fields.path, fields.revision)
    kinds = ("*.safetensors", "*.bin", "config.json")
    files = [path] if path.is_file() else sorted(f for kind in kinds for f in path.glob(kind))
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()


def _fresh(recipe: Recipe) -> Model:
    fields = recipe.model
    entries = {"dtype": "float32", **fields.architecture}
    tokenizer = _tokenizer(recipe)
    if tokenizer is not None:
        entries.setdefault("vocab_size", tokenizer.vocab_size)
    config = family_of(entries).config.from_hf(entries)
    config = dataclasses.replace(
        config,
        scan_layers=fields.scan_layers,
        remat=fields.remat,
        dtype="float32",
        param_dtype="float32",
    )
    return build_model(config, seed=recipe.seed, tokenizer=tokenizer)


def _tokenizer(recipe: Recipe) -> Tokenizer | None:
    name = recipe.model.tokenizer
    if name is None:
        return None
    if not name.startswith(NEW_TOKENIZER):
        found = Tokenizer.from_directory(find_checkpoint(name))
        if found is None:
            raise InputError(f"config.model.tokenizer {name!r}: no tokenizer.json in it")
        return found
    size = name.removeprefix(NEW_TOKENIZER)
    if not size.isdecimal():
        raise InputError(f"config.model.tokenizer {name!r}: give train:SIZE, such as train:2048")
    rows = load_documents(_given(recipe.data, "train"), column=recipe.data.column)
    inner = train_tokenizer((row["text"] for row in rows), int(size))
    return Tokenizer(inner, bos_id=0, eos_ids=(0,))


def _switched(model: Model, *, remat: bool) -> Model:
    if model.config is None or not remat:
        return model
    config = dataclasses.replace(model.config, remat=True)
    made = build_model(config, model.params)
    return model.replace(apply=made.apply, blocks=made.blocks, config=config)


def _given(fields: DataFields, role: str) -> Any:
    source = getattr(fields, role)
    if source is None:
        raise InputError(f"config.data.{role}: is needed; name a file, a data set or python-stdlib")
    return source


class Inputs:
    """The data of a recipe, read when they are first asked for."""

    def __init__(self, fields: DataFields, model: Model, seed: int) -> None:
        self.fields, self.tokenizer, self.seed = fields, model.tokenizer, seed
        self.is_text = model.config is None or hasattr(model.config, "vocab_size")

    @functools.cache  # noqa: B019 (lives as long as the run)
    def dataset(self, role: str) -> Any:
        """Rows of windows or images of a role: "train", "heldout" or "calibration"."""
        if role == "calibration" and self.fields.calibration is None:
            role = "train"
        source = _given(self.fields, role)
        if self.is_text:
            return text_dataset(source, self.tokenizer, self.fields.ctx, column=self.fields.column)
        return image_dataset(source)

    def batches(self, batch_size: int, seed: int) -> Batches:
        """Endless batches of the training data."""
        transform = None if self.is_text else Prepare(augment=self.fields.augment)
        return Batches(self.dataset("train"), batch_size, seed=seed, transform=transform)

    def measured(self, role: str) -> Any:
        """What quality is measured on: ids `[tokens]`, or images and labels."""
        rows = self.dataset(role)
        if self.is_text:
            windows = len(self.dataset("heldout"))
            if self.fields.tokens is not None:
                windows = min(windows, self.fields.tokens // self.fields.ctx)
            if windows < 1:
                raise InputError(
                    f"config.data.tokens {self.fields.tokens}: less than one window of ctx "
                    f"{self.fields.ctx}"
                )
            return rows[: min(windows, len(rows))]["ids"].reshape(-1)
        count = min(self.fields.images or len(self.dataset("heldout")), len(rows))
        found = rows[:count]
        return found["images"], found["labels"]

    def calibration(self, samples: int) -> np.ndarray:
        """Windows `[samples, ctx]`, or normalized images, for methods that need data."""
        rows = self.dataset("calibration")
        if len(rows) < samples:
            raise InputError(
                f"calibration_samples {samples}: the data hold {len(rows)}; take fewer"
            )
        chosen = np.sort(np.random.default_rng(self.seed).choice(len(rows), samples, replace=False))
        if self.is_text:
            return rows[chosen]["ids"]
        return Prepare()(rows[chosen], places=None)["images"]  # type: ignore[arg-type]

    def summaries(self) -> list[dict[str, Any]]:
        """Name, role, SHA-256 and size of each data set, for the report."""
        return [
            summary(self.dataset(role), str(getattr(self.fields, role)), role)
            for role in ("train", "heldout", "calibration")
            if getattr(self.fields, role) is not None
        ]

    def digests(self) -> dict[str, str]:
        """SHA-256 by role."""
        roles = ("train", "heldout", "calibration")
        return {role: digest(self.dataset(role)) for role in roles if getattr(self.fields, role)}


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
