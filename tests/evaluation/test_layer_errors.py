"""Rows of per-layer errors against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.core.arrays.base import dense
from jaxcompress.core.arrays.training import Masked
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.evaluation.layers import layer_errors


def drawn(*sizes, seed=0):
    return np.random.default_rng(seed).normal(size=sizes).astype(np.float32)


def sqnr(before, after):
    w, changed = np.asarray(before, np.float64), np.asarray(dense(after), np.float64)
    return 10 * np.log10((w**2).sum() / ((w - changed) ** 2).sum())


def network(layers=4, stacked=False):
    blocks = [
        {
            "up": {"kernel": jnp.asarray(drawn(64, 96, seed=10 * i))},
            "down": {"kernel": jnp.asarray(drawn(96, 64, seed=10 * i + 1))},
            "norm": {"scale": jnp.ones(64)},
        }
        for i in range(layers)
    ]
    tree = {str(i): block for i, block in enumerate(blocks)}
    if stacked:
        tree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return {"embed": jnp.asarray(drawn(50, 64, seed=99)), "layers": tree}


@pytest.mark.parametrize("stacked", [False, True])
def test_quantized_leaves(stacked):
    before = network(stacked=stacked)
    after = jc.quantize(before, bits=4, group_size=32)
    rows = {row["path"]: row for row in layer_errors(before, after, what="rtn")}
    old, new = dict(leaves_with_paths(before)), dict(leaves_with_paths(after))
    assert set(rows) == {path for path in old if path.endswith("kernel")}
    for path, row in rows.items():
        assert row["sqnr_db"] == pytest.approx(sqnr(old[path], new[path]), abs=1e-4)
        assert row["shape"] == list(old[path].shape)
        assert row["what"] == "rtn, int4 g32"
        assert row["bytes"] == new[path].nbytes
        assert row["bits"] == 8 * new[path].nbytes / old[path].size
        zeros = 1 - np.count_nonzero(new[path].dense()) / old[path].size
        assert row["sparsity"] == pytest.approx(zeros)
        assert row["seconds"] is None


def test_pruned_then_masked_leaves():
    before = network(layers=1)
    kernel = np.array(before["layers"]["0"]["up"]["kernel"])
    mask = np.abs(kernel) > 0.7
    after = jax.tree.map(lambda x: x, before)
    after["layers"]["0"]["up"]["kernel"] = jnp.asarray(kernel * mask)
    (row,) = layer_errors(
        before, after, what="magnitude", told={"layers/0/up/kernel": {"seconds": 1.5}}
    )
    assert row["sqnr_db"] == pytest.approx(sqnr(kernel, kernel * mask), abs=1e-4)
    assert row["sparsity"] == pytest.approx(1 - mask.mean())
    assert row["seconds"] == 1.5
    assert row["bits"] == 32
    masked = jax.tree.map(lambda x: x, after)
    leaf = Masked(jnp.asarray(kernel.T), jnp.asarray(mask.T))
    masked["layers"]["0"]["up"]["kernel"] = leaf
    (row,) = layer_errors(after, masked)
    assert row["what"] == "Masked, values unchanged"
    assert row["sqnr_db"] is None


def test_bits_are_of_what_will_be_stored():
    before = network(layers=1)
    masters = jax.tree.map(lambda x: 1.25 * x, before)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), before)
    alone, stored = layer_errors(before, masters), layer_errors(before, masters, stored=shapes)
    for a, b in zip(alone, stored, strict=True):
        assert (a["bits"], b["bits"]) == (32, 16)
        assert b["bytes"] == 2 * np.prod(b["shape"])
        assert b["sqnr_db"] == a["sqnr_db"] == pytest.approx(20 * np.log10(4), abs=1e-4)


def test_why_there_is_no_number_is_told():
    before = {"zeros": np.zeros(4), "infinite": np.ones(4), "nan": np.ones(4)}
    after = {"zeros": np.ones(4), "infinite": np.full(4, np.inf), "nan": np.full(4, np.nan)}
    rows = {row["path"]: row for row in layer_errors(before, after)}
    why = {"zeros": "all zeros before", "infinite": "not finite", "nan": "not finite"}
    assert {path: row["what"] for path, row in rows.items()} == why
    assert {row["sqnr_db"] for row in rows.values()} == {None}


def test_nothing_changed_is_no_row():
    before = network()
    assert layer_errors(before, before) == []
    assert layer_errors(before, jax.tree.map(np.asarray, before)) == []


def without(params, *gone):
    left = [block for i, block in params["layers"].items() if int(i) not in gone]
    return {**params, "layers": {str(i): block for i, block in enumerate(left)}}


def test_blocks_that_moved_up_are_compared_with_themselves():
    before = network()
    after = without(before, 1)
    after = jax.tree.map(jnp.array, after)  # as from a checkpoint: no leaf is the same object
    rows = layer_errors(before, after, what="depth")
    moved = {row["path"]: row for row in rows if row["bytes"]}
    for i, was in ((1, 2), (2, 3)):
        words = f"depth, values unchanged, was layers/{was}/up/kernel"
        assert moved[f"layers/{i}/up/kernel"]["what"] == words
    assert len(moved) == 6
    removed = [row for row in rows if not row["bytes"]]
    assert [row["path"] for row in removed] == [
        "layers/1/down/kernel",
        "layers/1/norm/scale",
        "layers/1/up/kernel",
    ]
    assert {row["what"] for row in removed} == {"depth, removed"}


def test_blocks_without_a_counterpart_are_not_compared():
    before = network()
    trained = jax.tree.map(lambda x: x + 0.01, without(before, 1))
    rows = {row["path"]: row for row in layer_errors(before, trained)}
    assert rows["layers/0/up/kernel"]["what"] == "no counterpart before"
    assert rows["layers/0/up/kernel"]["sqnr_db"] is None
    assert rows["layers/3/up/kernel"]["what"] == "removed"
    assert rows["embed"]["sqnr_db"] == pytest.approx(
        sqnr(before["embed"], trained["embed"]), abs=1e-3
    )


def test_a_stack_that_lost_a_layer_says_its_shape():
    before = network(stacked=True)
    after = {**before, "layers": jax.tree.map(lambda x: x[1:], before["layers"])}
    rows = {row["path"]: row for row in layer_errors(before, after, what="depth")}
    assert rows["layers/up/kernel"]["what"] == "depth, shape was 4x64x96"
    assert rows["layers/up/kernel"]["sqnr_db"] is None


def test_parameters_on_a_mesh_and_off_it():
    before = network()
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    small = jc.quantize(before, bits=4, group_size=32)
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    placed = jax.tree.map(
        lambda x: jax.device_put(
            x, rows if x.shape[0] % 2 == 0 else jax.NamedSharding(mesh, jax.P())
        ),
        small,
    )
    alone, spread = layer_errors(before, small), layer_errors(before, placed)
    assert [row["path"] for row in alone] == [row["path"] for row in spread]
    for a, b in zip(alone, spread, strict=True):
        assert b["sqnr_db"] == pytest.approx(a["sqnr_db"], abs=1e-4)
        assert {**a, "sqnr_db": 0} == {**b, "sqnr_db": 0}
