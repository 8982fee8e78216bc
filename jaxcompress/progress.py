"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def progress(
    items: Iterable[T],
    what: str,
    *,
    total: int | None = None,
    unit: str = "it",
    done: int = 0,
    note: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Yields `items` and tells on stderr how far they are.

    Args:
      items: what is worked through.
      what: name of the work, such as "compress".
      total: number of items; by default their length where they have one.
      unit: name of one item.
      done: items that were worked through before, in a run that is taken up again.
      note: what else to tell each time.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(items, what, total=total, initial=done, unit=unit, leave=False, mininterval=0.2)
        for item in bar:
            yield item
            if note is not None:
                bar.set_postfix_str(note(), refresh=False)
        return
    start = last = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            rate = count / (now - start)
            left = f", {(total - done - count) / rate:.0f} s left" if total else ""
            of = f"/{total}" if total else ""
            told = f", {note()}" if note is not None and note() else ""
            print(
                f"{what}: {done + count}{of} {unit}, {rate:.2f} {unit}/s{left}{told}",
                file=sys.stderr,
            )
