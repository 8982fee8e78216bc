"""lift and capture on a mesh: inside and around shard_map, under jit, with shardings given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lift_cases import affine, check, close, equations, low_rank, normal

from jaxcompress.core.arrays.base import STORED
from jaxcompress.core.arrays.sharding import shardings_of, spec_of
from jaxcompress.core.errors import InputError
from jaxcompress.core.readers.capture import capture
from jaxcompress.core.readers.lift import lift

X = normal(2, 4, 64)


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 2), ("i", "j"), axis_types=(kind,) * 2, devices=jax.devices()[:4])


def named(*spec):
    return NamedSharding(mesh(), P(*spec))


def weight(groups=2, **options):
    return affine(1, 64, 8, groups=groups, **options)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_lift_inside_shard_map(check_vma, groups):
    """A shard of K: the padding is static, K is not."""
    w = weight(groups)
    lifted = lift(lambda p, x: lax.psum(x @ p, "j"))
    f = jax.shard_map(
        lifted,
        mesh=mesh(),
        in_specs=(spec_of(w, P("j", None), mesh()), P("i", "j")),
        out_specs=P("i"),
        check_vma=check_vma,
    )
    close(f(w, X), X @ w.dense(), 1e-4)
    close(jax.jit(f)(w, X), X @ w.dense(), 1e-4)
    assert lifted.materialized() == []


SHARD_MAPS = {
    "row parallel": (
        lambda p, x: lax.psum(x @ p, "j"),
        (P("j", None), P("i", "j")),
        P("i"),
        True,
    ),
    "column parallel": (
        lambda p, x: lax.all_gather(x @ p, "j", axis=1, tiled=True),
        (P(None, "j"), P("i")),
        P("i"),
        False,
    ),
    "weights gathered along their rows": (
        lambda p, x: x @ lax.all_gather(p, "j", axis=1, tiled=True),
        (P(None, "j"), P("i")),
        P("i"),
        False,
    ),
    "weights gathered along their columns": (
        lambda p, x: x @ lax.all_gather(p, "j", axis=0, tiled=True),
        (P("j"), P("i")),
        P("i"),
        False,
    ),
    "both in a scan": (
        lambda p, x: lax.scan(
            lambda c, _: (c + 0.01 * lax.psum(x @ p, "j") @ jnp.ones((8, 8)), None),
            jnp.zeros((x.shape[0], 8)) + lax.psum(x, "j").sum() * 0,
            None,
            length=2,
        )[0],
        (P("j", None), P("i", "j")),
        P("i"),
        False,
    ),
}


@pytest.mark.parametrize("name", SHARD_MAPS)
@pytest.mark.parametrize("groups", [1, 2])
def test_shard_map_inside_lift(name, groups):
    local, in_specs, out_specs, check_vma = SHARD_MAPS[name]

    def f(p, x):
        return jax.shard_map(
            local, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
        )(p, x)

    check(f, weight(groups), X, tol=1e-4, gradients=check_vma)


def test_numpy_beside_a_compressed_array_enters_shard_map():
    offset = np.arange(8.0, dtype=np.float32)  # has a method `partition`

    def f(p, x):
        return jax.shard_map(
            lambda p, x: x @ p + offset, mesh=mesh(), in_specs=(P(), P("i")), out_specs=P("i")
        )(p, x)

    w, x = weight(), np.asarray(X)
    close(lift(f)(w, x), x @ w.dense() + offset, 1e-4)
    close(jax.jit(lambda p: lift(f)(p, x))(w), x @ w.dense() + offset, 1e-4)


def test_generic_arrays_inside_shard_map():
    def f(p, x):
        def local(p, x):
            return lax.psum(x @ p @ p.T @ p, "i")

        return jax.shard_map(
            local, mesh=mesh(), in_specs=(P(), P("i")), out_specs=P(None), check_vma=True
        )(p, x)

    check(f, low_rank(1, 8, 64), X, tol=1e-2, gradients=False)
    # Large enough for a loop whose carry must vary as its operands do.
    big = low_rank(1, 640, 512)
    loop = lift(lambda p, x: f(p.astype(jnp.float32), x))
    close(loop(big, normal(3, 4, 512)) / 1e5, f(big.dense(), normal(3, 4, 512)) / 1e5, 1e-2)


def test_a_spec_that_cuts_through_a_group_is_recorded():
    def f(p, x):
        return jax.shard_map(
            lambda p, x: lax.psum(x @ p, "j"),
            mesh=mesh(),
            in_specs=(P("j", None), P("i", "j")),
            out_specs=P("i"),
        )(p, x)

    lifted = lift(f)
    w = affine(1, 96, 8, groups=1)  # three words: two shards cannot share them
    x = normal(2, 4, 96)
    close(lifted(w, x), x @ w.dense(), 1e-4)
    (record,) = lifted.materialized()
    assert "cuts through" in record.reason


def test_explicit_axes():
    explicit = mesh(AxisType.Explicit)
    with jax.set_mesh(explicit):
        w, x = weight(), jax.device_put(X, P("i", None))

        def f(p, x):
            return jnp.tanh(x @ p)

        ours, theirs = jax.jit(lift(f))(w, x), jax.jit(f)(w.dense(), x)
        close(ours, theirs)
        assert ours.sharding == theirs.sharding


@pytest.mark.parametrize("layout", ["canonical", "tpu"])
@pytest.mark.parametrize("spec", [P(None, "j"), P("j", None)])
@pytest.mark.parametrize("given", [True, False])
def test_explicit_axes_tell_the_partition(spec, given, layout):
    explicit = mesh(AxisType.Explicit)
    w, sharding = weight().with_layout(layout), NamedSharding(explicit, spec)
    with jax.set_mesh(explicit):
        placed = jax.device_put(w, shardings_of(w, sharding))
        x = jax.device_put(X, P("i", None))
        shardings = (sharding, NamedSharding(explicit, P("i"))) if given else None
        lifted = lift(lambda p, x: jnp.tanh(x @ p), shardings=shardings)
        y = jax.jit(lifted)(placed, x)
        close(y, jnp.tanh(X @ w.dense()), 1e-4)
        assert y.sharding.spec[0] == "i"
        closed = jax.make_jaxpr(lifted)(placed, x)
        assert [e.primitive.name for e in equations(closed.jaxpr)].count("shard_map") == 1
        close(lifted(placed, x), y)
        gradient = jax.jit(jax.grad(lambda x: (lifted(placed, x) ** 2).sum()))(x)
    dense = w.dense()
    close(gradient, jax.grad(lambda x: (jnp.tanh(x @ dense) ** 2).sum())(X), 1e-3)


def test_auto_axes_and_constraints():
    w = weight()
    placed = jax.device_put(w, shardings_of(w, named("j", "i")))

    def f(p, x):
        p = lax.with_sharding_constraint(p, named("j", "i"))
        return lax.with_sharding_constraint(x @ p, named("i"))

    lifted = lift(f)
    close(jax.jit(lifted)(placed, X), X @ w.dense(), 1e-4)
    assert lifted.materialized() == []
    jaxpr = jax.make_jaxpr(lift(f))(w, X).jaxpr
    constrained = [
        str(e.params["sharding"].spec)
        for e in equations(jaxpr)
        if e.primitive.name == "sharding_constraint"
    ]
    assert len(constrained) == 3  # codes, scale, and the result


def test_shardings_and_donation_of_a_nested_jit():
    f = jax.jit(
        lambda p, x: x @ p,
        in_shardings=(named("j", "i"), named("i", "j")),
        out_shardings=named("i", None),
        donate_argnums=1,
    )
    lifted = lift(lambda p, x: f(p, x))
    eqns = jax.make_jaxpr(lifted)(weight(), X).eqns
    (call,) = [e for e in eqns if e.primitive.name == "jit"]
    assert call.params["donated_invars"] == (False, False, True)
    y = jax.jit(lifted)(weight(), X)
    close(y, X @ weight().dense(), 1e-4)
    assert y.sharding.is_equivalent_to(named("i", None), 2)


PLACES = {
    "column parallel": P(None, "j"),
    "row parallel": P("j", None),
    "both": P("j", "i"),
    "over both axes": P(None, ("i", "j")),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", ["canonical", "tpu"])
def test_shardings_given_make_products_parallel(place, layout):
    w = weight().with_layout(layout)
    sharding = NamedSharding(mesh(), PLACES[place])
    placed = jax.device_put(w, shardings_of(w, sharding))

    def f(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    lifted = lift(f, shardings=({"w": sharding}, named("i")))
    x = jax.device_put(X, named("i"))
    expected = f({"w": w.dense()}, X)
    close(jax.jit(lifted)({"w": placed}, x), expected, 1e-3)
    close(lifted({"w": placed}, x), expected, 1e-3)
    names = [eqn.primitive.name for eqn in equations(jax.make_jaxpr(lifted)({"w": w}, X).jaxpr)]
    assert names.count("shard_map") == 2

    def loss(s, x, fn, make):
        return (fn({"w": make(s)}, x) ** 2).sum()

    canonical = w.with_layout("canonical")
    ours = jax.jit(jax.grad(lambda s, x: loss(s, x, lifted, lambda s: w.replace(scale=s)), (0, 1)))(
        w.scale, X
    )
    theirs = jax.grad(
        lambda s, x: loss(s, x, f, lambda s: canonical.replace(scale=s).dense()), (0, 1)
    )(canonical.scale, X)
    if layout == "tpu":
        theirs = (jnp.swapaxes(theirs[0], -1, -2)[..., None, :], theirs[1])
    close(ours, theirs, 5e-2)


def test_fully_sharded_weights_are_gathered_compressed():
    """A mesh axis over weights and batch: codes are gathered, the product is local."""
    sharding = named(None, "i")
    lifted = lift(lambda p, x: x @ p, shardings=(sharding, named("i")))
    close(jax.jit(lifted)(weight(), X), X @ weight().dense(), 1e-4)
    jaxpr = jax.make_jaxpr(lifted)(weight(), X).jaxpr
    (call,) = [e for e in equations(jaxpr) if e.primitive.name == "shard_map"]
    assert tuple(call.params["out_specs"][0]) == ("i", None)


def test_parallel_products_in_a_scan_and_in_shard_map():
    stack = jax.tree.map(lambda *x: jnp.stack(x), *[affine(i, 64, 64) for i in range(3)])
    sharding = named(None, None, "j")

    def f(p, x):
        return lax.scan(lambda c, q: (jnp.tanh(c @ q), None), x, p)[0]

    lifted = lift(f, shardings=(sharding, named("i")))
    close(jax.jit(lifted)(stack, X), f(stack.dense(), X), 1e-3)
    assert lifted.materialized() == []

    def manual(p, x):
        return jax.shard_map(
            lambda p, x: x @ p, mesh=mesh(), in_specs=(P(None, "j"), P("i")), out_specs=P("i", "j")
        )(p, x)

    lifted = lift(manual, shardings=(named(None, "j"), named("i")))
    close(lifted(weight(), X), X @ weight().dense(), 1e-4)


def test_a_stored_embedding_and_head():
    table = affine(1, 40, 64, dims=STORED)
    lifted = lift(lambda p, x: (p[jnp.array([1, 3])] + x[:2]) @ p.T, shardings=named("j", None))
    close(
        jax.jit(lifted)(table, X),
        (table.dense()[jnp.array([1, 3])] + X[:2]) @ table.dense().T,
        1e-3,
    )
    assert lifted.materialized() == []


def test_pmap_and_named_psum():
    w = weight()
    lifted = lift(lambda p, x: lax.psum(x @ p, "i"))
    y = jax.vmap(lifted, (None, 0), axis_name="i")(w, X.reshape(2, 2, 64))
    close(y[0], (X @ w.dense()).reshape(2, 2, 8).sum(0), 1e-4)


# ------------------------------------------------------------------------------ capture

W = normal(3, 64, 8)
XTX = np.asarray(X).T @ np.asarray(X)


def moments(f, w=W, x=X, **kwargs):
    return jax.jit(lambda w, x: capture(f, "second_moment")(w, x, **kwargs))(w, x)["", 0]


def test_capture_sums_over_the_data_axis():
    placed = jax.device_put(X, named("i"))
    s = moments(lambda p, x: x @ p, x=placed)
    close(s["second_moment"], XTX, 1e-3)


CAPTURED = {
    "data parallel": (lambda p, x: x @ p, (P(), P("i")), P("i")),
    "data parallel over both": (lambda p, x: x @ p, (P(), P(("i", "j"))), P(("i", "j"))),
    "column parallel": (lambda p, x: x @ p, (P(None, "j"), P("i")), P("i", "j")),
    "row parallel": (lambda p, x: lax.psum(x @ p, "j"), (P("j"), P("i", "j")), P("i")),
    "row parallel in jit": (
        lambda p, x: jax.jit(lambda p, x: lax.psum(x @ p, "j"))(p, x),
        (P("j"), P("i", "j")),
        P("i"),
    ),
}


@pytest.mark.parametrize("name", CAPTURED)
@pytest.mark.parametrize("check_vma", [True, False])
def test_capture_inside_shard_map_counts_every_row_once(name, check_vma):
    """Replicated rows are not counted twice, and split features are gathered."""
    local, in_specs, out_specs = CAPTURED[name]

    def f(p, x):
        return jax.shard_map(
            local, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
        )(p, x)

    s = moments(f)
    assert s["count"] == 4
    close(s["second_moment"], XTX, 1e-3)


def test_a_mask_does_not_go_through_a_split():
    def f(p, x):
        return jax.shard_map(
            lambda p, x: x @ p, mesh=mesh(), in_specs=(P(), P("i")), out_specs=P("i")
        )(p, x)

    with pytest.raises(InputError, match="shard_map"):
        moments(f, token_mask=jnp.ones(4))

    def inside(p, x, m):
        found = capture(lambda p, x: x @ p, "second_moment")(p, x, token_mask=m)
        return jax.tree.map(lambda s: lax.psum(s, "i"), found)["", 0]

    mask = jnp.array([1, 0, 1, 1])
    s = jax.shard_map(inside, mesh=mesh(), in_specs=(P(), P("i"), P("i")), out_specs=P())(
        W, X, mask
    )
    kept = np.asarray(X)[np.asarray(mask) > 0]
    close(s["second_moment"], kept.T @ kept, 1e-3)
