"""Labelled images from a parquet file."""

from __future__ import annotations

import io
import os

import numpy as np

from jaxcompress.core.errors import InputError

# Channel statistics that the CIFAR checkpoints of akamaster/pytorch_resnet_cifar10 expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


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
    from PIL import Image

    try:
        table = pyarrow.parquet.read_table(path)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: cannot read as a parquet file of images ({reason})") from None
    column = next((c for c in ("img", "image") if c in table.column_names), None)
    if column is None or "label" not in table.column_names:
        raise InputError(
            f"{path}: needs columns img and label, has {', '.join(table.column_names)}"
        )
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: must be 1 or more images")
    table = table.slice(0, limit)
    rows = table.column(column).to_pylist()
    encoded = [row["bytes"] if isinstance(row, dict) else row for row in rows]
    pixels = [np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in encoded]
    return np.stack(pixels), np.asarray(table.column("label").to_pylist(), np.int32)


def normalize(images: np.ndarray) -> np.ndarray:
    """uint8 images to float32 with the channel statistics above."""
    scaled = images.astype(np.float32) / 255
    return (scaled - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
