"""`kill -9` at random moments: the harness of benchmarks/, on a tiny recipe."""

import os
import pathlib
import subprocess
import sys

import pytest
from recipe_cases import CTX
from tiny import write_llama

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"
CONFIG = """
from ml_collections import config_dict

def get_config():
    config = config_dict.ConfigDict()
    config.model = {{"path": {path!r}}}
    config.data = {{"train": {train!r}, "heldout": {heldout!r}, "ctx": {ctx}, "tokens": 256}}
    config.stages = (
        {{"method": "depth", "calibration_samples": 4}},
        {{"method": "distill", "steps": 99, "batch_size": 8, "checkpoint_every": 5}},
        {{"method": "magnitude", "pattern": "2:4"}},
        {{"method": "finetune", "steps": 20, "batch_size": 8, "checkpoint_every": 5}},
        {{"method": "rtn", "group_size": 32}},
        {{"method": "export"}},
    )
    return config
"""


@pytest.mark.slow
def test_killed_runs_end_as_the_unbroken_one(texts, tmp_path):
    path = write_llama(tmp_path / "llama", layers=2)
    config = tmp_path / "small.py"
    config.write_text(CONFIG.format(path=str(path), ctx=CTX, **texts))
    out = tmp_path / "out"
    done = subprocess.run(
        [
            sys.executable, str(SCRIPT), "--config", str(config), "--workdir", str(out),
            "--kills", "5", "--", "--config.stages[1].steps=20",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    logs = "".join(log.read_text()[-2000:] for log in sorted(out.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    _, _, *rows = (out / "kills.md").read_text().splitlines()
    assert len(rows) >= 5
    assert all(row.endswith("| yes |") for row in rows)


def test_it_takes_no_directory_that_holds_something(tmp_path):
    (tmp_path / "mine").touch()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--config", "x.py", "--workdir", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "is not empty" in done.stderr
