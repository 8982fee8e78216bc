"""One program as many processes: who they are, found in the environment that a launcher made.

A thin layer around `jax.distributed.initialize`, whose own detection does most of the work. What
it adds: refusals that say what to do, and a `lifeline` that names the process that died.
"""

from __future__ import annotations

import atexit
import glob
import importlib.util
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from jaxcompress.core.errors import InputError
from jaxcompress.training.lifeline import Lifeline
from jaxcompress.training.preemption import Preempted

# Seconds. The lifeline is faster; JAX's heartbeats find what it cannot, such as a frozen process.
HEARTBEAT = 30
CONNECT = 300

# As `EX_TEMPFAIL` of sysexits.h. The launchers in launch/ start a run that ends so again.
EXIT_PREEMPTED = 75


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    As a context it watches the others: when one ends in any other way than out of its `with`
    block, all of them end with an exit code other than 0 and one line on stderr that names it.
    The end of the block waits for every process. `Preempted` is such an end where it ends the
    blocks of all; of one that stops alone the others are told like of any that fails.

    Attributes:
      process_index: of this process.
      process_count: of all.
      host: name of this machine.
      detected: by what: "environment", "kubernetes", "slurm", "ompi", "tpu", "caller" where
        `jax.distributed` had been initialized before, or "single".
    """

    process_index: int
    process_count: int
    host: str
    detected: str
    _lifeline: Lifeline | None = field(default=None, repr=False, compare=False)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lifeline is None:
            return
        code = _exit_code(error)
        if code == 0:
            self._lifeline.finish()
        elif not (isinstance(error, Preempted) and self._lifeline.stop()):
            self._lifeline.fail(_summary(error))
            # At exit the traceback is on stderr; JAX's own hook, which comes after this one,
            # would wait for processes that wait for this one.
            atexit.register(_leave, self._lifeline, code)


def initialize() -> Processes:
    """Join the other processes of this run, if it has any; before anything touches a device.

    Looked for, in this order:

    1. `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and
       `JAX_PROCESS_ID`; in a Kubernetes Indexed Job `JOB_COMPLETION_INDEX` for the last.
    2. Open MPI (`mpirun`), then Slurm (`srun`), of more than one task.
    3. A Cloud TPU slice, by JAX's own detection.

    Otherwise this is a single process and nothing happens. Several processes on one machine with
    accelerators take one device each, as JAX has it, unless `JAX_LOCAL_DEVICE_IDS` says
    otherwise; a process that is alone on its machine takes all of them.

    Returns:
      Which process this is, to be used as a context around all the work.

    Raises:
      InputError: the environment contradicts itself, or the coordinator's port is taken.
    """
    import jax

    host = socket.gethostname()
    if jax.distributed.is_initialized():
        return _joined("caller", host)
    detected, arguments = detect(os.environ)
    if detected == "single":
        return Processes(0, 1, host, detected)
    # JAX's answer to SIGTERM would be to note it and go on; a training has an answer of its own,
    # and elsewhere a process asked to end had better end.
    jax.config.update("jax_enable_preemption_service", False)
    print(
        f"jaxcompress: {host} waits up to {CONNECT} s for every process ({detected})",
        file=sys.stderr,
        flush=True,
    )
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=CONNECT, heartbeat_timeout_seconds=HEARTBEAT
        )
    except ValueError:
        if detected != "tpu":
            raise
        return Processes(0, 1, host, "single")
    return _joined(detected, host)


def _joined(detected: str, host: str) -> Processes:
    from jax._src.distributed import global_state

    index, count = global_state.process_id, global_state.num_processes
    lifeline = None
    if count > 1:
        coordinator = str(global_state.coordinator_address).rpartition(":")[0].strip("[]")
        lifeline = Lifeline(index, count, host, coordinator, global_state.client, CONNECT)
    return Processes(index, count, host, detected, lifeline)


def detect(env: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """What launched this process, and the arguments of `jax.distributed.initialize` for it.

    Args:
      env: environment variables.

    Returns:
      Name as in `Processes.detected`; "single" where there is nothing to join.

    Raises:
      InputError: as `initialize`.
    """
    for found in (_environment(env), _open_mpi(env), _slurm(env)):
        if found is not None:
            return found
    if "JAX_COORDINATOR_ADDRESS" in env:
        raise InputError(
            "JAX_COORDINATOR_ADDRESS is set, but no launcher was found that numbers the "
            "processes: set JAX_NUM_PROCESSES and JAX_PROCESS_ID too, or unset it"
        )
    return ("tpu", {}) if _on_tpu(env) else ("single", {})


def _environment(env: Mapping[str, str]) -> tuple[str, dict[str, Any]] | None:
    if "JAX_NUM_PROCESSES" not in env and "JAX_PROCESS_ID" not in env:
        return None
    kubernetes = "JAX_PROCESS_ID" not in env and "JOB_COMPLETION_INDEX" in env
    identity = "JOB_COMPLETION_INDEX" if kubernetes else "JAX_PROCESS_ID"
    names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", identity]
    if missing := [name for name in names if name not in env]:
        raise InputError(f"{' and '.join(missing)} must be set where any of {names} is set")
    index, count = _numbers(env, identity, "JAX_NUM_PROCESSES")
    if count == 1:
        return "single", {}
    address = env["JAX_COORDINATOR_ADDRESS"]
    _check_address(address, index)
    arguments = {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }
    return "kubernetes" if kubernetes else "environment", arguments


def _open_mpi(env: Mapping[str, str]) -> tuple[str, dict[str, Any]] | None:
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    index, count = _numbers(env, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    if count == 1:
        return "single", {}
    devices = _all_devices(env) if env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" else {}
    if "JAX_COORDINATOR_ADDRESS" in env:
        _check_address(env["JAX_COORDINATOR_ADDRESS"], index)
        if not devices and "JAX_LOCAL_DEVICE_IDS" not in env:
            devices = {"local_device_ids": [int(env["OMPI_COMM_WORLD_LOCAL_RANK"])]}
        explicit = {"num_processes": count, "process_id": index}
        return "ompi", {**explicit, "cluster_detection_method": "deactivate", **devices}
    if "OMPI_MCA_orte_hnp_uri" not in env and importlib.util.find_spec("mpi4py") is None:
        raise InputError(
            "Open MPI 5 tells its processes no address: set JAX_COORDINATOR_ADDRESS=HOST:PORT of "
            "the first of them (mpirun -x JAX_COORDINATOR_ADDRESS ...), or install mpi4py"
        )
    method = "ompi" if "OMPI_MCA_orte_hnp_uri" in env else "mpi4py"
    return "ompi", {"cluster_detection_method": method, **devices}


def _slurm(env: Mapping[str, str]) -> tuple[str, dict[str, Any]] | None:
    needed = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"}
    if not needed <= env.keys():
        return None
    _, count = _numbers(env, "SLURM_PROCID", "SLURM_NTASKS")
    if count == 1:
        return "single", {}
    alone = env.get("SLURM_STEP_NUM_NODES") == env["SLURM_NTASKS"]
    return "slurm", {"cluster_detection_method": "slurm", **(_all_devices(env) if alone else {})}


def _all_devices(env: Mapping[str, str]) -> dict[str, Any]:
    """Under Slurm and Open MPI JAX takes one device a process, also where there is one process."""
    visible = env.get("CUDA_VISIBLE_DEVICES") or env.get("ROCR_VISIBLE_DEVICES")
    if not visible or "JAX_LOCAL_DEVICE_IDS" in env:
        return {}
    return {"local_device_ids": list(range(len(visible.split(","))))}


def _numbers(env: Mapping[str, str], index_name: str, count_name: str) -> tuple[int, int]:
    values = []
    for name in (index_name, count_name):
        text = env.get(name, "")
        if not text.isdecimal():
            raise InputError(f"{name}={text!r}: must be a whole number")
        values.append(int(text))
    index, count = values
    if index >= count:
        raise InputError(
            f"{index_name}={index} with {count_name}={count}: processes are numbered from 0 to "
            "their number less one"
        )
    return index, count


def _check_address(address: str, index: int) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(
            f"JAX_COORDINATOR_ADDRESS={address!r}: must be HOST:PORT, reachable from every process"
        )
    if index == 0:
        try:
            socket.create_server(("", int(port))).close()
        except (OSError, OverflowError) as error:
            raise InputError(
                f"JAX_COORDINATOR_ADDRESS={address}: port {port} cannot be had on this machine "
                f"({error}); choose another"
            ) from None


def _on_tpu(env: Mapping[str, str]) -> bool:
    if "tpu" not in env.get("JAX_PLATFORMS", "tpu"):
        return False
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, Preempted):
        return EXIT_PREEMPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, InputError) else 1


def _summary(error: BaseException | None) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _leave(lifeline: Lifeline, code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    lifeline.leave()
    os._exit(code)
