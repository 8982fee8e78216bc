"""Schedules in a training: gone on with bit for bit, the same masks on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks import slow_but
from training_cases import Drawn, perceptron, points, same, squared_error

from jaxcompress.core.arrays.base import KERNEL, is_compressed
from jaxcompress.core.partition import split
from jaxcompress.pruning import schedules
from jaxcompress.training.mesh import make_mesh
from jaxcompress.training.settings import Training, train
from jaxcompress.training.transform import Transform

STEPS = 7


class Stopping(Drawn):
    """Batches that end the world before the sixth one."""

    def __next__(self):
        if self.given == 5:
            raise RuntimeError("killed")
        return super().__next__()


def optimizer(function, **fields):
    """The transform of a schedule that is an optimizer around an optimizer."""
    return lambda where: Transform(
        lambda inner: function(inner, where), paths=tuple(where),
        begin=lambda p: fields["begin"](p, where) if fields else p,
        steps=schedules.training_steps(3, 2, 1) if function is lottery else None,
    )  # fmt: skip


def lottery(inner, where):
    return schedules.lottery(inner, where, sparsity=0.8, rounds=2, steps=3, rewind=1)


def sparse(params, where):
    return schedules.sparse_start(params, where, sparsity=0.8)


TRANSFORMS = {
    "lottery": optimizer(lottery),
    "rigl": optimizer(lambda i, w: schedules.rigl(i, w, interval=2, end=6), begin=sparse),
    "set": optimizer(
        lambda i, w: schedules.sparse_evolution(i, w, interval=2, end=6), begin=sparse
    ),
    "movement": lambda where: schedules.movement(where, sparsity=0.8, begin=0, end=5, interval=1),
    "learned_n_m": lambda where: schedules.learned_n_m(where, steps=STEPS),
}


def run(name, workdir, *, mesh=None, batches=None):
    model = perceptron()
    where = schedules.targets(model, np.zeros((16, 64), np.float32))
    return train(
        model,
        squared_error(model),
        batches or Drawn(points),
        Training(steps=STEPS, learning_rate=0.01, log_every=10, checkpoint_every=2),
        workdir=workdir,
        mesh=mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1]),
        transform=TRANSFORMS[name](where),
    ).params


@pytest.mark.parametrize("name", slow_but(TRANSFORMS, ["gradual", "rigl"]))
def test_stopped_and_spread_out(name, tmp_path):
    whole = run(name, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(name, tmp_path / "stopped", batches=Stopping(points))
    rest = Drawn(points)
    assert same(run(name, tmp_path / "stopped", batches=rest), whole)
    assert rest.given > STEPS - 1
    wide = run(name, tmp_path / "wide", mesh=make_mesh(2, 4, 1))
    for layer in ("first", "second"):
        assert not is_compressed(whole[layer]["kernel"])
        here, there = (np.asarray(p[layer]["kernel"]) for p in (whole, wide))
        assert 0.4 < np.mean(here == 0) < 0.9
        alike = (here == 0) == (there == 0)
        # Gradients that are summed over devices round otherwise, which tells where two nearly tie.
        assert np.mean(alike) >= (0.998 if name == "rigl" else 1)
        np.testing.assert_allclose(here[alike], there[alike], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["gradual", "rigl", "set", "lottery"])
def test_of_the_same_gradients_eight_devices_make_the_same_masks(name):
    where = {"w": KERNEL}
    start = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 48)), jnp.float32)}
    inner = optax.sgd(0.1)
    if name == "gradual":
        made = schedules.gradual(inner, where, sparsity=0.8, begin=0, end=6, interval=2)
    else:
        made = TRANSFORMS[name](where).optimizer(inner)
        start = sparse(start, where) if name != "lottery" else start
    mesh = make_mesh(1, 8, 1)
    found = []
    for place in (jax.devices()[0], NamedSharding(mesh, P("fsdp"))):
        now = jax.device_put(start, place)
        state, update = made.init(now), jax.jit(made.update)
        for step in range(8):
            g = np.random.default_rng(step).normal(size=(64, 48)).astype(np.float32)
            updates, state = update({"w": jax.device_put(g, place)}, state, now)
            now = optax.apply_updates(now, updates)
        found.append(now)
    assert len(now["w"].sharding.device_set) == 8
    assert same(*found)
    assert 0.7 < np.mean(found[0]["w"] == 0) < 0.9


def test_gates_are_a_kind_of_their_own(tmp_path):
    model = perceptron()
    where = schedules.targets(model, np.zeros((16, 64), np.float32))
    params = schedules.learned_n_m(where, steps=1).begin(model.params)
    trainable, frozen = split(params, "gates")
    assert {x.shape for x in jax.tree.leaves(trainable)} == {(64, 96), (32, 96), (1, 1)}
    assert same(frozen["first"]["bias"], model.params["first"]["bias"])
