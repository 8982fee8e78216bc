"""A signal that asks a training to stop: answered with a checkpoint, not with a death."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax


class Preempted(Exception):
    """Training stopped on request, at a checkpoint; the same command goes on from there."""


class Preemption:
    """Notices SIGTERM (clusters) and SIGINT (a person) while a training runs.

    A second SIGINT interrupts at once. With several processes all of them stop at the same step,
    whichever was told.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def requested(self) -> bool:
        """Whether to stop before the next step; every process must ask at the same steps."""
        if jax.process_count() == 1:
            return self._asked
        import numpy as np
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.int32(self._asked)).any())
