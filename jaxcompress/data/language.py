"""Windows of token ids, packed from documents, as a memory-mapped data set."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.data.sources import Source, describe, load_documents
from jaxcompress.data.text import separator_id

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENTS_AT_A_TIME = 64
# Part of the name of what is cached: to be raised when the same input gives other windows.
_VERSION = 1


def text_dataset(
    source: Source | np.ndarray,
    tokenizer: Any = None,
    ctx: int = 512,
    *,
    split: str = "train",
    column: str = "text",
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Documents tokenized, joined by the end of text, and cut into windows of `ctx` ids.

    The remainder after the last whole window is dropped. What was made once is read again from
    the cache as long as documents, tokenizer and `ctx` are the same ones.

    Args:
      source: see `data.sources`; or integer ids of any shape, which are windowed as they are.
      tokenizer: a `jaxcompress.models.tokenizer.Tokenizer`; not needed for ids.
      ctx: tokens in a window.
      split: of a directory or a hub data set.
      column: that holds the text, where a row is a document.
      cache_dir: of `datasets`; its own default, `~/.cache/huggingface/datasets`, where None.

    Returns:
      A data set of rows `{"ids": int32 [ctx]}`, in the order of the text.

    Raises:
      InputError: the source cannot be read, there is no tokenizer, or not one window.
    """
    import datasets

    if ctx < 1:
        raise InputError(f"ctx {ctx}: must be 1 or more")
    if isinstance(source, np.ndarray):
        return _of_ids(source, ctx)
    if tokenizer is None:
        raise InputError(f"{describe(source)}: text, but the model has no tokenizer; pass ids")
    documents = load_documents(source, split=split, column=column, cache_dir=cache_dir)
    separator = separator_id(tokenizer)
    made_of = [documents._fingerprint, tokenizer.inner.to_str(), separator, ctx, _VERSION]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def rows() -> Iterator[dict[str, np.ndarray]]:
        ids = encode_documents((row["text"] or "" for row in documents), tokenizer)
        count = 0
        for window in windows(ids, ctx, separator):
            yield {"ids": window}
            count += 1
        if not count:
            raise InputError(f"{describe(source)}: holds not one window of {ctx} tokens")

    try:
        packed = datasets.Dataset.from_generator(
            rows,
            features=_features(ctx),
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            fingerprint=key[:64],
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise
    return _as_int32(packed)


def encode_documents(texts: Iterable[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """Token ids int32 `[tokens]` of each text, without special tokens; on all cores."""
    texts = iter(texts)
    while some := list(itertools.islice(texts, DOCUMENTS_AT_A_TIME)):
        for encoding in tokenizer.inner.encode_batch(some, add_special_tokens=False):
            yield np.asarray(encoding.ids, np.int32)


def windows(
    documents: Iterable[np.ndarray], ctx: int, separator: int | None
) -> Iterator[np.ndarray]:
    """Cut documents, joined as in `text.join_documents`, into int32 `[ctx]`; drop the rest."""
    between = np.asarray([] if separator is None else [separator], np.int32)
    left = np.zeros(0, np.int32)
    first = True
    for ids in filter(len, documents):
        joined = np.concatenate([left, ids] if first else [left, between, ids])
        first = False
        whole = len(joined) // ctx * ctx
        yield from joined[:whole].reshape(-1, ctx)
        left = joined[whole:]


def _of_ids(ids: np.ndarray, ctx: int) -> Dataset:
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable

    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"array of {ids.dtype}: token ids must be integers")
    count = ids.size // ctx
    if not count:
        raise InputError(f"{ids.size} token ids: hold not one window of {ctx} tokens")
    flat = pa.array(ids.reshape(-1)[: count * ctx].astype(np.int32))
    table = pa.table({"ids": pa.FixedSizeListArray.from_arrays(flat, ctx)})
    info = datasets.DatasetInfo(features=_features(ctx))
    return _as_int32(datasets.Dataset(InMemoryTable(table), info=info))


def _features(ctx: int) -> Any:
    import datasets

    return datasets.Features({"ids": datasets.List(datasets.Value("int32"), length=ctx)})


def _as_int32(rows: Dataset) -> Dataset:
    # The format's own choice for integers is int64.
    return rows.with_format("numpy", dtype=np.int32)
