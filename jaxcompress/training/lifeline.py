"""When one process of a run dies, the others stop within seconds and say which one it was.

JAX notices a dead process too, but only after missed heartbeats, and then aborts the others from
C++: no Python runs any more, and the text names no host. So each process has a small child here,
which outlives it. The children hold TCP connections to the child of process 0, which decides who
died and tells the rest; each prints that one line and ends its own process.

This file is also the child's program: it needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import Any

KEY = "jaxcompress/lifeline"
# Seconds: between signs of life, until a silent machine counts as lost, in which a death outweighs
# the errors that it caused elsewhere, and that a process has to end by itself.
TICK, SILENCE, SETTLE, GRACE = 1.0, 15.0, 2.0, 5.0
LAST_BARRIER_MS = 7 * 24 * 3600 * 1000
STOP_BARRIER_MS = 15 * 1000


class Lifeline:
    """One process's tie to the others of its run.

    Args:
      index: of this process.
      count: of processes.
      host: of this process, as messages name it.
      coordinator: host at which process 0 can be reached.
      client: JAX's client of its coordination service, for the addresses and the last barrier.
      timeout: seconds to wait for process 0.
    """

    def __init__(
        self, index: int, count: int, host: str, coordinator: str, client: Any, timeout: int
    ) -> None:
        self._client = client
        about: dict[str, Any] = {"index": index, "count": count, "host": host}
        listener = None
        if index == 0:
            listener = _listen(coordinator)
            leader = {"port": listener.getsockname()[1], "host": host, "token": secrets.token_hex()}
            about |= {"listener": listener.fileno(), "leader": leader}
            client.key_value_set(KEY, json.dumps(leader))
        else:
            leader = json.loads(client.blocking_key_value_get(KEY, timeout * 1000))
            about |= {"address": coordinator, "leader": leader}
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()] if listener else [],
            start_new_session=True,
        )
        if listener:
            listener.close()
        # A forked data loader would otherwise hold the pipe open after this process's death.
        os.register_at_fork(after_in_child=self._pipe.close)
        self._tell([about])

    def finish(self) -> None:
        """Wait until every process has come here, then part in good order.

        JAX's own barrier at the end of a process aborts after five minutes, in which process 0
        may still be writing the result.
        """
        self._part("finished", LAST_BARRIER_MS)

    def stop(self) -> bool:
        """Part in good order with processes that stop too; whether all of them came here.

        One that was asked to stop alone must not wait: the others wait for it, in a collective.
        """
        try:
            self._part("stopped", STOP_BARRIER_MS)
        except Exception:  # JAX's, which is not imported here
            return False
        return True

    def _part(self, barrier: str, timeout_ms: int) -> None:
        self._client.wait_at_barrier(f"{KEY}/{barrier}", timeout_ms)
        self._tell(["finished"])
        self.leave()

    def fail(self, text: str) -> None:
        """Tell the others that this process is about to end, and why."""
        self._tell(["failed", text])

    def leave(self) -> None:
        """Having nothing more to write on stderr, wait until the child has said its line."""
        self._tell(["leaves"])
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(SILENCE)

    @property
    def _pipe(self) -> Any:
        return self._child.stdin

    def _tell(self, message: Any) -> None:
        with contextlib.suppress(OSError):
            self._pipe.write(_line(message))
            self._pipe.flush()


def _listen(coordinator: str) -> socket.socket:
    if coordinator in ("localhost", "127.0.0.1"):
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


class _Channel:
    """Lines of JSON over a pipe or a connection; `who` is known after its greeting."""

    def __init__(self, source: socket.socket | int) -> None:
        self.socket = source if isinstance(source, socket.socket) else None
        self.fd = source if isinstance(source, int) else source.fileno()
        self.heard = time.monotonic()
        self.who: tuple[int, str] | None = None
        self.parted = False
        self._rest = b""

    def receive(self) -> list[Any] | None:
        """Messages that have come; None at the end."""
        try:
            data = os.read(self.fd, 1 << 16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except BlockingIOError:
            return []
        except (OSError, ValueError):
            return None
        self.heard = time.monotonic()
        whole = all(isinstance(message, list) and message for message in messages)
        return messages if data and whole else None

    def send(self, *message: Any) -> None:
        if self.socket:
            with contextlib.suppress(OSError):
                self.socket.sendall(_line(message))


class _Watch:
    """The child: watches its parent and the other children until the run has ended.

    `until` is None while the run goes on; then it is the time by which this child ends at the
    latest, waiting for the other children (so that no message is lost) and for its parent.
    """

    def __init__(self, about: dict[str, Any], orders: _Channel) -> None:
        self.index, self.host, self.count = about["index"], about["host"], about["count"]
        self.leader = about["leader"]
        self.parent = os.getppid()
        self.parent_leaves = False
        self.reported = False
        self.verdict = ""
        self.until: float | None = None
        self.reports: list[tuple[float, bool, int, str, str]] = []
        self.links: list[_Channel] = []
        self.unheard = set(range(1, self.count)) if self.index == 0 else set()
        self.orders = orders
        self.selector = selectors.DefaultSelector()
        self.selector.register(orders.fd, selectors.EVENT_READ, orders)
        self.listener: socket.socket | None = None
        if self.index == 0:
            self.listener = socket.socket(fileno=about["listener"])
            self.selector.register(self.listener, selectors.EVENT_READ)
        else:
            self.connect(about["address"], self.leader["port"])

    def connect(self, address: str, port: int) -> None:
        try:
            link = _Channel(socket.create_connection((address, port), timeout=SILENCE))
        except OSError as error:
            _say(
                f"process {self.index} cannot reach {address}:{port} ({error}): "
                "should a process die, JAX alone says so"
            )
            return
        link.who = (0, self.leader["host"])
        link.send("hello", self.leader["token"], self.index, self.host)
        self.add(link)

    def add(self, link: _Channel) -> None:
        assert link.socket
        link.socket.settimeout(TICK)
        self.links.append(link)
        self.selector.register(link.fd, selectors.EVENT_READ, link)

    def drop(self, link: _Channel) -> None:
        assert link.socket
        self.links.remove(link)
        self.selector.unregister(link.fd)
        link.socket.close()

    def run(self) -> None:
        while self.until is None or (time.monotonic() < self.until and self.waits()):
            for key, _ in self.selector.select(TICK):
                if key.data is self.orders:
                    self.hear_parent()
                elif key.data in self.links:
                    self.hear(key.data)
                elif key.data is None and self.listener:
                    self.add(_Channel(self.listener.accept()[0]))
            if self.until is None:
                self.look()
        if self.verdict:
            _say(self.verdict)
            if self.parent_there():
                os.kill(self.parent, signal.SIGKILL)

    def waits(self) -> bool:
        greeting = not self.verdict and self.unheard
        parting = any(link.who and not link.parted for link in self.links)
        return bool(self.parent_there() or greeting or parting)

    def parent_there(self) -> bool:
        return not self.parent_leaves and os.getppid() == self.parent

    def look(self) -> None:
        """What no message tells: deaths behind an open pipe, lost machines, the time to decide."""
        if os.getppid() != self.parent:
            self.report(True, "died")
        for link in list(self.links):
            link.send("alive")
            if link.who and time.monotonic() - link.heard > SILENCE:
                self.lost(link, f"was not heard of for {SILENCE:.0f} s")
        if self.reports and time.monotonic() - self.reports[0][0] > SETTLE:
            self.decide()

    def hear_parent(self) -> None:
        messages = self.orders.receive()
        if messages is None:
            self.selector.unregister(self.orders.fd)
            self.parent_leaves = True
            self.report(True, "died")
        self.obey(messages or [])

    def obey(self, orders: list[Any]) -> None:
        for name, *rest in orders:
            if name == "finished":
                for link in self.links:
                    link.send("bye")
                self.end()
            elif name == "failed":
                self.report(False, f"failed: {rest[0]}")
            else:
                self.parent_leaves = True

    def hear(self, link: _Channel) -> None:
        messages = link.receive()
        if messages is None:
            self.lost(link, "died")
        for name, *rest in messages or []:
            if link.who is None:
                if name != "hello" or rest[:1] != [self.leader["token"]]:
                    self.drop(link)
                    return
                link.who = (rest[1], rest[2])
                self.unheard.discard(rest[1])
            elif name == "report":
                self.note(rest[0], rest[1], *link.who)
            elif name == "bye":
                link.parted = self.index == 0
            elif name == "verdict":
                self.drop(link)
                self.end(rest[0])
                return

    def lost(self, link: _Channel, text: str) -> None:
        self.drop(link)
        if link.who and not link.parted:
            self.note(True, text, *link.who)

    def report(self, died: bool, text: str) -> None:
        """Something happened to the parent: process 0's child decides, if it can be reached."""
        if self.reported:
            return
        self.reported = True
        if self.index == 0 or not self.links:
            self.note(died, text, self.index, self.host)
        else:
            self.links[0].send("report", died, text)

    def note(self, died: bool, text: str, index: int, host: str) -> None:
        self.reports.append((time.monotonic(), died, index, host, text))

    def decide(self) -> None:
        deaths = [report for report in self.reports if report[1]]
        _, died, index, host, text = (deaths or self.reports)[0]
        # One that died before it could greet is found by JAX, whose victims report first.
        unheard = f"never heard of process {', '.join(map(str, sorted(self.unheard)))}; "
        advice = "; the same command, started again, goes on from what was saved"
        line = (
            f"{unheard if self.unheard else ''}process {index} of {self.count} (host {host}) "
            f"{text}. All processes stop{advice if died else ''}"
        )
        for link in self.links:
            link.send("verdict", line)
        self.end(line)

    def end(self, line: str = "") -> None:
        """The run has ended: well, or with a line that says how, to be the last on stderr."""
        if self.until is None:
            self.until = time.monotonic() + (GRACE if line else SILENCE)
            self.verdict = line


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"jaxcompress: {text}\n".encode())


def _main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    orders = _Channel(sys.stdin.fileno())
    messages: list[Any] | None = []
    while messages == []:
        messages = orders.receive()
    if messages:
        watch = _Watch(messages[0][0], orders)
        watch.obey(messages[1:])
        watch.run()


if __name__ == "__main__":
    _main()
