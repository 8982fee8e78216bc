"""Labelled images: from files, as data sets, and prepared for a network."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.data.digests import encoded
from jaxcompress.data.sources import Source, describe, load

if TYPE_CHECKING:
    from datasets import Dataset

    from jaxcompress.data.batches import Batch, Places

# Channel statistics that the CIFAR checkpoints of akamaster/pytorch_resnet_cifar10 expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_IMAGE_COLUMNS = ("img", "image")


def read_images(
    path: str | os.PathLike[str], limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a parquet file with columns `img` (or `image`) and `label`.

    Args:
      path: parquet file; images are encoded bytes (JPEG, PNG), bare or as `{"bytes": ...}`.
      limit: at most so many, from the start.

    Returns:
      uint8 `[images, height, width, 3]`, int32 `[images]`.

    Raises:
      InputError: not readable, or a column is missing.
    """
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: cannot read as a parquet file of images ({reason})") from None
    column = _image_column(os.fspath(path), table.column_names)
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: must be 1 or more images")
    table = table.slice(0, limit)
    labels = np.asarray(table.column("label").to_pylist(), np.int32)
    return _decoded(table.column(column).to_pylist()), labels


def image_dataset(
    source: Source,
    *,
    split: str = "train",
    limit: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Labelled images, decoded when a batch of them is read.

    Args:
      source: see `data.sources`; columns `img` (or `image`) of encoded images, and `label`.
      split: of a directory or a hub data set.
      limit: at most so many, from the start.
      cache_dir: of `datasets`; its own default where None.

    Returns:
      A data set whose rows, several at once, are `{"images": uint8 [rows, height, width, 3],
      "labels": int32 [rows]}`.

    Raises:
      InputError: not readable, or a column is missing.
    """
    import datasets

    rows = load(source, split=split, cache_dir=cache_dir)
    column = _image_column(describe(source), rows.column_names)
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: must be 1 or more images")
    rows = rows.select_columns([column, "label"])
    rows = rows if column == "image" else rows.rename_column(column, "image")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    return rows.select(range(min(limit or len(rows), len(rows)))).with_transform(_arrays)


def normalize(
    images: np.ndarray, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> np.ndarray:
    """uint8 images `[..., channels]` to float32 of about zero mean and unit variance."""
    scaled = images.astype(np.float32) / 255
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


@dataclass(frozen=True)
class Prepare:
    """Transform of `data.batches.Batches`: images as a network takes them.

    Attributes:
      augment: whether to crop and mirror at random (He et al. 2015, section 4.2). What a row gets
        follows from the seed, the epoch and its index alone.
      padding: pixels added at each side before an image is cropped to its size again.
      fill: what the added pixels are: the image mirrored at its edge, or black.
      mean: of each channel, in 0..1.
      std: of each channel, in 0..1.
    """

    augment: bool = False
    padding: int = 4
    fill: Literal["reflect", "zero"] = "reflect"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, batch: Batch, places: Places) -> Batch:
        """uint8 `images [rows, height, width, channels]` to normalized float32; `labels` stay."""
        images = batch["images"]
        if self.augment:
            images = self._cropped_and_mirrored(images, places)
        return batch | {"images": normalize(images, self.mean, self.std)}

    def _cropped_and_mirrored(self, images: np.ndarray, places: Places) -> np.ndarray:
        rows, height, width, _ = images.shape
        top, left, mirrored = (random_bits(places, draw) for draw in range(3))
        sides = (self.padding, self.padding)
        mode: Any = {"reflect": "reflect", "zero": "constant"}[self.fill]
        padded = np.pad(images, ((0, 0), sides, sides, (0, 0)), mode=mode)
        places_of_a_crop = np.uint64(2 * self.padding + 1)
        y = (top % places_of_a_crop).astype(int)[:, None] + np.arange(height)
        x = (left % places_of_a_crop).astype(int)[:, None] + np.arange(width)
        x = np.where((mirrored & np.uint64(1)).astype(bool)[:, None], x[:, ::-1], x)
        return padded[np.arange(rows)[:, None, None], y[:, :, None], x[:, None, :]]


def random_bits(places: Places, draw: int) -> np.ndarray:
    """uint64 `[rows]` that depend on seed, epoch, index and `draw` alone.

    The output function of SplitMix64 (Steele et al. 2014, figure 17), once for each of the four.
    """
    bits = np.zeros(len(places.indices), np.uint64)
    for part in (places.seed, places.epochs, places.indices, draw):
        bits = bits + np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    return bits


def _image_column(name: str, columns: list[str]) -> str:
    column = next((c for c in _IMAGE_COLUMNS if c in columns), None)
    if column is None or "label" not in columns:
        raise InputError(f"{name}: needs columns img and label, has {', '.join(columns)}")
    return column


def _arrays(rows: dict[str, list[Any]]) -> dict[str, np.ndarray]:
    return {"images": _decoded(rows["image"]), "labels": np.asarray(rows["label"], np.int32)}


def _decoded(rows: list[Any]) -> np.ndarray:
    """uint8 `[images, height, width, 3]`."""
    from PIL import Image

    pixels = [np.asarray(Image.open(io.BytesIO(encoded(row))).convert("RGB")) for row in rows]
    sizes = {image.shape[:2] for image in pixels}
    if len(sizes) > 1:
        raise InputError(f"images of {len(sizes)} sizes, {min(sizes)} to {max(sizes)}: resize them")
    return np.stack(pixels)
