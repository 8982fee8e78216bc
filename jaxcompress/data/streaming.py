"""Batches of text that is read as it goes: data that do not fit on the disk.

Each process reads a part of its own (whole files where their number divides over the processes,
else every P-th document), packs it, and fills its rows of every batch. Other than in
`data.batches`, what a batch holds depends on the number of processes, and an epoch ends for each
process at a moment of its own.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.data.ahead import Ahead
from jaxcompress.data.batches import Batch, refuse_other, share_of_process
from jaxcompress.data.sources import Source, describe, load_documents
from jaxcompress.data.text import separator_id

if TYPE_CHECKING:
    from datasets import IterableDataset


class Place(NamedTuple):
    """Where a window begins.

    Attributes:
      epoch: times that the documents were all read.
      documents: `state_dict` of their stream before the document at hand; None at the start.
      offset: tokens of that document, its end of text included, that went into windows before.
    """

    epoch: int = 0
    documents: dict[str, Any] | None = None
    offset: int = 0


class Position(NamedTuple):
    """Where a row stands: `row` of the shuffled block `number`, which begins at `place`."""

    place: Place = Place()
    number: int = 0
    row: int = 0


class StreamBatches:
    """Batches `{"ids": int32 [rows, ctx]}` over an endless stream of documents.

    Windows are shuffled within blocks. A position is where its block begins: to resume is to read
    the block again, so that nothing of it need be stored.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        ctx: int,
        batch_size: int,
        *,
        split: str = "train",
        column: str = "text",
        seed: int = 0,
        block: int = 1024,
        process_index: int | None = None,
        process_count: int | None = None,
        prefetch: int = 2,
    ) -> None:
        """Start at the first batch.

        Args:
          source: see `data.sources`.
          tokenizer: a `jaxcompress.models.tokenizer.Tokenizer`.
          ctx: tokens in a window.
          batch_size: rows of a global batch, all processes together.
          split: of a directory or a hub data set.
          column: that holds the text, where a row is a document.
          seed: of the order within blocks.
          block: windows that are held and shuffled together; 1 for the order of the documents.
          process_index: by default `jax.process_index()`.
          process_count: by default `jax.process_count()`.
          prefetch: batches made ahead in a background thread; 0 for none and no thread.

        Raises:
          InputError: the source cannot be read, or the batch does not divide over the processes.
        """
        for name, value in (("ctx", ctx), ("block", block)):
            if value < 1:
                raise InputError(f"{name} {value}: must be 1 or more")
        share = share_of_process(batch_size, process_index, process_count)
        self._rows_of_process = len(share)
        self._process = share.start // len(share)
        self._processes = batch_size // len(share)
        self._documents = _part(source, split, column, self._process, self._processes)
        self._name = f"{describe(source)} [{split}] {column}"
        self._tokenizer = tokenizer
        self._ctx = ctx
        self._seed = seed
        self._block = block
        self._given = Position()
        self._rows = self._rows_from(self._given)
        self._ahead = Ahead(self._make, prefetch)

    def __iter__(self) -> StreamBatches:
        return self

    def __next__(self) -> Batch:
        """This process's rows of the next global batch."""
        batch, self._given = self._ahead.take()
        return batch

    def state(self) -> dict[str, Any]:
        """Where the next batch is, and of what: JSON-able; every process has a state of its own."""
        return {**self._given._asdict(), **self._made_of()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises:
          InputError: it was taken of another source, tokenizer, batch size, seed, process or
            number of processes.
        """
        refuse_other(state, self._made_of(), Position._fields)
        place, *rest = (state[name] for name in Position._fields)
        self._ahead.drop()
        self._given = Position(Place(*place), *rest)
        self._rows = self._rows_from(self._given)

    def _made_of(self) -> dict[str, Any]:
        tokenizer = self._tokenizer.inner.to_str()
        return {
            "source": self._name,
            "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
            "ctx": self._ctx,
            "batch_size": self._rows_of_process * self._processes,
            "seed": self._seed,
            "block": self._block,
            "process": self._process,
            "processes": self._processes,
        }

    def _make(self) -> tuple[Batch, Position]:
        rows = list(itertools.islice(self._rows, self._rows_of_process))
        return {"ids": np.stack([window for window, _ in rows])}, rows[-1][1]

    def _rows_from(self, at: Position) -> Iterator[tuple[np.ndarray, Position]]:
        """Windows in shuffled order, each with the position after it."""
        place, number, row = at
        windows = self._windows_from(place)
        while True:
            held = list(itertools.islice(windows, self._block))
            draw = np.random.default_rng((self._seed, self._process, number))
            order = draw.permutation(len(held))
            for given in range(row, len(held)):
                yield held[order[given]][0], Position(place, number, given + 1)
            place, number, row = held[-1][1], number + 1, 0

    def _windows_from(self, place: Place) -> Iterator[tuple[np.ndarray, Place]]:
        """Windows in the order of the documents, each with the place after it."""
        offset = place.offset
        left = np.zeros(0, np.int32)
        for ids, (epoch, documents, _) in self._documents_from(place):
            left = np.concatenate([left, ids[offset:]])
            offset = 0
            # What is left after a window is of the last document alone, as what was left before
            # it held less than a window.
            while len(left) >= self._ctx:
                window, left = left[: self._ctx], left[self._ctx :]
                yield window, Place(epoch, documents, len(ids) - len(left))

    def _documents_from(self, place: Place) -> Iterator[tuple[np.ndarray, Place]]:
        """Ids of documents, end of text included, each with the place where it begins."""
        separator = separator_id(self._tokenizer)
        end = [] if separator is None else [separator]
        epoch, state, _ = place
        while True:
            self._documents.set_epoch(epoch)
            self._documents.load_state_dict(state)
            found = state is not None
            for row in self._documents:
                begin, state = Place(epoch, state), self._documents.state_dict()
                ids = self._tokenizer.encode(row["text"]) if row["text"] else []
                if ids:
                    found = True
                    yield np.asarray([*ids, *end], np.int32), begin
            if not found:
                raise InputError(f"{self._name}: no document for process {self._process}")
            epoch, state = epoch + 1, None


def _part(source: Source, split: str, column: str, index: int, count: int) -> IterableDataset:
    from datasets.distributed import split_dataset_by_node

    documents = load_documents(source, split=split, column=column, streaming=True)
    return split_dataset_by_node(documents, index, count)
