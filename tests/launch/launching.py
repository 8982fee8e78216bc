"""A `jaxcompress` command for the launchers to find, whose `run` is the program loop.py."""

from __future__ import annotations

import os
import pathlib
import stat
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
LAUNCH = ROOT / "launch"


def shim(folder: pathlib.Path, program: str | None = None) -> dict[str, str]:
    """Environment in which `jaxcompress run ARGUMENTS` is the shell program, or loop.py."""
    program = program or f'exec "{sys.executable}" "{HERE / "loop.py"}" "$@"'
    script(folder / "jaxcompress", f"shift\n{program}")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "PYTHONUNBUFFERED")
        and not name.startswith(("JAX_", "SLURM_", "OMPI_"))
    }
    return kept | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }


def script(path: pathlib.Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
