"""Slurm and Open MPI for real, on this machine alone, where they are installed."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import pytest
from launching import HERE, LAUNCH, shim

pytestmark = pytest.mark.slow

FLAGS = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


def missing(*commands):
    absent = [command for command in commands if shutil.which(command) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


def wait_for(text, log, after=0):
    """What the log holds once `text` is in it, from `after` on."""
    for _ in range(3000):
        if log.exists() and text in (said := log.read_text()[after:]):
            return said
        time.sleep(0.1)
    raise AssertionError(f"{text!r} did not appear:\n{log.read_text() if log.exists() else ''}")


def kill(index, said):
    os.kill(int(re.search(rf"process_index={index},.* pid=(\d+)", said)[1]), signal.SIGKILL)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    cluster = str(HERE / "slurm_cluster.sh")
    started = subprocess.run(
        [cluster, "start", str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    name, _, value = started.stdout.strip().partition("=")
    yield {name: value}
    subprocess.run([cluster, "stop", str(folder)], check=True)


@missing("munged", "slurmctld", "slurmd", "sbatch")
def test_slurm(slurm, tmp_path):
    """Two nodes of 4 devices: a task is killed, the job is queued again and goes on."""
    environment = shim(tmp_path) | slurm | FLAGS
    log, kept = tmp_path / "log", tmp_path / "kept"

    def command(*words):
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True)

    batch = ["sbatch", "--parsable", "--nodes=2", f"--output={log}", str(LAUNCH / "slurm.sbatch")]
    job = command(*batch, "60", "none", str(kept)).stdout.strip()
    kill(1, wait_for("turn 5 devices 8 sum 12", log))
    said = wait_for("slurm.sbatch: a process failed (137); restart 1 of 3", log)
    assert re.search(r"jaxcompress: process 1 of 2 \(host .*\) died", said)
    assert "srun: error: 127.0.0.2: task 1: Killed" in said

    # Slurm holds a requeued job back for two minutes.
    done = int(kept.read_text())
    resumed = wait_for("slurm.sbatch: the run is complete", log, after=len(said))
    assert f"turn {done} devices 8 sum 12" in resumed
    assert f"turn {done - 1} " not in resumed
    assert "turn 59 devices 8 sum 12" in resumed
    command("scancel", job)


@missing("munged", "slurmctld", "slurmd", "sbatch")
def test_slurm_before_the_time_limit(slurm, tmp_path):
    environment = shim(tmp_path) | slurm | FLAGS
    log = tmp_path / "log"
    job = subprocess.run(
        ["sbatch", "--parsable", "--nodes=2", "--time=2", "--signal=TERM@60", f"--output={log}"]
        + [str(LAUNCH / "slurm.sbatch"), "30000", "none"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()
    said = wait_for("slurm.sbatch: preempted at a checkpoint", log)
    assert len(set(re.findall(r"preempted before turn (\d+)", said))) == 1
    shown = subprocess.run(
        ["scontrol", "show", "job", job], env=environment, stdout=subprocess.PIPE, text=True
    ).stdout
    assert "Restarts=1" in shown
    subprocess.run(["scancel", job], env=environment, check=True)


@missing("mpirun")
@pytest.mark.parametrize("victim", [0, 1])
def test_open_mpi(tmp_path, victim):
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = shim(tmp_path) | FLAGS | as_root
    log = pathlib.Path(tmp_path / "log")
    with log.open("w") as output:
        run = subprocess.Popen(
            [str(LAUNCH / "mpi.sh"), "-np", "2", "--oversubscribe", "--", "30000", "none"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        kill(victim, wait_for("turn 5 devices 8 sum 12", log))
        assert run.wait() == 128 + signal.SIGKILL
    said = log.read_text()
    assert len(re.findall(rf"jaxcompress: process {victim} of 2 \(host .*\) died", said)) == 2
    assert f"mpirun noticed that process rank {victim}" in said
