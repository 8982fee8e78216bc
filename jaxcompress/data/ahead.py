"""Work done ahead in one background thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Results of calling `make` again and again, in order, made before they are asked for."""

    def __init__(self, make: Callable[[], T], depth: int) -> None:
        """Nothing is made before the first `take`.

        Args:
          make: called by one thread at a time.
          depth: results to have ready; with 0 `make` runs in `take` and there is no thread.
        """
        self._make = make
        self._depth = depth
        self._pending: deque[Future[T]] = deque()
        self._thread = ThreadPoolExecutor(1, "batches") if depth else None

    def take(self) -> T:
        """The next result; what `make` raised is raised here."""
        if self._thread is None:
            return self._make()
        while len(self._pending) <= self._depth:
            self._pending.append(self._thread.submit(self._make))
        return self._pending.popleft().result()

    def drop(self) -> None:
        """Forget what was made ahead, and wait until nothing is being made."""
        for future in self._pending:
            future.cancel()
        while self._pending:
            future = self._pending.popleft()
            if not future.cancelled():
                future.exception()
