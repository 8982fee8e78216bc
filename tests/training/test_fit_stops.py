"""Signals, divergence, and what a training tells."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import Worker, several
from training_cases import Drawn, perceptron, points, same, train

from jaxcompress.core.model import Model
from jaxcompress.training.loop import Diverged
from jaxcompress.training.mesh import make_mesh
from jaxcompress.training.metrics import MetricsLog, read_metrics
from jaxcompress.training.objective import Objective
from jaxcompress.training.preemption import Preempted, Preemption

STEPS = 40
OPTIONS = {"steps": STEPS, "checkpoint_every": 1000, "log_every": 10}


def saved(path):
    with np.load(path) as file:
        return [file[name] for name in file.files]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return train(perceptron(), tmp_path_factory.mktemp("whole"), mesh=make_mesh(8, 1, 1), **OPTIONS)


@pytest.mark.slow
def test_a_process_that_is_told_to_stop_goes_on_to_the_same_bits(tmp_path, unbroken):
    settings = {"workdir": tmp_path / "run", "mesh": (8, 1, 1), "options": OPTIONS, "seconds": 0.1}
    worker = Worker(settings)
    worker.wait_for("batch 5")
    worker.process.send_signal(signal.SIGTERM)
    code, err = worker.finish()
    assert code == 0, err
    (told,) = worker.said("preempted")
    assert f"of {STEPS}, checkpoint written" in told
    assert "SIGTERM: stopping at a checkpoint" in err
    out = train(perceptron(), tmp_path / "run", mesh=make_mesh(8, 1, 1), **OPTIONS)
    assert same(out.params, unbroken.params)


@pytest.mark.slow
def test_two_processes_stop_at_one_step_whichever_is_told(tmp_path, unbroken):
    """And one process with as many devices ends what they began, on the same mesh."""
    settings = {"workdir": tmp_path / "run", "mesh": (8, 1, 1), "options": OPTIONS, "seconds": 0.1}
    workers = several(2, settings, devices=4)
    workers[1].wait_for("batch 5")
    workers[1].process.send_signal(signal.SIGTERM)
    for worker in workers:
        code, err = worker.finish()
        assert code == 0, err
    told = {worker.said("preempted")[0] for worker in workers}
    assert len(told) == 1
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    out = train(perceptron(), tmp_path / "run", mesh=make_mesh(8, 1, 1), **OPTIONS)
    for a, b in zip(jax.tree.leaves(out.params), jax.tree.leaves(unbroken.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30, 40]


def answered(*signals):
    """What `fit` does with them."""
    with Preemption():
        for number in signals:
            signal.raise_signal(number)
        raise Preempted


def test_handlers_are_put_back_and_a_late_signal_is_raised_again():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("mine"))
    try:
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGTERM)
            assert preemption.requested()
            assert heard == []
        assert heard == ["mine"]
        with pytest.raises(Preempted):
            answered(signal.SIGTERM)
        assert heard == ["mine"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_ctrl_c_interrupts_at_once():
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt):
        answered(signal.SIGINT, signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("bad", [1, 5, 6, 7])
def test_a_loss_that_is_not_finite_names_its_step(tmp_path, bad):
    """Batch `bad` is that of step `bad` + 1; a checkpoint is written every 3 steps."""
    batches = Drawn(points, poisoned=bad)
    kept = bad // 3 * 3
    where = f"checkpoint {kept} is kept" if kept else "no checkpoint was written before"
    with pytest.raises(Diverged, match=f"not finite in step {bad + 1}; {where}"):
        train(perceptron(), tmp_path, steps=9, log_every=4, batches=batches)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert all(np.isfinite(row["loss"]) and row["step"] <= bad for row in rows)
    sound = train(perceptron(), tmp_path, steps=9, log_every=4)
    whole = train(perceptron(), tmp_path / "whole", steps=9, log_every=4)
    assert same(sound.params, whole.params)


def test_an_update_that_is_not_finite_changes_no_weight(tmp_path):
    """A finite loss and gradient, and a step beyond what float32 holds."""

    def function(params, batch, key, constants):
        return {"loss": (1e30 * params["w"].sum(), jnp.float32(1))}

    model = Model(lambda params: params["w"], {"w": jnp.ones(4)})
    settings = {"name": "sgd", "learning_rate": 1e30, "clip": None, "weight_decay": 0}
    with pytest.raises(Diverged, match="step 1;"):
        train(model, tmp_path, objective=Objective(function), optimizer=settings)


def test_metrics_go_to_json_lines_and_tensorboard(tmp_path):
    train(perceptron(), tmp_path, steps=7, log_every=3, checkpoint_every=3)
    train(perceptron(), tmp_path, steps=12, log_every=3, checkpoint_every=3)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 7, 9, 12]
    assert all(set(row) == {"step", "loss", "gradient_norm"} for row in rows)
    drawn: dict[int, float] = {}
    for path in sorted(tmp_path.glob("events.out.tfevents.*")):
        for step, name, value in scalars(path):
            if name == "loss":
                assert step not in drawn
                drawn[step] = value
    assert drawn == {row["step"]: pytest.approx(row["loss"], rel=1e-6) for row in rows}


def scalars(path):
    """(step, tag, value) of a file of events, which are length-prefixed protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)


def test_lines_behind_the_checkpoint_are_dropped_and_a_cut_one_is_no_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (2, 4, 6)]
    path.write_text("\n".join([*lines, '{"step": 8, "lo']))
    assert [row["step"] for row in read_metrics(path)] == [2, 4, 6]
    log = MetricsLog(tmp_path, resumed_at=4)
    log.write(6, {"loss": 0.5})
    log.close()
    assert read_metrics(path) == [
        {"step": 2, "loss": 1.0},
        {"step": 4, "loss": 1.0},
        {"step": 6, "loss": 0.5},
    ]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = MetricsLog(tmp_path / "run")
    log.write(1, {"loss": 1.0})
    log.close()
    assert not os.listdir(tmp_path)
