"""Programs compiled to machine code for TPUs: kernels chosen, no dense weight in memory."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot_tpu
HERE = pathlib.Path(__file__).parent


def compile_programs(*arguments):
    pytest.importorskip("libtpu")
    run = subprocess.run(
        [sys.executable, HERE / "aot_tpu_programs.py", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


LATER = [pytest.param(chip, marks=pytest.mark.slow) for chip in ("v5p:2x2x1", "v6e:1x1")]


@pytest.mark.parametrize("chip", ["v5e:1x1", *LATER])
def test_kernels_write_no_dense_weight(chip):
    reports = compile_programs("products", chip)
    of = {name: [r for r in reports if r["program"] == name] for name in
          ("product", "xla", "gradient", "experts")}  # fmt: skip
    assert len(of["product"]) == 2 * 20
    for r in of["product"]:
        assert r["kernels"] == 1, r
        # Placed, nothing but the padding of x; canonical, the reordered words: a quarter.
        assert r["temp"] < (r["dense"] // 16 if r["layout"] == "tpu" else r["dense"] // 3), r
        assert r["reorders_words"] == (r["layout"] == "canonical"), r
    for r in of["xla"]:
        assert r["kernels"] == 0
        assert r["temp"] < r["dense"] // 2, r  # v5p reorders the words of the canonical layout
    (gradient,) = of["gradient"]
    assert gradient["kernels"] == 2  # forward and with respect to x
    assert gradient["temp"] < gradient["dense"]
    (experts,) = of["experts"]
    assert experts["kernels"] == 1
    assert experts["temp"] < experts["dense"] // 16


def test_a_sharded_mlp_keeps_packed_weights_in_place():
    mlp, partitioned = compile_programs("sharded_mlp", "v5e:2x4")
    assert mlp["kernels"] == 2
    assert mlp["all_gathers"] == 0
    assert mlp["all_reduces"] == 1
    assert not mlp["reorders_words"]
    assert mlp["temp"] < mlp["dense"] // 8
    # Outside a shard_map, on several devices, the default is what XLA can partition.
    assert partitioned["kernels"] == 0
    assert partitioned["all_gathers"] == 0
