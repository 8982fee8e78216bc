"""The column solver against the papers' loops in NumPy float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import solver_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.core.errors import InputError
from jaxcompress.layerwise import Grid, IntegerGrid, solve
from jaxcompress.layerwise.solver import _solve

# The largest weight of a symmetric group lies on a tie between two codes, which float32 and
# float64 may break differently: both sides widen their scales, to compare codes.
NUDGE = 1 + 1e-4


@dataclasses.dataclass(frozen=True)
class Wider(IntegerGrid):
    def find(self, weight, share):
        scale, zero = super().find(weight, share)
        return scale * NUDGE, zero


def compare(weight, moment, *, bits=None, group=None, symmetric=True, static=True, **options):
    """Solves both ways; the same entries but for a few that float32 rounds otherwise."""
    grids = {}
    if bits:
        grids["grid"] = Wider(bits, group, symmetric, static)
    got = solve(jnp.asarray(weight), jnp.asarray(moment), **grids, **options)
    if bits:
        grids["grid"] = oracle.Integers(bits, symmetric, NUDGE)
        options = {**options, "group": group, "static": static}
        if not static and group and group > 32:
            options["block"] = group
    want, mask = oracle.solve(weight, moment, **grids, **options)
    result = np.asarray(got.weight)
    assert np.mean(np.abs(result - want) > 1e-4 * np.abs(weight).max()) < 5e-3
    errors = [oracle.error(weight, q, moment) for q in (result, want)]
    assert errors[0] == pytest.approx(errors[1], rel=5e-3)
    if got.mask is None:
        assert mask.all()
    else:
        assert np.mean(np.asarray(got.mask) != mask) < 5e-3
        assert not result[~np.asarray(got.mask)].any()
    return got


CASES = [
    {"bits": 4, "group": 32},
    {"bits": 3, "group": 80, "symmetric": False},
    {"bits": 4, "symmetric": False},
    {"bits": 4, "group": 32, "act_order": True},
    {"bits": 4, "group": 16, "static": False},
    {"bits": 4, "group": 80, "static": False, "symmetric": False},
    {"bits": 2, "group": 160, "static": False},
    {"n_m": (2, 4)},
    {"n_m": (1, 5)},
    {"n_m": (4, 8), "bits": 4, "group": 32},
    {"n_m": (2, 4), "bits": 4, "group": 80, "static": False, "symmetric": False},
    {"n_m": (2, 4), "act_order": True},
    {"n_m": (2, 4), "bits": 4, "group": 32, "act_order": True},
    {"n_m": (4, 8), "bits": 3, "group": 80, "symmetric": False, "act_order": True},
    {"sparsity": 0.5},
    {"sparsity": 0.7, "act_order": True},
    {"sparsity": 0.5, "bits": 4},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_papers_loop(case):
    weight, moment = oracle.problem(0, 24, 160, dead=3)
    got = compare(weight, moment, **case)
    assert not np.asarray(got.weight)[:, np.diag(moment) == 0].any()
    if "n_m" in case:
        n, m = case["n_m"]
        assert (np.asarray(got.mask).reshape(24, -1, m).sum(-1) == n).all()


@settings(max_examples=6)
@given(
    st.integers(1, 20),
    st.integers(2, 300),
    st.floats(0.01, 0.99),
    st.sampled_from([16, 48, 128]),
    st.integers(0, 99),
)
def test_removes_exactly_what_was_asked_whatever_the_shape(rows, columns, sparsity, block, seed):
    weight, moment = oracle.problem(seed, rows, columns)
    got = compare(weight, moment, sparsity=sparsity, block=block)
    assert int((~np.asarray(got.mask)).sum()) == int(sparsity * rows * columns)


def test_half_of_equal_weights_is_exactly_half():
    weight, moment = jnp.ones((7, 33)), jnp.eye(33)
    got = solve(weight, moment, sparsity=0.5)
    assert int((got.weight == 0).sum()) == 7 * 33 // 2


def test_a_given_mask_is_kept_and_made_up_for():
    weight, moment = oracle.problem(1, 24, 96)
    keep = np.random.default_rng(0).random(weight.shape) < 0.5
    got = compare(weight, moment, keep=keep)
    np.testing.assert_array_equal(np.asarray(got.mask), keep)
    assert oracle.error(weight, got.weight, moment) < 0.9 * oracle.error(
        weight, weight * keep, moment
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, None), (4, 32), (8, 96)])
def test_the_result_is_codes_of_its_grid(bits, group, symmetric):
    weight, moment = oracle.problem(2, 12, 96)
    grid = IntegerGrid(bits, group, symmetric)
    got = solve(jnp.asarray(weight), jnp.asarray(moment), grid=grid, n_m=(2, 4))
    encoded = grid.encode(got.weight, got.parameters, got.share)
    assert encoded.scale.shape == (12, 96 // (group or 96))
    np.testing.assert_array_equal(np.asarray(encoded.dense()), np.asarray(got.weight))
    assert len(np.unique(np.asarray(got.weight)[0] / np.asarray(encoded.scale)[0, 0])) > 1


@dataclasses.dataclass(frozen=True)
class PowersOfTwo(Grid):
    """A grid of one's own: 0 and 2^e times the largest weight of a group, e = 0 .. -3."""

    group_size: int | None = 48
    static: bool = True

    def find(self, weight, share):
        return jnp.max(jnp.abs(weight), axis=1)

    def snap(self, weight, top):
        steps = jnp.clip(jnp.round(-jnp.log2(jnp.abs(weight) / top)), 0, 3)
        return jnp.where(jnp.abs(weight) < top / 12, 0, jnp.sign(weight) * top * 2.0**-steps)


@dataclasses.dataclass
class PowersOfTwo64:
    def find(self, weight):
        return np.abs(weight).max(1)

    def snap(self, weight, top):
        steps = np.clip(np.round(-np.log2(np.abs(weight) / top)), 0, 3)
        return np.where(np.abs(weight) < top / 12, 0, np.sign(weight) * top * 2.0**-steps)


def test_any_grid_serves():
    weight, moment = oracle.problem(3, 16, 96)
    got = solve(jnp.asarray(weight), jnp.asarray(moment), grid=PowersOfTwo())
    want, _ = oracle.solve(weight, moment, grid=PowersOfTwo64(), group=48)
    assert np.mean(np.abs(np.asarray(got.weight) - want) > 1e-5) < 1e-2
    assert got.parameters.shape == (16, 2)


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_the_scale_of_the_moment_does_not_matter(factor):
    weight, moment = map(jnp.asarray, oracle.problem(4, 16, 96, dead=2))
    one, other = (solve(weight, m, n_m=(2, 4)).weight for m in (moment, moment * factor))
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("damp", [0.0, 1e-9])
def test_a_singular_moment_gets_as_much_damping_as_it_needs(damp):
    weight, moment = oracle.problem(5, 16, 96, dead=8, tokens=20)
    got = solve(jnp.asarray(weight), jnp.asarray(moment), sparsity=0.5, damp=damp)
    assert 0.99e-6 < float(got.damp) <= 1e-2
    assert np.isfinite(np.asarray(got.weight)).all()
    assert oracle.error(weight, got.weight, moment) < 0.05 * oracle.error(weight, 0, moment)


def test_a_moment_that_is_not_finite_ends():
    weight, moment = oracle.problem(5, 4, 32)
    moment[3, 3] = np.nan
    assert np.isnan(np.asarray(solve(jnp.asarray(weight), jnp.asarray(moment)).weight)).any()


def test_nothing_to_do_gives_the_weights_back():
    weight, moment = map(jnp.asarray, oracle.problem(6, 8, 40))
    got = solve(weight, moment)
    assert got.mask is None
    assert got.parameters is None
    np.testing.assert_allclose(np.asarray(got.weight), np.asarray(weight), atol=1e-6)


def batch(count, rows, columns):
    pairs = [oracle.problem(seed, rows, columns) for seed in range(count)]
    return tuple(jnp.stack([jnp.asarray(pair[i]) for pair in pairs]) for i in (0, 1))


def test_a_batch_may_remove_another_count_of_each_matrix():
    weights, moments = batch(3, 8, 40)
    counts = jnp.array([0, 17, 200])
    masks = jax.vmap(lambda w, h, c: solve(w, h, sparsity=c).mask)(weights, moments, counts)
    np.testing.assert_array_equal((~np.asarray(masks)).sum((1, 2)), counts)
    one_by_one = [solve(w, h, sparsity=c).mask for w, h, c in zip(weights, moments, counts)]
    assert np.mean(np.asarray(masks) != np.stack(one_by_one)) < 5e-3


def test_the_program_is_compiled_once_for_all_sparsities_and_dampings():
    weight, moment = map(jnp.asarray, oracle.problem(7, 8, 48))
    solve(weight, moment, sparsity=0.5)
    before = _solve._cache_size()
    solve(weight, moment, sparsity=0.6, damp=0.1)
    assert _solve._cache_size() == before


def lowered(rows, columns, **options):
    shapes = (jax.ShapeDtypeStruct((rows, columns), jnp.float32),)
    shapes += (jax.ShapeDtypeStruct((columns, columns), jnp.float32),)
    return jax.jit(lambda w, h: solve(w, h, **options)).lower(*shapes).as_text()


@pytest.mark.parametrize(
    "options",
    [{"n_m": (2, 4)}, {"sparsity": 0.5}, {"grid": IntegerGrid(), "act_order": True}],
    ids=str,
)
def test_the_program_does_not_grow_with_the_columns(options):
    small, large = (lowered(64, columns, **options) for columns in (512, 4096))
    assert len(small.splitlines()) == len(large.splitlines())
    assert len(large) < 1.1 * len(small)


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.5}, {"n_m": (2, 4), "grid": IntegerGrid(4, 24)}], ids=str
)
def test_a_batch_over_a_mesh_needs_no_collective(options):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    weights, moments = batch(16, 8, 48)

    def on_mesh(function):
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec))

    each = jax.vmap(lambda w, h: solve(w, h, **options).weight)
    compiled = on_mesh(each).lower(weights, moments).compile()
    text = compiled.as_text()
    assert not [name for name in COLLECTIVES if name in text]
    reducing = on_mesh(lambda w, h: w + jax.lax.psum(h.sum(), "x"))
    assert "all-reduce" in reducing.lower(weights, moments).compile().as_text()
    got = np.asarray(compiled(weights, moments))
    want = np.stack([solve(w, h, **options).weight for w, h in zip(weights, moments)])
    assert np.mean(np.abs(got - want) > 1e-5) < 5e-3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_m": (2, 4), "sparsity": 0.5}, "one of"),
        ({"grid": IntegerGrid(4, 8, static=False), "act_order": True}, "static"),
        ({"n_m": (2, 7)}, "does not divide"),
        ({"n_m": (4, 4)}, "0 < n < m"),
        ({"grid": IntegerGrid(4, 7)}, "does not divide"),
        ({"grid": IntegerGrid(4, 10, static=False), "n_m": (2, 4)}, "does not divide"),
        ({"sparsity": 1.0}, "fraction"),
    ],
)
def test_bad_options_get_one_line(options, says):
    with pytest.raises(InputError, match=says):
        solve(jnp.zeros((4, 40)), jnp.eye(40), **options)


def test_bad_grids_get_one_line():
    with pytest.raises(InputError, match="bits"):
        IntegerGrid(9)
    with pytest.raises(InputError, match="group_size"):
        IntegerGrid(4, 0)
