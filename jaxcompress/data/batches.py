"""Endless batches of a data set, that go on exactly where a killed run stood.

The order of the rows follows from the seed alone: epoch after epoch, each a permutation of its
own. Batch i is rows [i*B, (i+1)*B) of that endless sequence, so that every row comes once per
epoch and a batch may hold the end of one epoch and the start of the next. Process p of P takes
rows [p*B/P, (p+1)*B/P) of each batch: what is trained on does not depend on P.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.data.ahead import Ahead
from jaxcompress.data.digests import digest

if TYPE_CHECKING:
    from datasets import Dataset

Batch = dict[str, np.ndarray]


class Places(NamedTuple):
    """Where the rows of a batch stand: all that their augmentation may depend on.

    Attributes:
      seed: of the run.
      epochs: int64 `[rows]`.
      indices: int64 `[rows]`, in the data set.
    """

    seed: int
    epochs: np.ndarray
    indices: np.ndarray


Transform = Callable[[Batch, Places], Batch]


class Batches:
    """Batches over a map-style data set; see the module's text.

    Attributes:
      sha256: of the data (see `digest`).
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        transform: Transform | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
        prefetch: int = 2,
    ) -> None:
        """Start at the first batch.

        Args:
          dataset: its rows, indexed by a list, are a dict of arrays.
          batch_size: rows of a global batch, all processes together.
          seed: of the order, and of what `transform` draws.
          shuffle: False for the order of the data set in every epoch.
          transform: what a batch goes through, this process's rows at once.
          process_index: by default `jax.process_index()`.
          process_count: by default `jax.process_count()`.
          prefetch: batches made ahead in a background thread; 0 for none and no thread.

        Raises:
          InputError: no rows, or the batch does not divide over the processes.
        """
        if not len(dataset):
            raise InputError("data without a row: nothing to make batches of")
        self._dataset = dataset
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._transform = transform
        self._rows = share_of_process(batch_size, process_index, process_count)
        self._order = functools.lru_cache(maxsize=2)(self._order_of)
        self._given = 0  # batches given out
        self._making = 0  # number of the batch that is made next
        self._ahead = Ahead(self._make, prefetch)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        """This process's rows of the next global batch."""
        batch = self._ahead.take()
        self._given += 1
        return batch

    @functools.cached_property
    def sha256(self) -> str:
        return digest(self._dataset)

    def state(self) -> dict[str, Any]:
        """Where the next batch is, and of what: JSON-able, and the same on every process."""
        epoch, position = divmod(self._given * self._batch_size, len(self._dataset))
        return {"epoch": epoch, "position": position, **self._made_of()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises:
          InputError: it was taken of other data, another batch size, seed or order.
        """
        refuse_other(state, self._made_of(), ("epoch", "position"))
        at = state["epoch"] * len(self._dataset) + state["position"]
        self._ahead.drop()
        self._given = self._making = at // self._batch_size

    def _made_of(self) -> dict[str, Any]:
        return {
            "sha256": self.sha256,
            "rows": len(self._dataset),
            "batch_size": self._batch_size,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def _make(self) -> Batch:
        first = self._making * self._batch_size
        at = np.arange(first + self._rows.start, first + self._rows.stop)
        epochs, positions = np.divmod(at, len(self._dataset))
        indices = np.empty_like(at)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self._order(int(epoch))[positions[chosen]]
        batch = dict(self._dataset[indices])
        if self._transform is not None:
            batch = self._transform(batch, Places(self._seed, epochs, indices))
        self._making += 1
        return batch

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._dataset))
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._dataset))


def share_of_process(
    batch_size: int, process_index: int | None = None, process_count: int | None = None
) -> range:
    """Rows of a global batch that a process takes; see `Batches`.

    Raises:
      InputError: the batch does not divide over the processes.
    """
    if process_index is None or process_count is None:
        import jax

        process_index = jax.process_index() if process_index is None else process_index
        process_count = jax.process_count() if process_count is None else process_count
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"batch size {batch_size}: must be a positive multiple of the {process_count} processes"
        )
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


def refuse_other(state: dict[str, Any], made_of: dict[str, Any], position: tuple[str, ...]) -> None:
    """Raise `InputError` unless `state` has the fields `position` and those of `made_of`, equal."""
    missing = [name for name in (*position, *made_of) if name not in state]
    if missing:
        raise InputError(f"position in the data: lacks {', '.join(missing)}; not of these batches")
    other = [
        f"{name} {_short(state[name])} then, {_short(value)} now"
        for name, value in made_of.items()
        if state[name] != value
    ]
    if other:
        raise InputError(
            f"position in the data: of other batches ({'; '.join(other)}); give the same data and "
            "settings, or begin anew"
        )


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 16 else str(value)
