"""A training that is stopped anywhere goes on to the same bits; what does not fit is refused."""

import gc
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_cases import Drawn, perceptron, points, same, train

from jaxcompress.core.arrays.affine import encode_affine, minmax_range
from jaxcompress.core.arrays.training import Masked
from jaxcompress.core.errors import InputError
from jaxcompress.core.partition import split
from jaxcompress.training.checkpoints import TrainCheckpoints
from jaxcompress.training.mesh import make_mesh
from jaxcompress.training.metrics import read_metrics
from jaxcompress.training.preemption import Preempted
from jaxcompress.training.step import init_state

STEPS = 8


class Stopping(Drawn):
    """Batches of which one brings a signal, or the end of the world."""

    def __init__(self, stop_at: int, kind: str) -> None:
        super().__init__(points)
        self.stop_at, self.kind = stop_at, kind

    def __next__(self):
        if self.given == self.stop_at and self.kind == "killed":
            raise RuntimeError("killed")
        batch = super().__next__()
        if self.given == self.stop_at and self.kind != "killed":
            signal.raise_signal(getattr(signal, self.kind))
        return batch


class Counted(Drawn):
    """Batches that count how many were taken of them."""

    taken = 0

    def __next__(self):
        self.taken += 1
        return super().__next__()


def alone():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(parameters, lines of metrics, folder) of a training that nobody stopped."""
    workdir = tmp_path_factory.mktemp("unbroken")
    out = train(perceptron(), workdir, steps=STEPS, mesh=alone())
    return out.params, read_metrics(workdir / "metrics.jsonl"), workdir


@pytest.mark.parametrize(
    ("step", "kind"),
    [(1, "killed"), (3, "SIGTERM"), (4, "SIGINT"), (5, "killed"), (STEPS - 1, "SIGTERM")],
)
def test_stopped_anywhere_it_ends_in_the_same_bits(unbroken, tmp_path, step, kind):
    """Before the first checkpoint (of every third step), at one, between two, before the last."""
    error, text = (RuntimeError, "killed") if kind == "killed" else (Preempted, f"step {step} of")
    with pytest.raises(error, match=text):
        train(perceptron(), tmp_path, steps=STEPS, mesh=alone(), batches=Stopping(step, kind))
    rest = Counted(points)
    out = train(perceptron(), tmp_path, steps=STEPS, mesh=alone(), batches=rest)
    assert rest.taken == STEPS - (step // 3 * 3 if kind == "killed" else step)
    assert same(out.params, unbroken[0])
    assert read_metrics(tmp_path / "metrics.jsonl") == unbroken[1]


def test_after_its_end_nothing_is_trained(unbroken):
    params, rows, workdir = unbroken
    rest = Counted(points)
    out = train(perceptron(), workdir, steps=STEPS, mesh=alone(), batches=rest)
    assert rest.taken == 0
    assert same(out.params, params)
    assert read_metrics(workdir / "metrics.jsonl") == rows


def test_a_checkpoint_is_read_on_another_mesh(tmp_path):
    """Stopped on 1 device, gone on with on 8, ended on 4 x 2."""
    model = perceptron()
    weight = model.params["first"]["kernel"].T
    scale, zero = minmax_range(weight[:32], bits=4, groups=2, symmetric=True)
    model.params["first"]["kernel"] = Masked(weight, weight > 0)
    model.params["second"]["kernel"] = encode_affine(weight[:32], scale, zero, bits=4)
    expected = train(model, tmp_path / "whole", steps=STEPS, mesh=alone())
    for mesh, stop in [(alone(), 2), (make_mesh(1, 8, 1), 5)]:
        with pytest.raises(Preempted):
            train(model, tmp_path / "a", steps=STEPS, mesh=mesh, batches=Stopping(stop, "SIGTERM"))
    out = train(model, tmp_path / "a", steps=STEPS, mesh=make_mesh(4, 2, 1))
    for a, b in zip(jax.tree.leaves(out.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Checkpoint of a masked perceptron after 4 steps."""
    workdir = tmp_path_factory.mktemp("begun")
    train(masked(), workdir, steps=4)
    return workdir


def masked():
    model = perceptron()
    weight = model.params["first"]["kernel"].T
    model.params["first"]["kernel"] = Masked(weight, weight > 0)
    return model


def wider():
    model = masked()
    model.params["second"]["bias"] = jnp.zeros((1, 32))
    return model


def half():
    model = masked()
    model.params["norm"]["scale"] = model.params["norm"]["scale"].astype(jnp.bfloat16)
    return model


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (perceptron, {}, "first/kernel: class is a plain array here, Masked in the checkpoint"),
        (wider, {}, r"second/bias: shape is \[1, 32\] here, \[32\] in the checkpoint"),
        (half, {}, "norm/scale: dtype is bfloat16 here, float32 in the checkpoint"),
        (masked, {"optimizer": {"name": "lion"}}, "checkpoint: optimizer.* only"),
        (masked, {"exclude": "norm/*"}, "checkpoint: .*norm.scale is in the checkpoint only"),
    ],
    ids=["class", "shape", "dtype", "optimizer", "trainable"],
)
def test_another_model_or_optimizer_is_refused_in_one_line(begun, tmp_path, model, options, text):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    before = read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=text) as caught:
        train(model(), tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert read_metrics(tmp_path / "metrics.jsonl") == before


def test_data_that_differ_are_refused(begun, tmp_path):
    class Other(Drawn):
        def restore(self, state):
            raise InputError("position in the data: of other batches")

    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    with pytest.raises(InputError, match="of other batches"):
        train(masked(), tmp_path, batches=Other(points))


def test_nothing_lies_beside_the_state_that_is_read(tmp_path, monkeypatch):
    """Weights and moments that fit once would not fit twice."""

    def kernels():
        gc.collect()
        return sum(x.shape == (64, 64) for x in jax.live_arrays())

    train(perceptron(), tmp_path, steps=2, mesh=alone())
    model = perceptron()
    before, seen = kernels(), []
    restore = TrainCheckpoints.restore

    def spied(*arguments):
        seen.append(kernels())
        return restore(*arguments)

    monkeypatch.setattr(TrainCheckpoints, "restore", spied)
    train(model, tmp_path, steps=3, mesh=alone())
    assert seen == [before]


def test_no_more_checkpoints_than_wanted_stay(tmp_path):
    train(perceptron(), tmp_path, steps=12, checkpoint_every=2)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"10", "12"}


def test_names_with_dots_in_them_do_not_meet(tmp_path):
    checkpoints = TrainCheckpoints(tmp_path)
    state = {"a": {"b": jnp.ones(2)}, "a.b": jnp.zeros(3), "a/b": jnp.full(4, 5.0)}
    checkpoints.save(1, state, {}, {})
    checkpoints.wait()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found, _ = checkpoints.restore(state, jax.tree.map(lambda _: here, state), {})
    checkpoints.close()
    assert same(found, state)


SAVER = """
import sys, itertools
import jax.numpy as jnp, numpy as np
from pathlib import Path
from jaxcompress.training.checkpoints import TrainCheckpoints

checkpoints = TrainCheckpoints(Path(sys.argv[1]))
noise = np.random.default_rng(0).normal(size=2**23).astype(np.float32)
for step in itertools.count(1):
    checkpoints.save(step, {"w": jnp.asarray(noise + step)}, {"at": step}, {})
    checkpoints.wait()
    print(step, flush=True)
"""


def test_a_checkpoint_that_a_kill_cut_short_is_as_if_never_begun(tmp_path):
    """kill -9 while 32 MB are being written: what is found is the one before, whole."""
    run = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    for line in run.stdout:
        if int(line) == 2:
            break
    while not (broken := [p for p in tmp_path.iterdir() if not p.name.isdigit()]):
        time.sleep(0.001)
    run.kill()
    run.wait()
    broken = [path for path in tmp_path.iterdir() if not path.name.isdigit()]
    complete = max(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())
    checkpoints = TrainCheckpoints(tmp_path)
    assert checkpoints.latest == complete
    state = {"w": jax.ShapeDtypeStruct((2**23,), jnp.float32)}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found, position = checkpoints.restore(state, {"w": here}, {})
    assert position == {"at": complete}
    noise = np.random.default_rng(0).normal(size=2**23).astype(np.float32)
    np.testing.assert_array_equal(found["w"], noise + complete)
    checkpoints.save(complete + 2, found, {"at": 0}, {})  # not in the place of the broken one
    checkpoints.close()
    assert broken
    assert not any(path.exists() for path in broken)


def test_what_is_saved_is_not_what_the_next_step_writes_over(tmp_path):
    """Saving goes on while later steps take the memory of the state."""
    params = {"w": jnp.arange(2.0**22)}
    optimizer = optax.sgd(1.0)
    state = init_state(split(params)[0], optimizer)
    over = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints = TrainCheckpoints(tmp_path)
    for step in range(1, 4):
        checkpoints.save(step, state, {}, {})
        for _ in range(5):
            state = over(state)
    checkpoints.wait()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found, _ = checkpoints.restore(state, jax.tree.map(lambda _: here, state), {})
    checkpoints.close()
    np.testing.assert_array_equal(found.trainable["w"], np.arange(2.0**22) + 10)
