"""Dense PartitionSpecs carried over to buffers: folded axes, layouts, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxcompress.core.arrays.affine import Affine, encode_affine, minmax_range
from jaxcompress.core.arrays.base import KERNEL, STORED, Partition, dims_of
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.arrays.sharding import place, shardings_of, spec_of
from jaxcompress.core.arrays.sparse import NMSparse, UnstructuredSparse
from jaxcompress.core.errors import InputError


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"))


def affine(*shape, group=64, bits=4, dims=KERNEL, symmetric=False, per_tensor=False):
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    scale, zero = minmax_range(
        matrix,
        bits=bits,
        groups=shape[-1] // group,
        symmetric=symmetric,
        per_tensor=per_tensor,
    )
    return encode_affine(matrix, scale, zero, bits=bits, dims=dims)


def test_axes_of_size_one_stay_whole(mesh):
    channel = affine(16, 256, group=256)
    specs = spec_of(channel, P("tensor", "data"), mesh)
    assert (specs.codes, specs.scale, specs.zero_point) == (
        P("data", "tensor"),
        P("data", None),
        P("data", None),
    )
    tensor = affine(16, 256, group=256, per_tensor=True, symmetric=True)
    assert spec_of(tensor, P("tensor", "data"), mesh).scale == P(None, None)
    assert spec_of(jnp.ones((4, 4)), P("data"), mesh) == P("data")
    assert spec_of(channel, P(), mesh).codes == P(None, None)


def test_several_mesh_axes_on_one_dense_axis(mesh):
    leaf = affine(16, 256, group=32)
    assert spec_of(leaf, P(("data", "tensor")), mesh).codes == P(None, ("data", "tensor"))


@pytest.mark.parametrize(
    ("tail", "contracted", "spec", "expected"),
    [
        ((256, 2, 8), (0,), P("tensor", None, None), P(None, "tensor")),
        ((256, 4, 4), (0,), P(None, "data", None), P(("data",), None)),
        ((256, 4, 4), (0,), P(None, "data", "tensor"), P(("data", "tensor"), None)),
        ((256, 1, 16), (0,), P(None, None, "data"), P(("data",), None)),
        ((1, 1, 256, 16), (0, 1, 2), P(None, None, "tensor"), P(None, ("tensor",))),
        ((4, 64, 16), (0, 1), P("data", None, "tensor"), P(("tensor",), ("data",))),
    ],
)
def test_folded_axes(mesh, tail, contracted, spec, expected):
    leaf = affine(16, 256, group=32, dims=dims_of(tail, contracted))
    assert leaf.shape == tail
    specs = spec_of(leaf, spec, mesh)
    assert [entry and tuple(np.atleast_1d(entry)) for entry in specs.codes] == [
        entry and tuple(np.atleast_1d(entry)) for entry in expected
    ]


@pytest.mark.parametrize(
    ("tail", "contracted", "spec", "axis"),
    [
        ((256, 2, 8), (0,), P(None, None, "data"), 2),
        ((2, 2, 64, 16), (0, 1, 2), P(None, "tensor"), 1),
    ],
)
def test_an_axis_folded_behind_another_cannot_be_sharded(mesh, tail, contracted, spec, axis):
    leaf = affine(16, 256, dims=dims_of(tail, contracted))
    with pytest.raises(InputError, match=rf"conv/w \(Affine\): .* shards axis {axis} of .*folded"):
        spec_of(leaf, spec, mesh, "conv/w")


def abstract_affine(k, group):
    """Four bits, four rows, with shapes in the place of buffers."""
    codes = jax.ShapeDtypeStruct((4, k // 8), jnp.int32)
    return Affine(codes, jax.ShapeDtypeStruct((4, k // group), jnp.float32), None)


@given(
    words=st.integers(1, 12),
    groups=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]),
    shards=st.sampled_from([2, 4, 8]),
)
def test_k_is_cut_exactly_where_every_shard_is_whole(words, groups, shards):
    k = 32 * words * 3
    group = k // groups
    if group * groups != k:
        return
    leaf = abstract_affine(k, group)
    mesh = Mesh(np.array(jax.devices()[:shards]), ("x",))
    piece = k / shards
    fits = piece % 32 == 0 and (groups == 1 or piece % group == 0)
    if fits:
        assert spec_of(leaf, P("x"), mesh).codes == P(None, ("x",))
        return
    with pytest.raises(InputError) as caught:
        spec_of(leaf, P("x"), mesh, "a/kernel")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        f"a/kernel (Affine): {k} contracted columns cannot be cut into {shards}"
    )
    if "nearest group size that fits is " in message:
        near = int(message.rsplit(" ", 1)[1])
        spec_of(abstract_affine(k, near), P("x"), mesh)
    else:
        assert piece % 32, "some group size fits every piece of whole words"
    if "cut it into " in message:
        fewer = int(message.split("cut it into ")[1].split(",")[0])
        fewer_mesh = Mesh(np.array(jax.devices()[:fewer]), ("x",))
        spec_of(leaf, P("x"), fewer_mesh)


def test_the_message_names_the_nearest_group(mesh):
    with pytest.raises(InputError) as caught:
        shardings_of(
            {"layers": [{"q": affine(16, 512, group=256)}]}, NamedSharding(mesh, P("data"))
        )
    assert str(caught.value) == (
        "layers/0/q (Affine): 512 contracted columns cannot be cut into 4 shards: a shard must be "
        "a multiple of 256, lcm(32, group size 256); the nearest group size that fits is 128"
    )


def test_other_refusals(mesh):
    sparse = UnstructuredSparse.from_mask(jnp.ones((16, 64)), jnp.ones((16, 64)))
    with pytest.raises(InputError, match="shard its rows instead"):
        spec_of(sparse, P("tensor"), mesh, "w")
    nested = NMSparse.from_mask(
        jnp.ones((16, 64)), jnp.arange(64) % 4 < 2 + jnp.zeros((16, 1)), 2, 4
    )
    with pytest.raises(InputError, match="a shard must be a multiple of 64; shard its rows"):
        spec_of(nested, P("tensor"), mesh)
    with pytest.raises(InputError, match="cuts an axis of 6 entries into 4"):
        spec_of(affine(6, 64), P(None, "data"), mesh)
    with pytest.raises(InputError, match="more entries than the shape"):
        spec_of(affine(6, 64), P(None, None, "data"), mesh)
    low_rank = LowRank(jnp.ones((16, 3)), jnp.ones((3, 63)))
    with pytest.raises(InputError, match="63 contracted columns"):
        spec_of(low_rank, P("tensor"), mesh)


def test_place_tells_affine_parts_how_their_products_are_split(mesh):
    dense_spec = P("tensor", "data")
    params = {
        "q": affine(16, 256),
        "s": Sum.of(LowRank(jnp.ones((16, 3)), jnp.ones((3, 256))), affine(16, 256)),
        "bias": jnp.ones(16),
    }
    by_kernel = NamedSharding(mesh, dense_spec)
    shardings = {"q": by_kernel, "s": by_kernel, "bias": NamedSharding(mesh, P("data"))}
    placed = place(params, shardings, batch=("data",))
    wanted = Partition(mesh, ("data",), ("tensor",), ("data",))
    assert placed["q"].partition == placed["s"].second.partition == wanted
    assert placed["bias"].sharding.spec == P("data")
    # What is placed is what a jit that names these shardings takes.
    run = jax.jit(lambda p: p["q"].dense(), in_shardings=(shardings_of(placed, shardings),))
    np.testing.assert_array_equal(run(placed), params["q"].dense())
    alone = place(placed, SingleDeviceSharding(jax.devices()[0]))
    assert alone["q"].partition is None


def test_every_leaf_gets_its_own_sharding_or_that_of_its_branch(mesh):
    params = {"a": affine(16, 256), "b": {"x": jnp.ones((8, 2)), "y": affine(16, 256)}}
    rows, columns = (NamedSharding(mesh, spec) for spec in (P(None, "data"), P("data", None)))
    own = shardings_of(params, {"a": rows, "b": {"x": columns, "y": columns}})
    assert own["a"].codes.spec == P(("data",), None)
    assert own["b"]["x"].spec == P("data", None)
    assert own["b"]["y"].codes.spec == P(None, ("data",))
    assert shardings_of(params, {"a": rows, "b": columns}) == own
    placed = place(params, {"a": rows, "b": columns})
    assert placed["b"]["y"].codes.sharding == own["b"]["y"].codes
    with pytest.raises(ValueError, match="b"):
        place(params, {"a": rows})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_tpu_layout_and_back(mesh, bits, symmetric):
    leaf = affine(3, 16, 256, bits=bits, symmetric=symmetric)
    params = {"embed": affine(16, 256, dims=STORED), "layers": leaf, "odd": affine(16, 256, bits=3)}
    placed = place(params, NamedSharding(mesh, P()), "tpu", exclude="embed")
    assert [placed[name].layout for name in params] == ["canonical", "tpu", "canonical"]
    there = placed["layers"]
    assert (there.shape, there.rows, there.contracted) == (leaf.shape, 16, 256)
    assert (there.group_size, there.column_unit, there[1].shape) == (64, 64, leaf.shape[1:])
    np.testing.assert_array_equal(there.decode(), leaf.decode())
    np.testing.assert_array_equal(there.integers(), leaf.integers())
    back = place(placed, platform="cpu")["layers"].replace(partition=None)
    assert jax.tree.structure(back) == jax.tree.structure(leaf)
    jax.tree.map(np.testing.assert_array_equal, back, leaf)


def test_shards_in_the_tpu_layout_decode_to_their_part(mesh):
    leaf, spec = affine(4, 16, 256), P(None, "tensor", "data")
    placed = place(leaf, NamedSharding(mesh, spec), "tpu")
    specs = spec_of(placed, spec, mesh)
    assert specs.codes == P(None, ("tensor",), ("data",))
    assert placed.scale.sharding.shard_shape(placed.scale.shape) == (4, 2, 1, 4)
    dense = jax.shard_map(lambda w: w.dense(), mesh=mesh, in_specs=(specs,), out_specs=spec)(placed)
    np.testing.assert_array_equal(dense, leaf.dense())


def test_a_scale_per_tensor_is_spread_over_rows_in_the_tpu_layout():
    leaf = affine(16, 64, group=64, per_tensor=True)
    there = place(leaf, platform="tpu")
    np.testing.assert_array_equal(there.decode(), leaf.decode())
    assert place(there, platform="gpu").scale.shape == (16, 1)


def test_a_layout_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="layout 'tpu': affine codes of 3 bits"):
        affine(16, 64, bits=3).with_layout("tpu")
    with pytest.raises(InputError, match="'canonical' or 'tpu'"):
        affine(16, 64).with_layout("gpu")
