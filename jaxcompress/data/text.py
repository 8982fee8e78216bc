"""Text to token ids, windows and calibration batches."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.data import bpe, python_stdlib

# A path to a text file, `python-stdlib` or `python-stdlib:heldout`, the text itself, or an integer
# array of token ids.
Text = Any


def token_ids(text: Text, tokenizer: Any = None) -> np.ndarray:
    """Token ids of a text, without special tokens but for one between two documents.

    Args:
      text: a path to a UTF-8 text file, `python-stdlib[:heldout]` (a document per module), the
        text itself, or integer ids of any shape.
      tokenizer: object with `encode(text) -> ids`; not needed for ids.

    Returns:
      int32 `[tokens]`.

    Raises:
      InputError: no such file, not UTF-8, or no tokenizer.
    """
    if not isinstance(text, (str, os.PathLike)):
        return np.asarray(text, np.int32).reshape(-1)
    documents = _documents(text)
    if tokenizer is None:
        raise InputError("text given, but the model has no tokenizer: pass token ids instead")
    return join_documents(map(tokenizer.encode, documents), separator_id(tokenizer))


def read_text(text: str | os.PathLike[str]) -> str:
    """Content of the file or of the `python-stdlib` split `text`, or `text` itself where it is
    no path but a text.
    """
    name = os.fspath(text)
    split = python_stdlib.split_of(name)
    if split is not None:
        return python_stdlib.stdlib_text(split)
    if len(name) > 1000 or "\n" in name or (" " in name and not os.path.exists(name)):
        return name
    try:
        with open(name, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{name}: cannot read the text file ({error.strerror})") from None


def separator_id(tokenizer: Any) -> int | None:
    """The id that stands between two documents: the tokenizer's end of text, None without one.

    Args:
      tokenizer: a `jaxcompress.models.tokenizer.Tokenizer`, or any object that encodes.
    """
    ends = getattr(tokenizer, "eos_ids", ())
    if ends:
        return int(ends[0])
    inner = getattr(tokenizer, "inner", None)
    return None if inner is None else inner.token_to_id(bpe.END_OF_TEXT)


def join_documents(documents: Iterable[list[int]], separator: int | None) -> np.ndarray:
    """Ids of documents one after another, `separator` between two; int32 `[tokens]`.

    Documents without a token leave no trace.
    """
    between = [] if separator is None else [separator]
    joined: list[int] = []
    for ids in filter(len, documents):
        joined += [*between, *ids] if joined else ids
    return np.asarray(joined, np.int32)


def _documents(text: str | os.PathLike[str]) -> list[str]:
    split = python_stdlib.split_of(os.fspath(text))
    if split is None:
        return [read_text(text)]
    return [module for _, module in python_stdlib.sources(split)]


def calibration_batch(
    text: Text, tokenizer: Any = None, *, samples: int = 32, ctx: int = 512, seed: int = 0
) -> np.ndarray:
    """`samples` windows of `ctx` tokens, drawn without replacement, in the order of the text.

    Args:
      text: see `token_ids`; an integer array `[samples, ctx]` passes as it is.
      tokenizer: see `token_ids`.
      samples: number of windows.
      ctx: tokens in a window.
      seed: of the draw.

    Returns:
      int32 `[samples, ctx]`.

    Raises:
      InputError: the text holds fewer windows than asked, or a number is out of range.
    """
    if not isinstance(text, (str, os.PathLike)) and np.ndim(text) == 2:
        return np.asarray(text, np.int32)
    for name, value, least in (("ctx", ctx, 1), ("samples", samples, 1), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"calibration {name} {value}: must be {least} or more")
    ids = token_ids(text, tokenizer)
    count = len(ids) // ctx
    if count < samples:
        raise InputError(
            f"calibration text: {len(ids)} tokens hold {count} windows of {ctx}, {samples} asked; "
            f"give a longer text, or --calibration-samples {max(count, 1)}, or a smaller --ctx"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(count, samples, replace=False))
    return ids[: count * ctx].reshape(count, ctx)[chosen]
