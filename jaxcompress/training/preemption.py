"""A signal that asks a training to stop: answered with a checkpoint, not with a death."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress.training.step import steps_ahead


class Preempted(BaseException):
    """Stopped on request, training at a checkpoint; the same command goes on from there.

    No `Exception`: libraries take those that come while they work for errors of their own.
    """


@contextlib.contextmanager
def preemptible(what: str) -> Iterator[None]:
    """Within, SIGTERM ends the program by `Preempted`, at once where nothing trains.

    What is worked on then must bear to be killed at any moment. `Preemption` inside of it, around
    a training, answers with a checkpoint first.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted(f"{what}: stopped on request; the same command goes on from here")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class Preemption:
    """Notices SIGTERM (clusters) and SIGINT (a person) while a training runs.

    A second SIGINT interrupts at once. With several processes all of them stop at the same step,
    whichever was told. A signal that comes too late to be answered is raised again at the end.
    """

    def __init__(self) -> None:
        self._asked = 0  # number of the signal
        self._before: dict[int, Any] = {}
        self._answers: deque[jax.Array] = deque()

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
            # None: a handler that Python did not install, and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if kind is None and self._asked:
            signal.raise_signal(self._asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = number
        # Not `print`, which this signal may have interrupted.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: stopping at a checkpoint after this step\n".encode())

    def requested(self) -> bool:
        """Whether to stop before the next step; every process must ask after every step.

        With several processes the answer is of as many steps before as the host may be ahead of
        the devices, so that nothing waits for it.
        """
        if jax.process_count() == 1:
            return bool(self._asked)
        self._answers.append(_any_process(bool(self._asked)))
        return len(self._answers) > steps_ahead() and bool(self._answers.popleft())


def _any_process(flag: bool) -> jax.Array:
    """Whether the flag of any process is set, on its way."""
    rows, any_of = _reduction()
    return any_of(jax.make_array_from_process_local_data(rows, np.array([flag])))


@functools.cache
def _reduction() -> tuple[NamedSharding, Any]:
    """How the flags of all processes lie, one row each, and their reduction."""
    devices: dict[int, list[Any]] = {}
    for device in jax.devices():
        devices.setdefault(device.process_index, []).append(device)
    mesh = Mesh(np.array([of[0] for _, of in sorted(devices.items())]), "process")
    rows = NamedSharding(mesh, P("process"))
    return rows, jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, P()))
