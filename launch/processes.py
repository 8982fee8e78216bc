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
    code = watch(children)
    for reader in readers:
        reader.join(GRACE)
    return code


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


def watch(children: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; the exit code of the first that failed, after the others have been stopped."""
    code, until = 0, float("inf")
    while running := [child for child in children if child.poll() is None]:
        failed = [index for index, child in enumerate(children) if child.poll()]
        if failed and not code:
            code = children[failed[0]].returncode
            said = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            until = time.monotonic() + GRACE
            print(f"processes.py: process {failed[0]} {said}", file=sys.stderr, flush=True)
        if time.monotonic() > until:
            for child in running:
                child.kill()
        time.sleep(0.1)
    code = code or next((child.returncode for child in children if child.returncode), 0)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
