"""Meshes: their sizes, where parameters lie, and how a batch is handed out."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from training_cases import decoder, perceptron

from jaxcompress.core.arrays.affine import encode_affine, minmax_range
from jaxcompress.core.arrays.training import Masked
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.models import ResNetConfig, build_model
from jaxcompress.training import mesh as meshes
from jaxcompress.training.mesh import (
    AXES,
    BATCH,
    check_batch,
    global_batch,
    make_mesh,
    param_shardings,
    param_specs,
    spread,
)


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 2}, (4, 2, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 1, "tensor": -1}, (1, 1, 8)),
    ],
)
def test_one_size_is_what_remains(asked, sizes):
    mesh = make_mesh(**asked)
    assert dict(mesh.shape) == dict(zip(AXES, sizes))
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"fsdp": 3}, "mesh -1 x 3 x 1 .*8 devices; mesh.data=8, mesh.fsdp=1, mesh.tensor=1 fits"),
        ({"data": 4, "fsdp": 4}, "4 x 4 x 1 .*mesh.data=2, mesh.fsdp=4, mesh.tensor=1 fits"),
        ({"data": 2}, "2 x 1 x 1 .*mesh.data=8, mesh.fsdp=1, mesh.tensor=1 fits"),
        ({"tensor": 0}, "mesh.tensor 0: sizes are 1 or more"),
        ({"fsdp": -1}, "mesh.fsdp -1: .*one may be -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_some_that_do(asked, text):
    with pytest.raises(InputError, match=text):
        make_mesh(**asked)


def specs_of(model, *sizes):
    tree = param_specs(model, make_mesh(*sizes))
    return dict(zip((p for p, _ in leaves_with_paths(model.params)), jax.tree.leaves(
        tree, is_leaf=lambda x: isinstance(x, P)
    )))  # fmt: skip


@pytest.mark.parametrize("scan", [False, True])
def test_a_decoder_is_split_by_its_logical_axes(scan):
    specs = specs_of(decoder(scan_layers=scan), 2, 2, 2)
    layer = "layers" if scan else "layers/0"
    first = (None,) if scan else ()
    assert specs["embed/embedding"] == P("tensor", "fsdp")
    assert specs["lm_head/kernel"] == P("fsdp", "tensor")
    assert specs[f"{layer}/attn/k_proj/kernel"] == P(*first, "fsdp", "tensor")
    assert specs[f"{layer}/attn/o_proj/kernel"] == P(*first, "tensor", "fsdp")
    assert specs[f"{layer}/mlp/down_proj/kernel"] == P(*first, "tensor", "fsdp")
    assert specs[f"{layer}/input_norm/scale"] == P(*first, None)


def test_a_head_is_never_split():
    """2 key heads of 8 columns divide by 8 as columns, not as heads."""
    specs = specs_of(decoder(num_key_value_heads=2), 1, 1, 8)
    assert specs["layers/0/attn/k_proj/kernel"] == P("fsdp", None)
    assert specs["layers/0/attn/q_proj/kernel"] == P("fsdp", "tensor")


def test_axes_that_do_not_divide_stay_whole():
    specs = specs_of(decoder(vocab_size=63), 1, 2, 4)
    assert specs["embed/embedding"] == P(None, "fsdp")


def test_one_mesh_axis_splits_one_axis_of_an_array():
    model = decoder()
    specs = param_specs(model, make_mesh(1, 4, 2), {"embed": "fsdp", "mlp": "fsdp"})
    assert specs["layers"]["0"]["mlp"]["up_proj"]["kernel"] == P("fsdp", None)


def test_other_models_are_split_along_their_longest_axis():
    shapes = {"a": (8, 32), "b": (24, 7), "c": (64,), "d": (3, 5)}
    model = Model(lambda params: None, {name: jnp.zeros(s) for name, s in shapes.items()})
    assert specs_of(model, 1, 8, 1) == {
        "a": P(None, "fsdp"),
        "b": P("fsdp", None),
        "c": P(None),
        "d": P(None, None),
    }


def test_a_compressed_leaf_takes_the_splits_that_fit_its_format():
    """64 columns in groups of 32 cut into 2, not into 4: then its rows alone are split."""
    model = decoder()
    kernel = model.params["layers"]["0"]["attn"]["q_proj"]["kernel"]  # [in, out]
    scale, zero = minmax_range(kernel.T, bits=4, groups=2, symmetric=True)
    model.params["layers"]["0"]["attn"]["q_proj"]["kernel"] = encode_affine(
        kernel.T, scale, zero, bits=4
    )
    path = "layers/0/attn/q_proj/kernel"
    assert specs_of(model, 2, 2, 2)[path] == P("fsdp", "tensor")
    assert specs_of(model, 1, 4, 2)[path] == P(None, "tensor")
    found = param_shardings(model, make_mesh(2, 2, 2))["layers"]["0"]["attn"]["q_proj"]["kernel"]
    assert found.codes.spec == P("tensor", "fsdp")
    assert found.scale.spec == P("tensor", "fsdp")


def test_a_mask_lies_where_its_weight_lies():
    model = perceptron()
    weight = model.params["first"]["kernel"].T
    model.params["first"]["kernel"] = Masked(weight, weight > 0)
    mesh = make_mesh(1, 8, 1)
    params = spread(model.params, param_shardings(model, mesh))
    for buffer in jax.tree.leaves(params["first"]["kernel"]):
        assert {shard.data.size for shard in buffer.addressable_shards} == {64 * 64 // 8}


def test_networks_without_rules_are_copied():
    model = build_model(ResNetConfig(model_type="cifar_resnet"))
    assert all(set(spec) <= {None} for spec in specs_of(model, 2, 2, 2).values())


@pytest.mark.parametrize(("rows", "near"), [(10, 12), (1, 12), (30, 24), (31, 36)])
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest(rows, near):
    mesh = SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 2})
    with pytest.raises(InputError, match=f"batch_size {rows}: .*= 12; the nearest .* is {near}"):
        check_batch(rows, mesh, accumulate=3)
    check_batch(24, mesh, accumulate=3)


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = make_mesh(2, 2, 2)
    rows = np.arange(24).reshape(8, 3)
    batch = global_batch({"x": rows}, mesh)["x"]
    assert batch.sharding == NamedSharding(mesh, BATCH)
    np.testing.assert_array_equal(batch, rows)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}


class Device(SimpleNamespace):
    __hash__ = object.__hash__


@pytest.mark.parametrize(
    ("processes", "sizes", "own"),
    [
        (2, (8, 1, 1), True),
        (2, (2, 1, 4), True),
        (8, (2, 4, 1), True),
        (2, (1, 1, 8), False),  # all share one model
        (8, (4, 1, 2), False),  # each pair does
        (4, (1, 2, 4), False),
    ],
)
def test_processes_that_share_a_model_need_the_same_rows(monkeypatch, processes, sizes, own):
    """On devices that are not there: 8 of them, a few to a process."""
    data, fsdp, tensor = sizes
    shards = data * fsdp
    places = {
        Device(process_index=i * processes // 8): (
            slice(i // tensor, i // tensor + 1) if shards > 1 else slice(None),
        )
        for i in range(8)
    }
    sharding = SimpleNamespace(
        mesh=SimpleNamespace(shape=dict(zip(AXES, sizes))),
        devices_indices_map=lambda shape: places,
    )
    assert meshes._has_own_rows.__wrapped__(sharding) == own


def test_spread_leaves_arrays_that_lie_right():
    mesh = make_mesh(4, 2, 1)
    model = decoder()
    shardings = param_shardings(model, mesh)
    once = spread(model.params, shardings)
    twice = spread(once, shardings)
    assert all(a is b for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice)))
    kernel = once["lm_head"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(32, 64)}
