"""A recipe on two processes of four devices, and on one of eight, and on one of a single device."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from recipe_cases import CTX, kept
from tiny import write_llama

from jaxcompress import recipe

pytestmark = pytest.mark.slow

WORKER = pathlib.Path(__file__).parent / "recipe_worker.py"
STAGES = (
    {"method": "depth", "calibration_samples": 4},
    {"method": "distill", "steps": 2, "batch_size": 8, "log_every": 1},
    {"method": "magnitude", "pattern": "2:4"},
    {"method": "finetune", "steps": 1, "batch_size": 8},
    {"method": "rtn", "group_size": 32},
    {"method": "export"},
)


@pytest.fixture(scope="module")
def given(texts, tmp_path_factory):
    path = write_llama(tmp_path_factory.mktemp("model") / "llama", layers=2)
    data = {**texts, "ctx": CTX, "tokens": 256}
    mesh = {"data": 1, "fsdp": -1}
    return {"model": {"path": str(path)}, "data": data, "mesh": mesh, "stages": STAGES}


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory):
    """Here: one process with eight devices."""
    root = tmp_path_factory.mktemp("alone") / "out"
    return root, recipe.run(given, root)


def run_processes(count: int, devices: int, given: dict, root: pathlib.Path) -> str:
    """What the first process of several says."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    settings = {
        "config": given,
        "workdir": str(root),
        "devices": devices,
        "cache": str(root.with_name("cache")),
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            },
        )
        for index in range(count)
    ]
    told = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0] * count, told
    assert all("begin" not in out for out, _ in told[1:])
    return told[0][0]


def assert_alike(report, other):
    for mine, theirs in zip(report["stages"], other["stages"], strict=True):
        assert mine["name"] == theirs["name"]
        for role, quality in theirs["quality"].items():
            for name in ("perplexity", "kl", "agreement"):
                found = mine["quality"][role][name]
                assert found == pytest.approx(quality[name], rel=2e-4, abs=2e-4), mine["name"]
        assert mine["size"] == theirs["size"]
        for row, wanted in zip(mine["losses"], theirs["losses"], strict=True):
            assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_two_processes_of_four_devices(given, alone, tmp_path):
    root = tmp_path / "out"
    told = run_processes(2, 4, given, root)
    assert "06-export: begin" in told
    report = json.loads((root / "report.json").read_text())
    assert report["hardware"]["processes"] == 2
    assert report["hardware"]["devices"] == 8
    assert_alike(report, alone[1])
    for name in ("02-distill", "04-finetune"):
        theirs = kept(alone[0], name)
        for path, value in kept(root, name).items():
            np.testing.assert_allclose(value, theirs[path], atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_what_two_processes_began_one_goes_on_with(given, alone, tmp_path):
    """Behind the distillation, on a single device."""
    import shutil

    root = tmp_path / "out"
    run_processes(2, 4, given, root)
    for name in ("03-magnitude", "04-finetune", "05-rtn", "06-export"):
        shutil.rmtree(root / "stages" / name)
    told = run_processes(1, 1, given, root)
    assert "02-distill: done before" in told
    report = json.loads((root / "report.json").read_text())
    assert report["hardware"]["devices"] == 1
    assert_alike(report, alone[1])
