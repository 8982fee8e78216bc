"""The launchers' own part: what they refuse, and the command they end in."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from launching import HERE, LAUNCH, ROOT, script, shim

SHELL = [LAUNCH / name for name in ("local.sh", "mpi.sh", "slurm.sbatch", "tpu_vm.sh")]
ARGUMENTS = ["--config", "a b.py", '--config.name=it\'s "x" $HOME', "--workdir", "out"]
SHOWS = 'printf "%s\\n" "$JAX_PLATFORMS|$XLA_FLAGS|$JAX_PROCESS_ID" "$@"'


def run(command, environment):
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    scripts = [*SHELL, LAUNCH / "gpu_check.sh", HERE / "slurm_cluster.sh"]
    done = run(["shellcheck", *scripts], os.environ)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [*SHELL, LAUNCH / "processes.py"], ids=lambda path: path.name)
def test_help_and_use(path):
    assert os.access(path, os.X_OK)
    told = run([path, "--help"], os.environ)
    assert told.returncode == 0
    assert "usage:" in told.stdout
    assert "jaxcompress run RUN_OPTIONS..." in told.stdout
    assert run([path], os.environ).returncode != 0


def test_local(tmp_path):
    environment = shim(tmp_path, SHOWS) | {"XLA_FLAGS": "--xla_a=1"}
    done = run([LAUNCH / "local.sh", "--cpu-devices", 8, *ARGUMENTS], environment)
    flags = "cpu|--xla_a=1 --xla_force_host_platform_device_count=8|"
    assert done.stdout.splitlines() == [flags, *ARGUMENTS]
    assert run([LAUNCH / "local.sh", *ARGUMENTS], environment).stdout.startswith("cpu|--xla_a=1|\n")
    refused = run([LAUNCH / "local.sh", "--cpu-devices", "many", "x"], environment)
    assert (refused.returncode, refused.stderr) == (2, "local.sh: --cpu-devices needs a number\n")


def test_mpi(tmp_path):
    environment = shim(tmp_path) | {"XLA_FLAGS": "--a"}
    script(tmp_path / "mpirun", 'printf "%s\\n" "$@"')
    done = run([LAUNCH / "mpi.sh", "-np", 2, "--", *ARGUMENTS], environment)
    given = done.stdout.splitlines()
    at = given.index("-np")
    assert given[at : at + 2] == ["-np", "2"]
    assert given[-len(ARGUMENTS) - 2 :] == ["jaxcompress", "run", *ARGUMENTS]
    assert "--bind-to none" in " ".join(given)
    assert "-x JAX_PLATFORMS -x XLA_FLAGS" in " ".join(given)
    without = run([LAUNCH / "mpi.sh", *ARGUMENTS], environment).stdout.splitlines()
    assert without[-len(ARGUMENTS) - 2 :] == ["jaxcompress", "run", *ARGUMENTS]


def test_tpu_vm_keeps_every_argument(tmp_path):
    """A stand-in for gcloud runs the command on two "workers", as ssh would: through a shell."""
    environment = shim(tmp_path, 'printf "%s\\n" "$PREPARED" "$@"')
    script(
        tmp_path / "gcloud",
        'echo "${*:1:7}"\nfor worker in 0 1; do bash -c "${8#--command=}"; done',
    )
    command = [LAUNCH / "tpu_vm.sh", "pod", "us-east5-a", "--setup", "export PREPARED=yes"]
    done = run([*command, *ARGUMENTS], environment)
    assert done.stdout.splitlines() == [
        "compute tpus tpu-vm ssh pod --zone=us-east5-a --worker=all",
        *["yes", *ARGUMENTS] * 2,
    ]


def test_tpu_vm_without_anything_to_run(tmp_path):
    """A setup is nothing to run."""
    environment = shim(tmp_path)
    script(tmp_path / "gcloud", "echo ran")
    for rest in (["--setup"], ["--setup", "true"]):
        done = run([LAUNCH / "tpu_vm.sh", "pod", "us-east5-a", *rest], environment)
        assert done.returncode != 0
        assert not done.stdout


def test_processes_set_the_scene(tmp_path):
    shown = SHOWS.replace("$JAX_PROCESS_ID", "$JAX_PROCESS_ID|$JAX_NUM_PROCESSES")
    environment = shim(tmp_path, shown)
    done = run(
        [sys.executable, LAUNCH / "processes.py", 2, "--cpu-devices", 4, "--", *ARGUMENTS],
        environment,
    )
    assert done.returncode == 0
    for index in range(2):
        lines = [line[4:] for line in done.stdout.splitlines() if line.startswith(f"[{index}] ")]
        flags = f"cpu|--xla_force_host_platform_device_count=4|{index}|2"
        assert lines == [flags, *ARGUMENTS]


def test_slurm_restarts_what_can_go_on(tmp_path):
    """The batch script, with stand-ins for Slurm's commands."""
    environment = shim(tmp_path) | {"SLURM_JOB_ID": "7"}
    calls = pathlib.Path(tmp_path / "calls")
    script(tmp_path / "scontrol", f'echo "$@" >> "{calls}"')
    script(tmp_path / "srun", 'exit "${@: -1}"')

    def requeued(code, restarts):
        calls.unlink(missing_ok=True)
        batch = environment | {"SLURM_RESTART_COUNT": str(restarts)}
        assert run([LAUNCH / "slurm.sbatch", "--config", code], batch).returncode == code
        return calls.exists() and calls.read_text() == "requeue 7\n"

    assert not requeued(0, 0)
    assert not requeued(2, 0)
    assert requeued(75, 9)
    assert requeued(137, 2)
    assert not requeued(137, 3)


def test_no_launcher_names_a_path_of_one_machine():
    for path in LAUNCH.iterdir():
        assert str(ROOT) not in path.read_text()
