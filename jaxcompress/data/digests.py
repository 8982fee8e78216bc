"""What a data set is, for reports and for positions in it: SHA-256 and counts."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def digest(dataset: Dataset) -> str:
    """SHA-256 of a data set's content in its order, in hexadecimal digits.

    Of token ids: the int32 of all windows, little-endian. Of images: the encoded bytes of each,
    followed by its label as int64. Of other columns: their names and values as Python writes them.
    """
    found = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        if table.column_names == ["ids"]:
            ids = table["ids"].combine_chunks().flatten().to_numpy()
            found.update(ids.astype("<i4").tobytes())
            continue
        if not {"image", "label"} <= set(table.column_names):
            for name in sorted(table.column_names):
                found.update(repr((name, table[name].to_pylist())).encode())
            continue
        for image, label in zip(*(table[name].to_pylist() for name in ("image", "label"))):
            found.update(encoded(image) + int(label).to_bytes(8, "little", signed=True))
    return found.hexdigest()


def summary(dataset: Dataset, name: str, role: str) -> dict[str, Any]:
    """What a report says of a data set: name, role, SHA-256, and number of tokens or images."""
    told: dict[str, Any] = {"name": name, "role": role, "sha256": digest(dataset)}
    ctx = getattr(dataset.features.get("ids"), "length", None)
    return told | ({"images": len(dataset)} if ctx is None else {"tokens": len(dataset) * ctx})


def encoded(image: dict[str, Any] | bytes) -> bytes:
    """JPEG or PNG bytes of an image: bare, of `{"bytes": ...}`, or of the file `{"path": ...}`."""
    if not isinstance(image, dict):
        return image
    if image["bytes"] is not None:
        return image["bytes"]
    with open(image["path"], "rb") as file:
        return file.read()
