"""The walk block by block: statistics against PyTorch's hooks, targets by closed form, resume."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Blocks, Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.layerwise import batch
from jaxcompress.layerwise.journal import Journal
from jaxcompress.layerwise.walk import Settings, walk
from jaxcompress.models import linear_paths
from jaxcompress.pruning.refit import Refitted
from jaxcompress.pruning.sparsegpt import ColumnSolver

NAMES = ("second_moment", "sum_squares", "sum_abs", "sum_x", "max_abs", "zeros", "count")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = np.random.default_rng(0).integers(0, 300, (6, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.write_llama(tmp_path_factory.mktemp("llama"), layers=2, intermediate_size=96)


def halved(matrix):
    """A change that every later statistic sees: every other column goes."""
    return jnp.where(jnp.arange(matrix.shape[-1]) % 2 == 0, matrix, 0)


def walked(model, **settings):
    """Problems by path, and the new parameters."""
    seen = {}
    stored = model.params if not model.config.scan_layers else None

    def solve(problems):
        seen.update((problem.path, problem) for problem in problems)
        if stored is None:
            return [halved(problem.matrix) for problem in problems]
        return [halved(dict(leaves_with_paths(stored))[p.path].T) for p in problems]

    chosen = {path: {} for path in linear_paths(model)}
    return seen, walk(model, chosen, IDS, solve, Settings(**{"statistics": NAMES, **settings}))


def torch_inputs(directory, changed):
    """The rows that every linear layer of PyTorch's model reads, `[tokens, K]`.

    `changed(i, kind)` says whether a layer's matrix has lost every other column by then.
    """
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows = {}
    for i, layer in enumerate(model.model.layers):
        for kind in KINDS:
            module = layer.get_submodule(("mlp." if kind in KINDS[4:] else "self_attn.") + kind)
            if changed(i, kind):
                module.weight.data[:, 1::2] = 0

            def keep(module, inputs, output, key=(i, kind)):
                rows[key] = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double().numpy()

            module.register_forward_hook(keep)
    with torch.no_grad():
        model(torch.tensor(IDS, dtype=torch.long))
    return rows


def path_of(i, kind):
    return f"layers/{i}/{'mlp' if kind in KINDS[4:] else 'attn'}/{kind}/kernel"


def assert_statistics(statistics, rows):
    expected = {
        "second_moment": rows.T @ rows,
        "sum_squares": (rows**2).sum(0),
        "sum_abs": np.abs(rows).sum(0),
        "sum_x": rows.sum(0),
        "max_abs": np.abs(rows).max(0),
        "zeros": (rows == 0).sum(0),
        "count": len(rows),
    }
    for name, value in expected.items():
        scale = max(np.abs(value).max(), 1e-6)
        np.testing.assert_allclose(statistics[name] / scale, value / scale, atol=2e-5, err_msg=name)


def test_the_dense_models_statistics(directory):
    seen, _ = walked(jc.load(directory), sequential="none")
    rows = torch_inputs(directory, lambda i, kind: False)
    for i, kind in rows:
        assert_statistics(seen[path_of(i, kind)].statistics, rows[i, kind])


def test_inputs_come_from_the_blocks_before(directory):
    seen, _ = walked(jc.load(directory), sequential="block")
    for block in range(2):
        rows = torch_inputs(directory, lambda i, kind, block=block: i < block)
        for kind in KINDS:
            assert_statistics(seen[path_of(block, kind)].statistics, rows[block, kind])


@pytest.mark.parametrize("after", [3, 4, 6])
def test_inputs_come_from_the_matrices_before(directory, after):
    """q, k, v read the same values and go together; then o; then gate and up; then down."""
    seen, _ = walked(jc.load(directory), sequential="matrix")
    rows = torch_inputs(directory, lambda i, kind: i == 0 and kind in KINDS[:after])
    assert_statistics(seen[path_of(0, KINDS[after])].statistics, rows[0, KINDS[after]])


def test_stacked_blocks_and_one_by_one_are_alike(directory):
    one, found = walked(jc.load(directory), sequential="matrix")
    stacked, found_stacked = walked(jc.load(directory, scan_layers=True), sequential="matrix")
    for i in range(2):
        for kind in KINDS:
            a = one[path_of(i, kind)].statistics["second_moment"]
            b = stacked[path_of(i, kind).replace(f"layers/{i}", "layers") + f"[{i}]"]
            np.testing.assert_allclose(b.statistics["second_moment"], a, rtol=1e-4, atol=1e-4)
    kernel = found.params["layers"]["1"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(
        found_stacked.params["layers"]["mlp"]["up_proj"]["kernel"][1], kernel
    )


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_the_target_is_the_dense_models_output(directory, fraction):
    model = jc.load(directory)
    seen, _ = walked(model, sequential="matrix", dense_target=fraction)
    ours = torch_inputs(directory, lambda i, kind: i == 0)[1, "q_proj"]
    theirs = torch_inputs(directory, lambda i, kind: False)[1, "q_proj"]
    kernel = np.asarray(model.params["layers"]["1"]["attn"]["q_proj"]["kernel"], np.float64)
    moment = ours.T @ ours
    ridge = 0.01 * np.diag(moment).mean() * np.eye(len(moment))
    shift = (ours.T @ theirs - moment) @ kernel
    expected = kernel + fraction * np.linalg.solve(moment + ridge, shift)
    np.testing.assert_allclose(seen[path_of(1, "q_proj")].matrix.T, expected, atol=2e-3)
    assert np.abs(expected - kernel).max() > 0.02


def users_model(blocks: bool):
    """Plain JAX, `[out, in]` kernels, with and without `Blocks`; a convolution in front."""
    rng = np.random.default_rng(1)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)

    params = {
        "conv": drawn(3, 4, 5),
        "body": [{"w": drawn(5, 5)} for _ in range(2)],
        "last": drawn(2, 5),
    }

    def embed(params, x):
        return jax.lax.conv_general_dilated(
            x, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    def block(params, h):
        return h + jnp.tanh(h @ params["w"].T)

    def head(params, h):
        return h.mean(1) @ params["last"].T

    walk_of = Blocks(embed, block, head, where="body")
    return Model(walk_of.run, params, blocks=walk_of if blocks else None), rng.normal(
        size=(4, 7, 4)
    ).astype(np.float32)


CHOSEN = {path: {} for path in ("body/0/w", "body/1/w", "last")}


def recording(change):
    """The problems by path, and the function that solves them: their matrices, changed."""
    seen = {}

    def solve(problems):
        seen.update((problem.path, problem) for problem in problems)
        return [change(problem.matrix) for problem in problems]

    return seen, solve


def embedded(model, inputs):
    padded = np.pad(inputs, ((0, 0), (1, 1), (0, 0)))
    patches = np.stack([padded[:, i : i + 7] for i in range(3)], 2)
    return np.einsum("btkc,kco->bto", patches, np.asarray(model.params["conv"]))


@pytest.mark.parametrize("blocks", [True, False])
def test_a_users_model(blocks):
    model, inputs = users_model(blocks)
    seen, solve = recording(lambda matrix: matrix)
    found = walk(model, CHOSEN, inputs, solve, Settings(("second_moment",), sequential="none"))
    h = embedded(model, inputs)
    for i in range(2):
        rows = h.reshape(-1, 5)
        moment = seen[f"body/{i}/w"].statistics["second_moment"]
        np.testing.assert_allclose(moment, rows.T @ rows, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(seen[f"body/{i}/w"].matrix, model.params["body"][i]["w"])
        h = h + np.tanh(h @ np.asarray(model.params["body"][i]["w"]).T)
    rows = h.mean(1)
    np.testing.assert_allclose(
        seen["last"].statistics["second_moment"], rows.T @ rows, rtol=1e-4, atol=1e-4
    )
    assert any("captured whole" in note for note in found.notes) != blocks
    jax.tree.map(np.testing.assert_array_equal, found.params, model.params)


@pytest.mark.parametrize("blocks", [True, False])
def test_matrix_after_matrix_sees_what_was_solved_before(blocks):
    """The statistics are those of a model whose earlier matrices are halved, blocks or none."""
    model, inputs = users_model(blocks)
    seen, solve = recording(lambda matrix: matrix / 2)
    settings = Settings(("second_moment",), sequential="matrix", dense_target=1.0, damp=1e-6)
    found = walk(model, CHOSEN, inputs, solve, settings)
    assert not any("captured whole" in note for note in found.notes)
    h = there = embedded(model, inputs)
    for i in range(2):
        weight = np.asarray(model.params["body"][i]["w"])
        rows, wanted = h.reshape(-1, 5), there.reshape(-1, 5)
        problem = seen[f"body/{i}/w"]
        np.testing.assert_allclose(
            problem.statistics["second_moment"], rows.T @ rows, rtol=1e-4, atol=1e-4
        )
        best = np.linalg.lstsq(rows, wanted @ weight.T, rcond=None)[0].T
        np.testing.assert_allclose(problem.matrix, best, rtol=1e-2, atol=1e-3)
        half = np.asarray(found.params["body"][i]["w"])
        np.testing.assert_allclose(half, problem.matrix / 2, rtol=1e-6)
        h, there = h + np.tanh(h @ half.T), there + np.tanh(there @ weight.T)
    rows = h.mean(1)
    np.testing.assert_allclose(
        seen["last"].statistics["second_moment"], rows.T @ rows, rtol=1e-4, atol=1e-4
    )


def test_the_kernel_of_a_convolution():
    model, inputs = users_model(False)
    seen = []
    settings = Settings(("second_moment",), sequential="none")
    walk(
        model,
        {"conv": {}},
        inputs,
        lambda problems: [seen.append(p) or p.matrix for p in problems],
        settings,
    )
    padded = np.pad(inputs, ((0, 0), (1, 1), (0, 0)))
    rows = np.stack([padded[:, i : i + 7] for i in range(3)], 2).reshape(-1, 12)
    np.testing.assert_allclose(seen[0].statistics["second_moment"], rows.T @ rows, rtol=1e-4)
    assert seen[0].matrix.shape == (5, 12)


class Killed(BaseException):
    """Stands for a signal."""


def test_a_killed_walk_goes_on_behind_the_last_group(directory, tmp_path):
    model = jc.load(directory)
    options = {"pattern": "2:4", "calibration": IDS, "dense_target": 1.0}
    whole = jc.compress(model, "refit", **options)

    class Dies(Journal):
        def put(self, path, leaf, seconds, **figures):
            if path == path_of(1, "o_proj"):
                raise Killed
            super().put(path, leaf, seconds, **figures)

    with pytest.raises(Killed):
        jc.compress(model, "refit", journal=Dies(tmp_path / "kept"), **options)
    again = Journal(tmp_path / "kept")
    done = {
        path for i in range(2) for kind in KINDS if again.get(path := path_of(i, kind)) is not None
    }
    before = {path_of(1, kind) for kind in ("q_proj", "k_proj", "v_proj")}
    assert done == {path_of(0, kind) for kind in KINDS} | before
    resumed = jc.compress(model, "refit", journal=again, **options)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)


def test_on_a_mesh_the_same_masks(directory):
    model = jc.load(directory)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
    ids = np.random.default_rng(1).integers(0, 300, (8, 16)).astype(np.int32)
    for sequential in ("block", "matrix"):
        options = {"calibration": ids, "sequential": sequential, "dense_target": 0.0}
        alone = jc.compress(model, "sparsegpt", **options)
        spread = jc.compress(model, "sparsegpt", mesh=mesh, **options)
        for a, b in zip(jax.tree.leaves(alone.params), jax.tree.leaves(spread.params)):
            np.testing.assert_array_equal(np.asarray(a) == 0, np.asarray(b) == 0)
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_batch_over_a_mesh_needs_no_other_device():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    shapes = (8, 32, 64), (8, 64, 64)
    given = [jax.ShapeDtypeStruct(shape, np.float32, sharding=split) for shape in shapes]
    for solver in (
        Refitted(0.5, None, "sparsegpt", 8, 0.01),
        ColumnSolver(0.5, (2, 4), None, 0.01),
    ):
        run = jax.jit(
            lambda *given, solver=solver: batch.split(solver, mesh, ("data", "fsdp"), *given)
        )
        text = run.lower(*given).compile().as_text()
        assert "while" in text
        assert not re.search("all-gather|all-reduce|collective|all-to-all|reduce-scatter", text)


@pytest.mark.parametrize("count", [3, 10])
def test_members_are_dealt_to_the_devices(count):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    members = [({"x": np.full((2, 3), at)}, np.float32(at)) for at in range(count)]
    members = jax.device_put(
        members, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    dealt, places = batch.dealt(mesh, *members)
    want = np.minimum(np.arange(8 * -(-count // 8)), count - 1)
    np.testing.assert_array_equal(places, want)
    np.testing.assert_array_equal(dealt["x"][:, 1, 2], want)
    assert {shard.data.shape[0] for shard in dealt["x"].addressable_shards} == {len(want) // 8}
    text = batch.dealt.lower(mesh, *members).compile().as_text()
    assert not re.search("all-gather|all-reduce|collective|all-to-all|reduce-scatter", text)


def test_refusals(directory):
    model = jc.load(directory)
    with pytest.raises(InputError, match="needs calibration data"):
        jc.compress(model, "sparsegpt")
    with pytest.raises(InputError, match=r"embed.*no product reads it"):
        jc.compress(model, "sparsegpt", include="embed*/**", calibration=IDS)
    with pytest.raises(InputError, match="6 samples do not divide over 8 devices; use 8"):
        jc.compress(model, "sparsegpt", calibration=IDS, mesh=jax.make_mesh((8,), ("data",)))
    with pytest.raises(InputError, match="dense_target 2"):
        jc.compress(model, "sparsegpt", calibration=IDS, dense_target=2.0)


def test_thin_statistics_are_told(directory):
    small = jc.compress(jc.load(directory), "sparsegpt", calibration=IDS[:2])
    assert "layers/0/attn/q_proj/kernel: 32 calibration tokens for 64 inputs" in small.notes
