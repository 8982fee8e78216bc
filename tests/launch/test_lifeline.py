"""One process dies: the others end and all say which it was. No JAX here."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from launching import HERE

LINE = "jaxcompress: process {} of 3 (host host{}) {}. All processes stop"


class Run:
    def __init__(self, folder):
        self.folder = folder
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / "tied.py"), str(index), "3", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(3)
        ]
        for process in self.processes:
            assert process.stdout.readline() == "tied\n"

    def order(self, index, word):
        self.processes[index].stdin.write(f"{word}\n")
        self.processes[index].stdin.flush()

    def end(self):
        """Exit codes and what was said, of all processes, their children included."""
        said = [process.stderr.read() for process in self.processes]
        return [process.wait() for process in self.processes], said


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


def test_a_good_end_is_silent(run):
    for index in (1, 0, 2):
        run.order(index, "finish")
    assert run.end() == ([0, 0, 0], ["", "", ""])


def test_those_that_stop_together_are_silent(run):
    for index in (1, 0, 2):
        run.order(index, "stop")
    assert run.end() == ([75, 75, 75], ["", "", ""])


@pytest.mark.slow
def test_one_that_stops_alone_takes_the_others_with_it(run):
    """They would wait for it for ever, and it for them."""
    run.order(1, "stop")
    codes, said = run.end()
    assert codes == [-signal.SIGKILL, 75, -signal.SIGKILL]
    assert all(text.startswith(LINE.format(1, 1, "failed: told to stop")) for text in said)


@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_process_is_named_by_all(run, victim):
    run.processes[victim].kill()
    codes, said = run.end()
    assert codes == [-signal.SIGKILL] * 3
    for text in said:
        assert text.startswith(LINE.format(victim, victim, "died"))
        assert text.count("\n") == 1


@pytest.mark.slow
def test_one_that_gives_up_says_why_and_keeps_its_exit_code(run):
    run.order(1, "fail")
    codes, said = run.end()
    assert codes == [-signal.SIGKILL, 1, -signal.SIGKILL]
    why = LINE.format(1, 1, "failed: OSError: disk full")
    assert said[0].startswith(why)
    assert said[2].startswith(why)
    assert said[1].startswith("the traceback\n" + why)


@pytest.mark.slow
def test_a_death_outweighs_the_errors_that_it_causes(run):
    run.order(0, "fail")
    run.processes[2].kill()
    _, said = run.end()
    for text in said:
        assert LINE.format(2, 2, "died") in text


@pytest.mark.slow
def test_waiting_at_the_end_does_not_hide_a_death(run):
    run.order(0, "finish")
    run.order(1, "finish")
    run.processes[2].kill()
    codes, said = run.end()
    assert codes == [-signal.SIGKILL] * 3
    assert all(text.startswith(LINE.format(2, 2, "died")) for text in said)


def test_strangers_at_the_port_do_no_harm(run):
    port = json.loads((run.folder / "jaxcompress.lifeline").read_text())["port"]
    for message in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b'["hello", "guess", 1, "x"]\n',
        b"[]\n",
        b"7\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(message)
    for index in range(3):
        run.order(index, "finish")
    assert run.end() == ([0, 0, 0], ["", "", ""])


@pytest.mark.slow
def test_a_forked_child_does_not_hide_a_death(tmp_path):
    program = (
        "import os, sys, time; sys.argv = ['', '0', '1', sys.argv[1]]\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "import tied\n"
        "client = tied.Client(tied.pathlib.Path(sys.argv[3]), 1)\n"
        "tied.Lifeline(0, 1, 'a', '127.0.0.1', client, 60)\n"
        "if os.fork() == 0:\n"
        "    os.close(2)\n"
        "    time.sleep(60)\n"
        "os._exit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 3
    assert "process 0 of 1 (host a) died" in done.stderr


@pytest.mark.slow
def test_a_machine_that_falls_silent_is_lost(run):
    """The child of process 1 stops and with it all signs of life; its connection stays."""
    children = subprocess.run(
        ["pgrep", "-P", str(run.processes[1].pid)], capture_output=True, text=True, check=True
    )
    child = int(children.stdout)
    files = pathlib.Path(f"/proc/{child}/fd")
    while not any(os.readlink(file).startswith("socket:") for file in files.iterdir()):
        time.sleep(0.1)
    time.sleep(1.0)
    os.kill(child, signal.SIGSTOP)
    try:
        codes = [run.processes[index].wait(60) for index in (0, 2)]
    finally:
        os.kill(child, signal.SIGKILL)
    assert codes == [-signal.SIGKILL] * 2
    for index in (0, 2):
        assert LINE.format(1, 1, "was not heard of for 15 s") in run.processes[index].stderr.read()
