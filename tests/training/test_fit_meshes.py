"""The same training on every mesh; a state that is really split; weights that are gathered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import Drawn, decoder, perceptron, points, same, sentences, train, whole

from jaxcompress.core.arrays.affine import encode_affine, minmax_range
from jaxcompress.core.arrays.training import Masked
from jaxcompress.core.errors import InputError
from jaxcompress.core.partition import split
from jaxcompress.core.paths import map_with_paths
from jaxcompress.models.precision import with_compute_dtype
from jaxcompress.training.loop import fit
from jaxcompress.training.mesh import BATCH, global_batch, make_mesh, param_shardings
from jaxcompress.training.metrics import read_metrics
from jaxcompress.training.objective import Objective, next_token
from jaxcompress.training.optimizers import make_optimizer
from jaxcompress.training.step import init_state, jit_step, make_step, state_shardings

ROWS = 16


def compressed():
    """A decoder: W4 g32 attention, a half masked feed-forward layer, the rest dense."""
    rng = np.random.default_rng(0)

    def change(path, leaf):
        if "attn" in path:
            scale, zero = minmax_range(leaf.T, bits=4, groups=leaf.shape[0] // 32, symmetric=False)
            return encode_affine(leaf.T, scale, zero, bits=4)
        if "mlp" in path:
            return Masked(leaf.T, jnp.asarray(rng.random(leaf.T.shape) < 0.5))
        return leaf

    model = decoder()
    return model.replace(params=map_with_paths(change, model.params))


def trained_on(mesh, workdir, steps=3, **options):
    """(losses, parameters as NumPy arrays), after so many steps of 3."""
    model = options.pop("model", None) or compressed()
    optimizer = make_optimizer(steps=3, learning_rate=0.01, weight_decay=0.1)
    objective = options.pop("objective", None) or next_token(model, chunk=4)
    out = fit(
        model, objective, Drawn(sentences, ROWS), optimizer, steps=steps, workdir=workdir,
        mesh=mesh, log_every=1, train=("dense", "weights"), **options,
    )  # fmt: skip
    rows = read_metrics(workdir / "metrics.jsonl")
    return [row["loss"] for row in rows], whole(out.params)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """On one device."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return trained_on(mesh, tmp_path_factory.mktemp("alone"))


def check_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-5)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((8, 1, 1), {"accumulate": 2}),
        ((2, 2, 2), {}),
        pytest.param((1, 8, 1), {}, marks=pytest.mark.slow),
        pytest.param((1, 1, 8), {"accumulate": 2}, marks=pytest.mark.slow),
        ((8, 1, 1), {"parallel": "pmap", "accumulate": 2}),
    ],
    ids=str,
)
def test_losses_and_weights_are_those_of_one_device(sizes, options, alone, tmp_path):
    losses, params = trained_on(make_mesh(*sizes), tmp_path, **options)
    check_same((losses, params), alone)
    assert losses[-1] < losses[0]


def test_one_objective_serves_several_meshes(alone, tmp_path):
    """What `lift` traced under one mesh must not be used under another."""
    model = compressed()
    objective = next_token(model, chunk=4)
    for number, sizes in enumerate([(4, 2, 1), (2, 4, 1)]):
        found = trained_on(
            make_mesh(*sizes), tmp_path / str(number), model=model, objective=objective
        )
        check_same(found, alone)


def placed(model, sizes, optimizer):
    """(step, state, frozen) as `fit` has them on a mesh."""
    mesh = make_mesh(*sizes)
    whole = param_shardings(model, mesh)
    trainable, frozen = split(model.params)
    none = {"is_leaf": lambda x: x is None}
    ours, theirs = (
        jax.tree.map(lambda p, w: None if p is None else w, part, whole, **none)
        for part in (trainable, frozen)
    )
    state = init_state(trainable, optimizer)
    shardings = state_shardings(state, optimizer, ours, mesh)
    state = jax.device_put(state, shardings)
    step = jit_step(
        make_step(next_token(model, chunk=4), optimizer), (shardings, theirs, None), mesh
    )
    batch = global_batch(sentences(np.random.default_rng(0), ROWS), mesh)
    return step, (state, jax.device_put(frozen, theirs), None, batch)


def test_state_and_moments_are_split():
    step, arguments = placed(decoder(), (2, 2, 2), make_optimizer(steps=3))
    state, _ = step(*arguments)
    kernel = state.trainable["layers"]["0"]["mlp"]["up_proj"]["kernel"]  # [64, 128]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(32, 64)}
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.shape == (64, 128)]
    assert len(moments) == 4  # two of gate_proj, two of up_proj
    for moment in moments:
        assert {shard.data.shape for shard in moment.addressable_shards} == {(32, 64)}
    everything = sum(x.nbytes for x in jax.tree.leaves(state.trainable))
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.trainable))
    assert here < 0.3 * everything


COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collectives(text):
    """(kind, [(dtype, shape)]) of each collective of a program."""
    found = []
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            shapes = [(d, tuple(int(n) for n in s.split(",") if n)) for d, s in arrays]
            found.append((match[2], shapes))
    return found


def test_fsdp_gathers_weights_and_not_the_batch():
    """No collective moves activations: their first axis would be the whole batch of 16 or more."""
    step, arguments = placed(decoder(), (1, 8, 1), make_optimizer(steps=3))
    found = collectives(step.lower(*arguments).compile().as_text())
    moved = {shape for kind, arrays in found for dtype, shape in arrays if dtype == "f32"}
    weights = {x.shape for x in jax.tree.leaves(arguments[0].trainable)}
    assert moved <= weights | {(), *(shape[::-1] for shape in weights)}
    assert any(kind == "all-gather" for kind, _ in found)


def test_a_mesh_of_copies_sums_gradients_once():
    step, arguments = placed(decoder(), (8, 1, 1), make_optimizer(steps=3))
    found = collectives(step.lower(*arguments).compile().as_text())
    assert {kind for kind, _ in found} == {"all-reduce"}
    summed = [sorted(shape) for _, arrays in found for _, shape in arrays if shape]
    weights = jax.tree.leaves(arguments[0].trainable)
    assert sorted(summed) == sorted(sorted(x.shape) for x in weights)


def test_gradients_of_a_bfloat16_decoder_are_summed_over_devices_in_float32(tmp_path):
    """In the program as it was partitioned: later a CPU widens what it cannot sum itself."""
    model = with_compute_dtype(decoder(attention_bias=True), "bfloat16")
    step, arguments = placed(model, (2, 2, 2), make_optimizer(steps=3))
    dump = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd.*"}
    step.lower(*arguments).compile(compiler_options=dump)
    (partitioned,) = tmp_path.glob("*on_mesh*.after_spmd-partitioning.*")
    text = partitioned.read_text()
    moved = collectives(text)
    assert ("bf16", (64, 64)) in [array for _, arrays in moved for array in arrays]  # a weight
    sums = [a for kind, arrays in moved if kind == "all-reduce" for a in arrays]
    assert len(sums) > 10
    assert {dtype for dtype, _ in sums} == {"f32"}


def test_a_step_is_compiled_once(tmp_path, caplog):
    """Whether its state is new, restored, or came out of the step before."""

    def function(params, batch, key, constants):
        error = perceptron().apply(params, batch["x"]) - batch["y"]
        return {"loss": (jnp.square(error).sum(), jnp.float32(len(error)))}

    for steps in (4, 8):
        with jax.log_compiles():
            train(
                perceptron(), tmp_path, objective=Objective(function), steps=steps,
                mesh=make_mesh(2, 4, 1), batches=Drawn(points),
            )  # fmt: skip
        compiled = [r for r in caplog.messages if "Finished XLA compilation of jit(on_mesh)" in r]
        assert len(compiled) == 1, compiled
        caplog.clear()


def test_what_does_not_fit_is_refused(tmp_path):
    model = perceptron()
    with pytest.raises(InputError, match=r"batch_size 12: does not divide .* = 16; .* is 16"):
        train(model, tmp_path, batches=Drawn(points, 12), accumulate=2)
    with pytest.raises(InputError, match="parallel 'pmap': plain data parallelism"):
        train(model, tmp_path, mesh=make_mesh(2, 4, 1), parallel="pmap")
    with pytest.raises(InputError, match="parallel 'shard': use jit or pmap"):
        train(model, tmp_path, parallel="shard")


def test_the_callers_model_lives_on(tmp_path):
    """Its buffers are not those that the steps donate, even where they lay right before."""
    mesh = make_mesh(8, 1, 1)
    model = perceptron()
    model = model.replace(
        params=jax.device_put(model.params, jax.sharding.NamedSharding(mesh, BATCH.__class__()))
    )
    before = jax.tree.map(np.array, model.params)
    train(model, tmp_path, mesh=mesh)
    assert same(model.params, before)


def test_many_steps_without_a_look_at_any(tmp_path):
    """Their collectives must not meet: programs that wait for each other lock up the threads."""
    train(perceptron(), tmp_path, steps=300, log_every=300, checkpoint_every=300)
