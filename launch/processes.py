#!/usr/bin/env python3
"""N processes on this machine, each `jaxcompress run RUN_OPTIONS...`, joined over loopback.

Without --cpu-devices process i takes accelerator i. Lines are marked with the process's number.
When a process fails the others are stopped and it is named; SIGTERM and SIGINT go on to all.

example: launch/processes.py 2 --cpu-devices 4 -- --config configs/demo.py --workdir out
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import IO

# Seconds in which the others end by themselves when one has failed.
GRACE = 20.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int, metavar="N", help="number of processes")
    parser.add_argument(
        "--cpu-devices", type=int, metavar="K", help="K virtual CPU devices in each process"
    )
    parser.add_argument("run", nargs="+", metavar="RUN_OPTIONS", help="after --")
    given = parser.parse_args()
    if given.count < 1:
        parser.error("N must be at least 1")
    command = ["jaxcompress", "run", *given.run]
    children = [
        subprocess.Popen(
            command,
            env=environment(index, given.count, port, given.cpu_devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A Ctrl-C of the terminal would reach them twice.
            start_new_session=True,
        )
        for port in [free_port()]
        for index in range(given.count)
    ]
    readers = [
        threading.Thread(target=copy, args=(source, sink, index), daemon=True)
        for index, child in enumerate(children)
        for source, sink in ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer))
    ]
    for reader in readers:
        reader.start()

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    failed = watch(children)
    for reader in readers:
        reader.join(GRACE)
    if failed is None:
        return 0
    code = children[failed].returncode
    said = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    print(f"processes.py: process {failed} {said}", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


def environment(index: int, count: int, port: int, cpu_devices: int | None) -> dict[str, str]:
    env = dict(os.environ)
    env["PYTHONUNBUFFERED"] = "1"
    env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
    env["JAX_NUM_PROCESSES"] = str(count)
    env["JAX_PROCESS_ID"] = str(index)
    if cpu_devices is None:
        env.setdefault("JAX_LOCAL_DEVICE_IDS", str(index))
    else:
        env["JAX_PLATFORMS"] = "cpu"
        flag = f"--xla_force_host_platform_device_count={cpu_devices}"
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flag}".strip()
    return env


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def copy(source: IO[bytes], sink: IO[bytes], index: int) -> None:
    for line in source:
        sink.write(f"[{index}] ".encode() + line)
        sink.flush()


def watch(children: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all; the first that failed, after which the others end or are killed."""
    failed, until = None, float("inf")
    while True:
        ended = [child.poll() is not None for child in children]
        if failed is None and any(child.returncode for child in children):
            failed = next(index for index, child in enumerate(children) if child.returncode)
            until = time.monotonic() + GRACE
        if all(ended):
            return failed
        if time.monotonic() > until:
            for child, gone in zip(children, ended, strict=True):
                if not gone:
                    os.killpg(child.pid, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
