"""What the name of a data set stands for, as a `datasets` object.

A source is
- `python-stdlib` or `python-stdlib:heldout` (`data.python_stdlib`),
- a file, a pattern with `*`, or a list of them: `.parquet`, `.jsonl` or `.json` (a row is a
  document or an image), anything else a UTF-8 text file (a file is a document),
- a directory that `datasets.load_dataset` reads or `Dataset.save_to_disk` wrote,
- the name of a data set on the Hugging Face hub, `NAME` or `NAME:CONFIG`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcompress.core.errors import InputError
from jaxcompress.data import python_stdlib

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def load(
    source: Source,
    *,
    split: str = "train",
    streaming: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset | IterableDataset:
    """The rows of a source; see the module's text.

    Args:
      source: see the module's text.
      split: of a directory or a hub data set, such as "train" or "validation[:10%]".
      streaming: an `IterableDataset` that reads as it goes, instead of a memory-mapped `Dataset`.
      cache_dir: of `datasets`; its own default, `~/.cache/huggingface/datasets`, where None.

    Raises:
      InputError: nothing of that name, or not readable.
    """
    import datasets

    name = describe(source)
    word = python_stdlib.split_of(name)
    if word is not None:
        return _stdlib(word, streaming)
    cache = None if cache_dir is None else os.fspath(cache_dir)
    saved = Path(name) / "state.json"
    arguments: dict[str, Any] = {}
    try:
        if saved.is_file():
            rows = datasets.load_from_disk(name)
            return rows.to_iterable_dataset() if streaming else rows
        path, arguments = _builder(source, name)
        return datasets.load_dataset(
            path, **arguments, split=split, streaming=streaming, cache_dir=cache
        )
    except InputError:
        raise
    except Exception as error:  # the library raises some forty classes
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        where = " from the hub, nor is it a file or directory here" if "name" in arguments else ""
        raise InputError(f"{name}: cannot load these data{where} ({reason})") from None


def load_documents(
    source: Source,
    *,
    split: str = "train",
    column: str = "text",
    streaming: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset | IterableDataset:
    """The documents of a source: rows with the one column `text`.

    Args:
      source: see the module's text.
      split: see `load`.
      column: that holds the text; files of text and the standard library have but "text".
      streaming: see `load`.
      cache_dir: see `load`.

    Raises:
      InputError: see `load`; or there is no such column.
    """
    rows = load(source, split=split, streaming=streaming, cache_dir=cache_dir)
    # A stream may know its columns only once it has read a row.
    columns = rows.column_names or list(next(iter(rows), {}))
    if column not in columns:
        raise InputError(
            f"{describe(source)}: no column {column}; it has {', '.join(map(str, columns))}"
        )
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


def describe(source: Source) -> str:
    """Name of a source, on one line."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return ", ".join(os.fspath(s) for s in source)


def _stdlib(split: str, streaming: bool) -> Dataset | IterableDataset:
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable

    texts = [text for _, text in python_stdlib.sources(split)]
    table = InMemoryTable(pa.table({"text": texts}))
    rows = datasets.Dataset(table, fingerprint=python_stdlib.digest(split))
    return rows.to_iterable_dataset() if streaming else rows


def _builder(source: Source, name: str) -> tuple[str, dict[str, Any]]:
    """First argument and further ones of `load_dataset`."""
    import datasets

    if isinstance(source, (str, os.PathLike)):
        if Path(name).is_dir():
            # A row of the text builder is a line unless it is told otherwise, and others do not
            # take the option.
            is_text = datasets.load_dataset_builder(name).name == "text"
            return name, {"sample_by": "document"} if is_text else {}
        is_file = Path(name).exists() or glob.has_magic(name) or Path(name).suffix in _BUILDERS
        if not is_file and _HUB_NAME.fullmatch(name) and not name.endswith(".txt"):
            hub, _, config = name.partition(":")
            return hub, {"name": config or None}
    files = _files([source] if isinstance(source, (str, os.PathLike)) else source)
    builders = {_BUILDERS.get(Path(file).suffix, "text") for file in files}
    if len(builders) > 1:
        raise InputError(f"{name}: files of several kinds ({', '.join(sorted(builders))})")
    (builder,) = builders
    options = {"sample_by": "document"} if builder == "text" else {}
    return builder, {"data_files": files} | options


def _files(patterns: Sequence[str | os.PathLike[str]]) -> list[str]:
    found: list[str] = []
    for pattern in (os.fspath(p) for p in patterns):
        matching = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        files = sorted(os.path.abspath(path) for path in matching if Path(path).is_file())
        if not files:
            raise InputError(
                f"{pattern}: no such file, directory or data set; give a path, a pattern with *, "
                f"the name of a data set on the hub, or {python_stdlib.WORD}"
            )
        found += files
    return found
