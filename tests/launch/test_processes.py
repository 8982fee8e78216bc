"""launch/processes.py with real JAX processes over loopback."""

import re
import signal
import subprocess
import sys

import pytest
from launching import LAUNCH, shim


def started(environment, *arguments):
    return subprocess.Popen(
        [sys.executable, str(LAUNCH / "processes.py"), "2", "--cpu-devices", "4", "--", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_preempted_by_sigterm_then_finished(tmp_path):
    """Both stop at the same turn, and the same command goes on there."""
    environment, kept = shim(tmp_path), str(tmp_path / "kept")
    first = started(environment, "400", "none", kept)
    while "turn 5 " not in (line := first.stdout.readline()):
        assert line, "ended too early"
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate()
    assert first.returncode == 75
    stopped = re.findall(r"\[(\d)\] preempted before turn (\d+)", said)
    assert sorted(index for index, _ in stopped) == ["0", "1"]
    (turn,) = {turn for _, turn in stopped}

    last = str(int(turn) + 3)
    said, _ = (second := started(environment, last, "none", kept)).communicate()
    assert second.returncode == 0, said
    # 4 devices that hold a 1 and 4 that hold a 2.
    turns = re.findall(r"\[(\d)\] turn (\d+) devices 8 sum 12", said)
    numbers = [str(number) for number in range(int(turn), int(last))]
    for index in ("0", "1"):
        assert [number for who, number in turns if who == index] == numbers
    assert said.count("finished") == 2


@pytest.mark.parametrize(
    ("fate", "code", "lines"),
    [
        (
            "exit:1",
            9,
            [r"process 1 of 2 \(host .*\) died", "processes.py: process 1 ended with exit code 9"],
        ),
        pytest.param(
            "raise:0",
            1,
            [r"process 0 of 2 \(host .*\) failed: OSError: no space left on the device"],
            marks=pytest.mark.slow,
        ),
        pytest.param("bad:1", 2, [r"InputError: the data"], marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_is_named(tmp_path, fate, code, lines):
    run = started(shim(tmp_path), "3000", fate)
    said, _ = run.communicate()
    for line in lines:
        assert re.search(line, said), said
    assert run.returncode == code
    assert said.count("All processes stop") == 2


@pytest.mark.slow
def test_a_process_that_never_joins(tmp_path):
    """It ends before JAX could know of it; the launcher does."""
    program = 'if [ "$JAX_PROCESS_ID" = 1 ]; then echo "no such option" >&2; exit 2; fi; sleep 600'
    run = started(shim(tmp_path, program), "x")
    said, _ = run.communicate()
    assert run.returncode == 2
    assert said == "[1] no such option\nprocesses.py: process 1 ended with exit code 2\n"
