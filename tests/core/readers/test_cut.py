"""A cut network computes what the masked one does; what would not is refused or said."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax

from jaxcompress.core.errors import InputError
from jaxcompress.core.readers.coupling import coupling
from jaxcompress.core.readers.cut import combine, cut, masked, sliced

ZOO = zoo.zoo()
SMALL = ("mlp", "lstm", "grouped", "fused_glu", "flattened", "padded_shortcut", "kv_cache")
# A norm or a softmax over a cut axis: masking is not removing.
INEXACT = {"mlp": 1, "gpt": 1, "soft_hidden": 1, "group_norm": 1, "moe": 1}


def read(case):
    return coupling(case.fn)(case.params, case.x)


def choose(group, rng):
    """Some indices of a group, at least one left out."""
    count = int(rng.integers(1, group.size))
    return np.sort(rng.permutation(group.size)[:count])


def close(a, b, tolerance=1e-4):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = max(1e-3, float(np.abs(y).max()))
        np.testing.assert_allclose(np.asarray(x) / scale, np.asarray(y) / scale, atol=tolerance)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def check_group(case, group, rng):
    """One group cut; returns whether the cut network equals the masked one."""
    kept = group.keep(choose(group, rng))
    small, smaller = cut(case.fn, case.params, kept, case.x)
    fn = jax.jit(case.fn)
    expected = fn(masked(case.params, kept), case.x)
    before = fn(case.params, case.x)
    assert np.abs(np.asarray(expected) - np.asarray(before)).max() > 1e-6  # the mask matters
    if group.exact:
        close(smaller(small, case.x), expected)


@pytest.mark.parametrize("name", SMALL)
def test_each_group_masked_is_removed(name):
    case, rng = ZOO[name], np.random.default_rng(0)
    tried = [check_group(case, g, rng) for g in read(case) if g.cuttable and g.size > 1]
    assert tried


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ZOO) - set(SMALL)))
def test_each_group_masked_is_removed_all(name):
    test_each_group_masked_is_removed(name)


@pytest.mark.parametrize("name", ZOO)
def test_inexact_groups_are_known(name):
    assert sum(g.cuttable and not g.exact for g in read(ZOO[name])) == INEXACT.get(name, 0)


@pytest.mark.parametrize("name", ["llama_scan", "resnet", "mobile", "lstm", "linen_convolutions"])
def test_all_groups_at_once_under_jit_and_grad(name):
    case, rng = ZOO[name], np.random.default_rng(1)
    groups = [g for g in read(case) if g.cuttable and g.size > 1 and g.exact]
    kept = combine(*(g.keep(np.sort(rng.permutation(g.size)[: g.size // 2])) for g in groups))
    small, smaller = cut(case.fn, case.params, kept, case.x)
    assert count(small) < 0.7 * count(case.params)

    def loss(fn, x):
        return lambda p: jnp.sum(jnp.sin(fn(p, x)))

    value, gradient = jax.jit(jax.value_and_grad(loss(smaller, case.x)))(small)
    whole = masked(case.params, kept)
    expected, full_gradient = jax.jit(jax.value_and_grad(loss(case.fn, case.x)))(whole)
    close(value, expected)
    # the masked network's gradient at the kept indices is the cut network's
    close(gradient, sliced(full_gradient, kept), tolerance=1e-3)


# ---------------------------------------------------------------------------- norms


def test_layer_norm_takes_its_moments_over_the_kept():
    """Reference: the masked network whose norms average over the kept indices."""
    case = ZOO["mlp"]
    (residual,) = read(case).at("inp/w", 1)
    indices = [0, 1, 4, 7, 8, 10, 11]
    mask = jnp.zeros(12).at[jnp.array(indices)].set(1)

    def norm(x, p):
        mean = (x * mask).sum(-1, keepdims=True) / mask.sum()
        variance = (mask * (x - mean) ** 2).sum(-1, keepdims=True) / mask.sum()
        return (x - mean) * lax.rsqrt(variance + 1e-5) * p["g"] + p["b"]

    def reference(p, x):
        h = x @ p["inp"]["w"] + p["inp"]["b"]
        for b in p["blocks"]:
            up = norm(h, b["ln"]) @ b["up"]["w"] + b["up"]["b"]
            h = h + jax.nn.gelu(up) @ b["down"]["w"] + b["down"]["b"]
        return h @ p["out"]["w"] + p["out"]["b"]

    kept = residual.keep(indices)
    small, smaller = cut(case.fn, case.params, kept, case.x, means="kept")
    expected = jax.jit(reference)(masked(case.params, kept), case.x)
    close(smaller(small, case.x), expected)
    close(
        jax.jit(case.fn)(small, case.x), expected
    )  # this function happens to be written for any width
    _, full_count = cut(case.fn, case.params, kept, case.x)
    assert np.abs(full_count(small, case.x) - expected).max() > 1e-3


def test_rms_norm_keeps_or_counts():
    case = ZOO["llama"]
    (residual,) = read(case).at("emb", 1)
    kept = residual.keep(np.arange(0, 24, 2))
    small, full_count = cut(case.fn, case.params, kept, case.x)
    close(full_count(small, case.x), jax.jit(case.fn)(masked(case.params, kept), case.x))
    _, new_count = cut(case.fn, case.params, kept, case.x, means="kept")
    close(new_count(small, case.x), jax.jit(case.fn)(small, case.x))
    assert np.abs(new_count(small, case.x) - full_count(small, case.x)).max() > 1e-3


def test_variance_by_squares_counts_too():
    """Flax's LayerNorm: E[x^2] - E[x]^2, and RMSNorm."""
    case = ZOO["linen_attention"]
    (residual,) = read(case).at("params/inp/kernel", 1)
    kept = residual.keep(np.arange(9))
    small, smaller = cut(case.fn, case.params, kept, case.x, means="kept")
    close(smaller(small, case.x), jax.jit(zoo.Attention(width=9).apply)(small, case.x))


# ---------------------------------------------------------------------------- other shapes


@pytest.mark.parametrize("name", ["llama", "llama_scan"])
def test_a_cut_carries_to_other_shapes(name):
    case, rng = ZOO[name], np.random.default_rng(2)
    groups = [g for g in read(case) if g.cuttable]
    kept = combine(*(g.keep(choose(g, rng)) for g in groups))
    small, smaller = cut(case.fn, case.params, kept, case.x)
    fn = jax.jit(case.fn)
    for shape in ((1, 3), (3, 11)):
        ids = jnp.asarray(rng.integers(0, 17, shape))
        close(smaller(small, ids), fn(masked(case.params, kept), ids))


def test_a_stored_record_is_enough():
    """The record holds plain paths and integers: what was cut from one trace serves another."""
    case = ZOO["lstm"]
    (units,) = read(case).at("out", 0)
    stored = {p: {k: i.tolist() for k, i in a.items()} for p, a in units.keep([0, 3, 5]).items()}
    small, smaller = cut(case.fn, case.params, stored, case.x)
    assert small["u"].shape == (3, 12)
    close(smaller(small, case.x), case.fn(masked(case.params, stored), case.x))


def test_shapes_are_enough_to_cut():
    case = ZOO["lstm"]
    (units,) = read(case).at("out", 0)
    shape = jax.ShapeDtypeStruct(case.x.shape, case.x.dtype)
    small, smaller = cut(case.fn, case.params, units.keep([1, 2]), shape)
    out = smaller(small, case.x)
    close(out, case.fn(masked(case.params, units.keep([1, 2])), case.x))


def test_outputs_keep_their_tree():
    def fn(p, x, name):
        h = jnp.tanh(x @ p["a"])
        return {"logits": h @ p["b"], "name": name, "none": None}

    params, x = {"a": zoo.normal(3, 8), "b": zoo.normal(8, 2)}, zoo.normal(2, 3)
    (group,) = coupling(fn)(params, x, "net").at("a", 1)
    small, smaller = cut(fn, params, group.keep([1, 5]), x, "net")
    out = smaller(small, x, "net")
    assert out["name"] == "net"
    assert out["none"] is None
    close(out["logits"], fn(small, x, "net")["logits"])


def test_dtypes_of_the_parameters_given():
    case = ZOO["fused_glu"]
    (hidden,) = read(case).at("down", 0)
    kept = hidden.keep(np.arange(5))
    small, smaller = cut(case.fn, case.params, kept, case.x)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), small)
    out = smaller(half, case.x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    close(out.astype(jnp.float32), smaller(small, case.x), tolerance=0.1)


# ---------------------------------------------------------------------------- per step


def test_other_indices_in_each_layer():
    case, rng = ZOO["llama_scan"], np.random.default_rng(3)
    groups = [g for g in read(case) if g.steps and not g.positional]
    assert sorted(g.size for g in groups) == [2, 2, 8, 40]
    records = []
    for group in groups:
        k = max(1, group.size // 2)
        rows = [np.sort(rng.permutation(group.size)[:k]) for _ in range(group.steps)]
        records.append(group.keep(np.stack(rows)))
    kept = combine(*records)
    small, smaller = cut(case.fn, case.params, kept, case.x)
    assert small["layers"]["up"].shape == (2, 24, 20)
    close(smaller(small, case.x), jax.jit(case.fn)(masked(case.params, kept), case.x))


def test_other_indices_in_each_layer_are_refused_where_positions_count():
    groups = read(ZOO["llama_scan"])
    pair = next(g for g in groups.at("layers/q", 2) if g.size == 4)  # meets the rotary table
    assert pair.positional
    with pytest.raises(InputError, match="every step must keep the same"):
        pair.keep([[0, 1], [1, 2]])
    (residual,) = groups.at("emb", 1)
    with pytest.raises(InputError, match="every step must keep the same"):
        residual.keep([[0, 1], [1, 2]])


def test_per_step_and_shared_cuts_combine():
    case = ZOO["llama_scan"]
    groups = read(case)
    (residual,) = groups.at("emb", 1)
    (hidden,) = groups.at("layers/up", 2)
    kept = combine(residual.keep(np.arange(0, 24, 2)), hidden.keep([[0, 1, 2], [7, 8, 9]]))
    small, smaller = cut(case.fn, case.params, kept, case.x)
    close(smaller(small, case.x), jax.jit(case.fn)(masked(case.params, kept), case.x))


# ---------------------------------------------------------------------------- make


def test_make_is_used_once_it_is_seen_to_agree():
    case = ZOO["linen_attention"]
    groups = read(case)
    heads = groups.at("params/mha/query/kernel", 1)[0]
    kept = combine(heads.keep([0, 2]), groups.at("params/up/kernel", 1)[0].keep(np.arange(8)))

    def make(p, x):
        return zoo.Attention(hidden=8, heads=2).apply(p, x)

    small, smaller = cut(case.fn, case.params, kept, case.x, make=make)
    assert smaller is make
    close(smaller(small, case.x), jax.jit(case.fn)(masked(case.params, kept), case.x))


@pytest.mark.parametrize("name", ["scale_by_width", "dropout", "index_split", "alibi"])
def test_tracing_again_can_be_silently_wrong_and_is_not_used(name):
    case = ZOO[name]
    path, axis = {"scale_by_width": ("q", 1), "alibi": ("o", 0)}.get(name, ("a", 1))
    group = read(case).at(path, axis)[0]
    kept = group.keep([0, 2, 5, 7] if name == "dropout" else [group.size - 1])
    if name == "alibi":  # the number of heads is written into the function

        def make(p, x):
            return zoo.alibi(p, x, heads=1)
    else:
        make = case.fn
    with pytest.warns(UserWarning, match="make is not used"):
        small, smaller = cut(case.fn, case.params, kept, case.x, make=make)
    expected = jax.jit(case.fn)(masked(case.params, kept), case.x)
    close(smaller(small, case.x), expected)
    assert np.abs(np.asarray(make(small, case.x)) - np.asarray(expected)).max() > 1e-4


def test_make_that_raises_is_not_used():
    case = ZOO["group_norm"]
    group = read(case).at("a", 1)[0]
    with pytest.warns(UserWarning, match=r"make is not used.*ZeroDivisionError"):
        cut(case.fn, case.params, group.keep([0]), case.x, make=lambda p, x: 1 / 0)


# ---------------------------------------------------------------------------- custom rules


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def quantized(p, x):
    return straight_through(4 * (x @ p["a"])) @ p["b"]


@pytest.fixture
def small_net():
    return {"a": zoo.normal(3, 8), "b": zoo.normal(8, 2)}, zoo.normal(2, 3)


def test_a_custom_gradient_that_is_not_cut_holds(small_net):
    params, x = small_net
    params |= {"c": zoo.normal(2, 4), "d": zoo.normal(4, 2)}

    def fn(p, x):
        return jnp.tanh(quantized(p, x) @ p["c"]) @ p["d"]

    (group,) = coupling(fn)(params, x).at("c", 1)
    small, smaller = cut(fn, params, group.keep([0, 3]), x)
    gradient = jax.grad(lambda p: smaller(p, x).sum())(small)
    expected = jax.grad(lambda p: fn(p, x).sum())(small)
    assert np.abs(expected["a"]).max() > 0
    close(gradient, expected)


def test_a_custom_gradient_holds_at_smaller_shapes(small_net):
    """Without the straight-through rule the gradient of the rounding would be 0."""
    params, x = small_net
    (group,) = coupling(quantized)(params, x).at("a", 1)
    kept = group.keep([0, 3, 6])
    small, smaller = cut(quantized, params, kept, x)
    gradient = jax.grad(lambda p: jnp.sin(smaller(p, x)).sum())(small)
    expected = jax.grad(lambda p: jnp.sin(quantized(p, x)).sum())(masked(params, kept))
    assert np.abs(gradient["a"]).max() > 0
    close(gradient, sliced(expected, kept))


def test_a_custom_gradient_with_sizes_is_refused_not_zero(small_net):
    @jax.custom_vjp
    def fixed_size(h):
        return jnp.round(h)

    fixed_size.defvjp(lambda h: (jnp.round(h), jnp.ones((2, 8))), lambda ones, g: (g * ones,))
    params, x = small_net

    def fn(p, x):
        return fixed_size(4 * (x @ p["a"])) @ p["b"]

    (group,) = coupling(fn)(params, x).at("a", 1)
    kept = group.keep([0, 3])
    small, smaller = cut(fn, params, kept, x)
    close(smaller(small, x), fn(masked(params, kept), x))
    with pytest.raises(InputError, match="pass make="):
        jax.grad(lambda p: smaller(p, x).sum())(small)


# ---------------------------------------------------------------------------- refusals


def refused(name, change, message):
    case = ZOO[name]
    kept = change(read(case))
    with pytest.raises(InputError, match=message) as error:
        cut(case.fn, case.params, kept, case.x)
    assert "\n" not in str(error.value)


def test_incomplete_record_names_what_is_missing():
    def change(groups):
        kept = groups.at("out", 0)[0].keep([0, 2])
        del kept["b"]
        return kept

    refused("lstm", change, r"kept lacks axis 0 of b, which is one axis with axis \d of \w+")


def test_inconsistent_record():
    def change(groups):
        kept = groups.at("out", 0)[0].keep([0, 2])
        kept["out"][0] = np.array([0, 3])
        return kept

    refused("lstm", change, "one axis but keep different indices")


def test_part_of_an_index():
    """Position 0 of w is unit 0 of one gate; the other gates would keep it."""

    def change(groups):
        kept = groups.at("out", 0)[0].keep([1, 2, 3, 4, 5])
        kept["w"][1] = np.arange(1, 24)
        return kept

    refused("lstm", change, "no whole indices|keep different indices|kept lacks")


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"w": {0: [0]}}, r"w axis 0 cannot be cut: axis 2 of input\[0\]"),
        ({"nothing": {0: [0]}}, "no parameter nothing"),
        ({"w": {2: [0]}}, "axes 0 to 1"),
        ({"out": {0: [0, 6]}}, "0 to 5"),
        ({"out": {0: [-1, 2]}}, "0 to 5"),
        ({"out": {0: [1, 1]}}, "twice"),
        ({"out": {0: []}}, "at least one"),
        ({"out": {0: [True, False]}}, "integer"),
        ({"out": {0: [0.0]}}, "integer"),
        ({"u": {1: [[0, 6, 12, 18]] * 2}}, r"one row for each of the 6 steps"),
    ],
)
def test_bad_records(kept, message):
    refused("lstm", lambda groups: kept, message)


def test_single_positions_cannot_be_cut():
    refused("index_split", lambda groups: {"a": {1: [0, 1, 3, 4, 5, 6, 7]}}, "single positions")


def test_wrong_means_and_wrong_parameters():
    case = ZOO["lstm"]
    kept = read(case).at("out", 0)[0].keep([0, 1])
    with pytest.raises(InputError, match="means must be one of keep, kept"):
        cut(case.fn, case.params, kept, case.x, means="all")
    _, smaller = cut(case.fn, case.params, kept, case.x)
    with pytest.raises(InputError, match="shapes that the cut left"):
        smaller(case.params, case.x)


def test_nothing_kept_away_is_no_cut():
    case = ZOO["llama"]
    groups = read(case)
    kept = groups.at("emb", 1)[0].keep(np.arange(24))
    small, smaller = cut(case.fn, case.params, kept, case.x)
    np.testing.assert_array_equal(smaller(small, case.x), jax.jit(case.fn)(case.params, case.x))


def test_masked_and_sliced_by_hand():
    params = {"w": jnp.arange(12.0).reshape(3, 4)}
    kept = {"w": {1: [3, 0]}}
    np.testing.assert_array_equal(sliced(params, kept)["w"], [[0, 3], [4, 7], [8, 11]])
    np.testing.assert_array_equal(masked(params, kept)["w"][1], [4, 0, 0, 7])
    rows = {"w": {1: [[0], [1], [3]]}}
    np.testing.assert_array_equal(sliced(params, rows)["w"], [[0], [5], [11]])
    np.testing.assert_array_equal(masked(params, rows)["w"][2], [0, 0, 0, 11])


def test_linen_modules_of_other_sizes():
    """The small parameters are those of the same Linen module with a smaller configuration."""
    case = ZOO["linen_attention"]
    groups = read(case)
    kept = combine(
        groups.at("params/inp/kernel", 1)[0].keep(np.arange(9)),
        groups.at("params/up/kernel", 1)[0].keep(np.arange(0, 16, 2)),
        groups.at("params/mha/query/kernel", 1)[0].keep([0, 2]),
    )
    small = sliced(case.params, kept)
    module: nn.Module = zoo.Attention(width=9, hidden=8, heads=2)
    expected = jax.eval_shape(module.init, jax.random.key(0), case.x)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, expected)
