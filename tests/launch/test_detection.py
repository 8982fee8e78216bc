"""What a process learns from the environment that its launcher made."""

import socket

import pytest

from jaxcompress.core.errors import InputError
from jaxcompress.training import distributed
from jaxcompress.training.preemption import Preempted

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}


def test_nothing_to_join():
    assert distributed.detect({}) == ("single", {})
    assert distributed.detect(EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) == (
        "single",
        {},
    )
    assert distributed.detect(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})[0] == "single"
    # In the batch script itself, where Slurm numbers no tasks.
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert distributed.detect(batch) == ("single", {})
    # A pod of an Indexed Job whose pods have nothing to do with each other.
    assert distributed.detect({"JOB_COMPLETION_INDEX": "2"}) == ("single", {})


def test_environment():
    found, arguments = distributed.detect(EXPLICIT | SLURM)
    assert found == "environment"
    assert arguments == {
        "coordinator_address": "10.0.0.1:1234",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }


def test_kubernetes():
    pod = {name: value for name, value in EXPLICIT.items() if name != "JAX_PROCESS_ID"}
    found, arguments = distributed.detect(pod | {"JOB_COMPLETION_INDEX": "2"})
    assert found == "kubernetes"
    assert arguments["process_id"] == 2


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_NUM_NODES": "4"}, [0, 1, 2, 3]),
        (
            {
                "CUDA_VISIBLE_DEVICES": "0,1",
                "SLURM_STEP_NUM_NODES": "4",
                "JAX_LOCAL_DEVICE_IDS": "1",
            },
            None,
        ),
    ],
)
def test_slurm_task_alone_on_its_node_takes_all_devices(environment, devices):
    found, arguments = distributed.detect(SLURM | environment)
    assert found == "slurm"
    assert arguments["cluster_detection_method"] == "slurm"
    assert arguments.get("local_device_ids") == devices


def test_open_mpi():
    assert distributed.detect(OMPI | SLURM) == ("ompi", {"cluster_detection_method": "ompi"})
    alone = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert distributed.detect(OMPI | alone)[1]["local_device_ids"] == [0, 1]


def test_open_mpi_5_needs_an_address():
    five = {name: value for name, value in OMPI.items() if "orte" not in name}
    address = {"JAX_COORDINATOR_ADDRESS": "node1:1234"}
    found, arguments = distributed.detect(five | address)
    assert found == "ompi"
    assert arguments == {
        "num_processes": 4,
        "process_id": 1,
        "cluster_detection_method": "deactivate",
        "local_device_ids": [1],
    }
    with pytest.raises(InputError, match="JAX_COORDINATOR_ADDRESS=HOST:PORT"):
        distributed.detect(five)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 with JAX_NUM_PROCESSES=4"),
        (EXPLICIT | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1': must be a whole number"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": ""}, "JAX_NUM_PROCESSES='': must be a whole number"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "node1"}, "must be HOST:PORT"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES must be set"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "no launcher was found"),
        (SLURM | {"SLURM_PROCID": "9"}, "SLURM_PROCID=9 with SLURM_NTASKS=4"),
        (OMPI | {"OMPI_COMM_WORLD_RANK": "x"}, "OMPI_COMM_WORLD_RANK='x'"),
    ],
)
def test_contradictions(environment, message):
    with pytest.raises(InputError, match=message):
        distributed.detect(environment)


def test_a_taken_port_is_refused_by_process_0_alone():
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        taken = EXPLICIT | {"JAX_COORDINATOR_ADDRESS": address}
        with pytest.raises(InputError, match="cannot be had on this machine"):
            distributed.detect(taken | {"JAX_PROCESS_ID": "0"})
        assert distributed.detect(taken)[0] == "environment"


class _Lifeline:
    def __init__(self, together):
        self.told, self.together = None, together

    def finish(self):
        self.told = "finished"

    def stop(self):
        self.told = "stopped"
        return self.together

    def fail(self, text):
        self.told = text


@pytest.mark.parametrize(
    ("error", "together", "told", "code"),
    [
        (None, True, "finished", None),
        (Preempted("at step 3"), True, "stopped", None),
        (Preempted("at step 3"), False, "Preempted: at step 3", 75),
        (SystemExit(0), True, "finished", None),
        (OSError("no\nspace"), True, "OSError: no space", 1),
        (InputError("no data"), True, "InputError: no data", 2),
        (SystemExit(3), True, "SystemExit: 3", 3),
        (KeyboardInterrupt(), True, "KeyboardInterrupt: ", 130),
    ],
)
def test_only_the_end_of_the_block_is_a_good_end(error, together, told, code, monkeypatch):
    at_exit = []
    monkeypatch.setattr(distributed.atexit, "register", lambda *call: at_exit.append(call))
    lifeline = _Lifeline(together)
    processes = distributed.Processes(1, 2, "b", "environment", lifeline)
    if error is None:
        with processes:
            pass
    else:
        with pytest.raises(type(error)), processes:
            raise error
    assert lifeline.told == told
    assert [call[-1] for call in at_exit] == ([] if code is None else [code])
