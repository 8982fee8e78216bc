"""Trainings in processes of their own."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

HERE = pathlib.Path(__file__).parent


class Worker:
    """One process of `fit_worker.py`; its output can be waited for."""

    def __init__(self, settings: dict, *, devices: int = 8, **variables: str) -> None:
        self.lines: list[str] = []
        self._heard = threading.Condition()
        self._over = False
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fit_worker.py"), json.dumps(settings, default=str)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                **variables,
            },
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._heard:
                self.lines.append(line.strip())
                self._heard.notify_all()
        with self._heard:
            self._over = True
            self._heard.notify_all()

    def wait_for(self, line: str) -> None:
        """Until the process says exactly this."""
        with self._heard:
            self._heard.wait_for(lambda: line in self.lines or self._over, timeout=300)
        assert line in self.lines, (self.lines, self.finish()[1])

    def finish(self) -> tuple[int, str]:
        """(exit code, stderr) once it is over."""
        _, err = "", self.process.stderr.read() if self.process.stderr else ""
        self.process.wait(timeout=300)
        self._reader.join()
        return self.process.returncode, err

    def said(self, word: str) -> list[str]:
        """What followed this word, in each line that begins with it."""
        return [line[len(word) + 1 :] for line in self.lines if line.startswith(word + " ")]


def several(count: int, settings: dict, *, devices: int) -> list[Worker]:
    """Processes that are one training, on the loopback."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [
        Worker(
            settings,
            devices=devices,
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES=str(count),
            JAX_PROCESS_ID=str(index),
        )
        for index in range(count)
    ]


def files_under(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Every file, in order."""
    return (path for path in sorted(directory.rglob("*")) if path.is_file())
