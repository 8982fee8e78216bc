"""One training as one process or two, on one device or eight: the same, and exchangeable."""

import json

import jax
import numpy as np
import pytest
from processes import several
from test_fit_meshes import check_same, trained_on
from training_cases import perceptron, train

from jaxcompress.training.mesh import make_mesh
from jaxcompress.training.metrics import read_metrics


def finish(workers):
    for worker in workers:
        code, err = worker.finish()
        assert code == 0, err
    return workers


def test_processes_that_share_one_model_see_every_row(tmp_path):
    """On a mesh of 1 x 1 x 8 over two processes both need all rows, and each reads half."""
    options = {"steps": 4, "log_every": 1, "checkpoint_every": 100}
    settings = {"workdir": tmp_path / "two", "mesh": (1, 1, 8), "options": options}
    finish(several(2, settings, devices=4))
    train(perceptron(), tmp_path / "one", mesh=make_mesh(1, 1, 8), **options)
    found, expected = (
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("two", "one")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(list((tmp_path / "two").glob("events.*"))) == 1  # of the first process


def one_device():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)], ids=str)
def test_two_processes_train_a_compressed_decoder_as_one_does(tmp_path, sizes):
    """2 x 4 devices against 1 x 8 and 1 x 1; then each ends what another began."""
    expected = trained_on(one_device(), tmp_path / "whole")
    check_same(trained_on(make_mesh(*sizes), tmp_path / "eight"), expected)

    def in_two(workdir, **options):
        settings = {
            "workdir": workdir, "mesh": sizes, "decoder": True, "options": options,
            "out": workdir.with_suffix(".npz"),
        }  # fmt: skip
        first, _ = finish(several(2, settings, devices=4))
        with np.load(settings["out"]) as file:
            return json.loads(first.said("losses")[0]), [file[name] for name in file.files]

    check_same(in_two(tmp_path / "two"), expected)
    trained_on(one_device(), tmp_path / "a", steps=2)  # 1 device begins
    check_same(in_two(tmp_path / "a"), expected)
    in_two(tmp_path / "b", steps=1)  # 2 x 4 begin
    trained_on(make_mesh(*sizes), tmp_path / "b", steps=2)  # 1 x 8 go on
    check_same(trained_on(one_device(), tmp_path / "b"), expected)
