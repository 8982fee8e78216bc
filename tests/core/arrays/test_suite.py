"""What holds for every compressed array, class by class. See `suite.py` for who takes part."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from suite import (
    CASES,
    EVERY_AFFINE,
    NUMPY,
    K,
    N,
    matrix_of_case,
    numpy_decode,
    random_matrix,
)

from jaxcompress.core.arrays.base import (
    KERNEL,
    STORED,
    CompressedArray,
    dims_of,
    from_matrix,
    is_compressed,
    to_matrix,
)
from jaxcompress.core.arrays.manifest import abstract, check_manifest, from_manifest, manifest
from jaxcompress.core.arrays.sharding import place, shardings_of, spec_of
from jaxcompress.core.arrays.training import Masked
from jaxcompress.core.errors import InputError
from jaxcompress.core.partition import KINDS, merge, split

each_case = pytest.mark.parametrize("case", CASES, ids=str)
# Every third of them in each run: all widths, with and without a zero point, all granularities.
EACH_AFFINE = [
    case if i % 3 == 0 else pytest.param(case, marks=pytest.mark.slow)
    for i, case in enumerate(EVERY_AFFINE)
]
LEAD = (4, 2)


@functools.cache
def largest(case):
    return case.make(matrix_of_case(LEAD), KERNEL).map(np.asarray)


def made(case, leading=1):
    """The case's array with that many leading axes; its buffers are NumPy's, which slice freely."""
    return largest(case)[(0,) * (len(LEAD) - leading)] if leading < len(LEAD) else largest(case)


@functools.cache
def dense_of(case):
    """The dense array of `largest(case)`."""
    return np.asarray(jax.jit(lambda leaf: leaf.dense())(largest(case)))


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("four", "two"))


def assert_trees_equal(mine, theirs):
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


def assert_decodes_to(case, mine, theirs):
    if case.exact:
        np.testing.assert_array_equal(mine, theirs)
    else:
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("case", CASES + EACH_AFFINE, ids=str)
def test_the_buffers_mean_what_numpy_reads_and_are_encoded_again_alike(case):
    leaf = case.make(matrix_of_case(), KERNEL)
    assert (leaf.rows, leaf.contracted, leaf.lead, leaf.shape) == (N, K, (), (K, N))
    decoded = leaf.decode()
    assert decoded.dtype == leaf.dtype == jnp.float32
    assert_decodes_to(case, decoded, numpy_decode(leaf))
    if case.again is not None:
        assert_trees_equal(case.again(leaf, decoded), leaf)


@each_case
def test_jit_and_leading_axes_change_nothing(case):
    assert_decodes_to(case, dense_of(case), numpy_decode(largest(case)).swapaxes(-1, -2))


@each_case
def test_casts_are_applied_in_order(case):
    leaf = made(case, 0).replace(casts=("bfloat16", "float32"))
    assert leaf.dtype == jnp.float32
    expected = numpy_decode(leaf).astype(jnp.bfloat16).astype(np.float32)
    # Decoded first: inside one jit, XLA may leave out a rounding to bfloat16 and back.
    assert_decodes_to(case, leaf.map(jnp.asarray).matrix(), expected)
    assert jax.eval_shape(leaf.replace(casts=("bfloat16",)).dense).dtype == jnp.bfloat16


@functools.cache
def small(case):
    return case.make(random_matrix(6, 40), KERNEL)


@each_case
def test_columns_that_fill_no_whole_word(case):
    leaf = small(case)
    assert leaf.contracted == 40
    assert_decodes_to(case, leaf.decode(), numpy_decode(leaf))


# (dims, dense shape, axes of the matrix split into [n..., k...] in the dense order)
LAYOUTS = {
    "in-out": (KERNEL, (K, N), lambda m: m.T),
    "out-in": (STORED, (N, K), lambda m: m),
    "hwio": (
        dims_of((2, 4, 32, N), (0, 1, 2)),
        (2, 4, 32, N),
        lambda m: m.reshape(N, 2, 4, 32).transpose(1, 2, 3, 0),
    ),
    "in-heads": (
        dims_of((K, 2, 8), (0,)),
        (K, 2, 8),
        lambda m: m.reshape(2, 8, K).transpose(2, 0, 1),
    ),
    "heads-out": (
        dims_of((8, 32, N), (0, 1)),
        (8, 32, N),
        lambda m: m.reshape(N, 8, 32).transpose(1, 2, 0),
    ),
}


@each_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_dense_axes_lie_as_dims_say(case, layout):
    dims, shape, arrange = LAYOUTS[layout]
    leaf = made(case, 0).replace(dims=dims)
    matrix = dense_of(case)[0, 0].T
    assert leaf.shape == shape
    assert jax.eval_shape(leaf.dense).shape == shape
    dense = from_matrix(jnp.asarray(matrix), dims)
    np.testing.assert_array_equal(dense, arrange(matrix))
    np.testing.assert_array_equal(to_matrix(dense, dims), matrix)


@each_case
def test_bytes_are_those_of_the_buffers(case):
    leaf = made(case)
    assert leaf.nbytes == sum(np.asarray(x).nbytes for x in jax.tree.leaves(leaf))


# ---------------------------------------------------------------------------- leading axes


@each_case
def test_leading_axes_are_indexed_sliced_and_stacked(case):
    leaf, dense = largest(case), dense_of(case)

    @jax.jit
    def parts(leaf):
        return leaf[1].dense(), leaf[1, 0].dense(), leaf[:, 1:].dense(), leaf[None].dense()

    wanted = dense[1], dense[1, 0], dense[:, 1:], dense[None]
    for mine, part in zip(parts(leaf), wanted, strict=True):
        assert mine.shape == part.shape
        assert_decodes_to(case, mine, part)
    with pytest.raises(IndexError, match="leading axes"):
        leaf[0, 0, 0]
    assert len(leaf) == LEAD[0]
    assert_trees_equal(jax.tree.map(lambda *each: jnp.stack(each), *leaf), leaf)
    assert jax.tree.structure(leaf) == jax.tree.structure(leaf[0, 0])


@each_case
def test_scan_and_vmap_slice_it(case):
    leaf, dense = largest(case), dense_of(case)

    def step(carry, layer):
        assert layer.shape == leaf.shape[1:]
        return carry, (layer.dense(), layer)

    @jax.jit
    def run(leaf):
        _, scanned = lax.scan(step, 0, leaf)
        over_both = jax.vmap(jax.vmap(lambda part: part.dense()))(leaf)
        return *scanned, over_both, jax.vmap(lambda part: part.dense(), in_axes=1)(leaf)

    scanned, back, over_both, over_second = run(leaf)
    assert_trees_equal(back, leaf)
    assert_decodes_to(case, scanned, dense)
    assert_decodes_to(case, over_both, dense)
    assert_decodes_to(case, over_second, dense.swapaxes(0, 1))


# -------------------------------------------------------------------------------- products


@each_case
def test_products_and_their_gradients(case):
    leaf = made(case)
    matrix = numpy_decode(leaf).astype(np.float64)
    xs = {"k": random_matrix(LEAD[-1], 3, K, seed=1), "n": random_matrix(LEAD[-1], 3, N, seed=2)}
    others = {"k": matrix.swapaxes(-1, -2), "n": matrix}

    @jax.jit
    def run(leaf, xs):
        y, back = jax.vjp(
            lambda xs: {o: leaf.product(xs[o], o, precision="highest") for o in xs}, xs
        )
        return y, back({"k": xs["n"], "n": xs["k"]})[0]

    y, dx = run(leaf, xs)
    for over, other in others.items():
        x = case.rounds(xs[over]) if over == "k" else xs[over]
        np.testing.assert_allclose(y[over], x @ other, rtol=2e-4, atol=2e-4)
        g = xs["n" if over == "k" else "k"]
        np.testing.assert_allclose(dx[over], g @ other.swapaxes(-1, -2), rtol=2e-4, atol=2e-4)


# -------------------------------------------------------------------------------- sharding


def spec_for(leaf):
    """Rows over "four", columns over "two" where the class can, of the dense `[L, K, N]`."""
    return P(None, "two" if leaf.column_unit else None, "four")


@each_case
def test_every_shard_decodes_to_its_part_of_the_dense_array(case, mesh):
    leaf = made(case)
    spec = spec_for(leaf)
    placed = place({"w": leaf}, {"w": NamedSharding(mesh, spec)})["w"]
    specs = spec_of(placed, spec, mesh)
    for buffer, wanted in zip(jax.tree.leaves(placed), jax.tree.leaves(specs, is_leaf=is_spec)):
        assert buffer.sharding.spec == wanted

    def decode(part):
        assert part.rows == N // 4
        return part.dense()

    mapped = jax.shard_map(decode, mesh=mesh, in_specs=(specs,), out_specs=spec)
    assert_decodes_to(case, jax.jit(mapped)(placed), dense_of(case)[0])


def is_spec(x):
    return isinstance(x, P)


@each_case
def test_the_leading_axis_is_sharded(case, mesh):
    leaf = largest(case)
    placed = place(leaf, NamedSharding(mesh, P("four", "two")))
    for mine, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(leaf), strict=True):
        assert mine.sharding.shard_shape(mine.shape)[:2] == (1, 1)
        np.testing.assert_array_equal(mine, theirs)


@each_case
def test_a_k_shard_that_cuts_a_word_or_a_group_is_refused(case, mesh):
    leaf = small(case)
    if leaf.column_unit == 1:
        pytest.skip("stored column by column")
    with pytest.raises(InputError, match=r"layer/w \(.*40 contracted columns.*8 shards") as caught:
        shardings_of({"layer": {"w": leaf}}, NamedSharding(mesh, P(("four", "two"))))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ checkpoints


@each_case
def test_orbax_restores_it_onto_another_sharding(case, mesh, tmp_path):
    leaf = made(case)
    params = {"layers": [{"w": leaf, "bias": jnp.arange(4.0)}]}
    saved = json.loads(json.dumps(manifest(params)))
    everywhere = NamedSharding(mesh, P())
    by_rows = {"layers": [{"w": NamedSharding(mesh, spec_for(leaf)), "bias": everywhere}]}
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "c", place(params, by_rows))
    checkpointer.wait_until_finished()

    target = abstract(saved)
    check_manifest(target, saved)
    other = NamedSharding(mesh, P("two", None, None))
    shardings = shardings_of(target, {"layers": [{"w": other, "bias": everywhere}]})
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), target, shardings
    )
    restored = checkpointer.restore(tmp_path / "c", target)
    assert_trees_equal(restored, params)
    for buffer, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(shardings)):
        assert buffer.sharding.is_equivalent_to(sharding, buffer.ndim)

    plain = checkpointer.restore(tmp_path / "c")
    assert not any(map(is_compressed, jax.tree.leaves(plain, is_leaf=is_compressed)))
    assert_trees_equal(from_manifest(saved, plain), params)

    wrong = {"layers": [{"w": leaf.replace(casts=("bfloat16",)), "bias": jnp.arange(4.0)}]}
    with pytest.raises(InputError, match="layers/0/w: casts is"):
        check_manifest(wrong, saved)


# --------------------------------------------------------------------------------- training


@each_case
def test_what_trains_moves_and_the_rest_keeps_its_bits(case):
    params = {"w": made(case).map(jnp.array), "bias": jnp.ones((2, 1, N))}
    before = jax.tree.map(np.array, params)
    x = jnp.asarray(random_matrix(2, 3, K, seed=1))
    trainable, frozen = split(params)
    assert_trees_equal(merge(trainable, frozen), params)
    # Squares of small gradients vanish in float16 scales.
    adam = optax.adamw(case.rate, eps=1e-4, weight_decay=0.1)
    optimizer = optax.MultiSteps(adam, every_k_schedule=2)

    @jax.jit
    def loss(trainable):
        params = merge(trainable, frozen)
        return jnp.sum((x @ params["w"].dense() + params["bias"]) ** 2) / K

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, state):
        gradients = jax.grad(loss)(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state

    first = loss(trainable)
    given, state = jax.tree.leaves(trainable), optimizer.init(trainable)
    held_at_first = [np.array(x) for x in given]
    trainable, state = step(trainable, state)
    assert all(x.is_deleted() for x in given)
    for now, then in zip(jax.tree.leaves(trainable), held_at_first, strict=True):
        np.testing.assert_array_equal(now, then)  # the first of two accumulated steps
    for _ in range(3):
        trainable, state = step(trainable, state)
    assert loss(trainable) < first
    after = merge(trainable, frozen)
    trained = jax.tree.leaves(split(before)[0])
    for now, then in zip(jax.tree.leaves(trainable), trained, strict=True):
        assert now.dtype == then.dtype
        assert np.any(np.asarray(now) != then)
    for now, then in zip(jax.tree.leaves(frozen), jax.tree.leaves(split(before)[1]), strict=True):
        assert now.dtype == then.dtype
        np.testing.assert_array_equal(now, then)
    if isinstance(params["w"], Masked):
        assert not np.any(np.asarray(after["w"].decode())[~before["w"].mask])


def test_the_suite_knows_every_class():
    classes = {type(node) for case in CASES for node in nodes(largest(case))}
    ours = {
        c for c in CompressedArray.__subclasses__() if c.__module__.startswith("jaxcompress.core.")
    }
    assert classes == ours == set(NUMPY)


def nodes(leaf):
    inner = [n for x in leaf.buffers.values() if is_compressed(x) for n in nodes(x)]
    return [leaf, *inner]


@each_case
def test_integers_never_train_and_kinds_are_disjoint(case):
    params = {"w": made(case), "bias": jnp.ones(3), "step": jnp.zeros((), jnp.int32)}
    trainable, frozen = split(params)
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(trainable))
    assert frozen["step"] is params["step"]
    alone = [split(params, {kind, "dense"})[0] for kind in KINDS]
    counts = [len(jax.tree.leaves(part["w"])) for part in alone]
    assert sum(counts) == len(jax.tree.leaves(trainable["w"]))
    learnable = [
        jnp.issubdtype(x.dtype, jnp.floating)
        for node in nodes(params["w"])
        for name in node.trains
        for x in jax.tree.leaves(node.buffers.get(name))
    ]
    assert bool(sum(counts)) == any(learnable)
