"""The groups of known networks, by hand; what cannot be cut, with its reason and line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from jaxcompress.core.errors import InputError
from jaxcompress.core.readers.coupling import coupling
from jaxcompress.core.readers.coupling.rules import RULES
from jaxcompress.core.readers.coupling.trace import CALLS
from jaxcompress.core.readers.cut import cut, masked


def structure(group):
    """{(path, axis, offset, stride)} of a group."""
    return {tuple(member) for member in group.members}


def whole(*places):
    """Members that fill their axis: "path:axis"."""
    split = (place.rsplit(":", 1) for place in places)
    return {(path, int(axis), 0, 1) for path, axis in split}


def read(case):
    return coupling(case.fn)(case.params, case.x)


ZOO = zoo.zoo()


def test_llama_by_hand():
    groups = read(ZOO["llama"])
    layers = range(2)
    per_layer = ("down:1", "gate:0", "k:0", "n1:0", "n2:0", "o:1", "q:0", "up:0", "v:0")
    residual = ["emb:1", "head:0", "nf:0"]
    residual += [f"layers/{i}/{name}" for i in layers for name in per_layer]
    expected = [(24, whole(*residual))]
    for i in layers:
        at = f"layers/{i}/"
        expected.append((40, whole(at + "gate:1", at + "up:1", at + "down:0")))
        # 2 kv heads of 8; a kv head serves 2 query heads, so it takes 16 rows of o and of q
        kv = {(at + "k", 1, 0, 8), (at + "v", 1, 0, 8), (at + "q", 1, 0, 16), (at + "o", 0, 0, 16)}
        expected.append((2, kv))
        expected.append((2, {(at + "q", 1, 0, 8), (at + "o", 0, 0, 8)}))  # within a kv head
        expected.append((8, {(at + "v", 1, 0, 1), (at + "o", 0, 0, 1)}))
        pairs = {(at + name, 1, offset, 1) for name in "qk" for offset in (0, 4)}
        expected.append((4, pairs))  # a rotary pair is one index
    assert sorted((g.size, sorted(structure(g))) for g in groups if g.cuttable) == sorted(
        (size, sorted(members)) for size, members in expected
    )
    fixed = {tuple(sorted(structure(g))): g.reasons for g in groups if not g.cuttable}
    assert set(fixed) == {tuple(whole("emb:0")), tuple(whole("head:1"))}
    (gather, consumed) = fixed[tuple(whole("emb:0"))]
    assert gather.startswith("gather looks axis 0 up by position @ zoo.py:")
    assert consumed.startswith("no product consumes it")
    assert fixed[tuple(whole("head:1"))][0] == "axis 2 of output[0] @ result"


def test_llama_tied_joins_embedding_and_head():
    groups = read(ZOO["llama_tied"])
    (vocabulary,) = groups.at("emb", 0)
    assert not vocabulary.cuttable
    assert any("output[0]" in reason for reason in vocabulary.reasons)


def test_llama_scan_by_hand():
    groups = read(ZOO["llama_scan"])
    steps = {(g.size, g.steps) for g in groups if g.cuttable}
    # the residual meets the carry, what is inside a layer does not
    assert steps == {(24, 0), (40, 2), (2, 2), (8, 2), (4, 2)}
    (depth,) = groups.at("layers/q", 0)
    assert depth.reasons[0].startswith("the axis a scan runs over @ zoo.py:")


def test_resnet_by_hand():
    groups = read(ZOO["resnet"])
    norm = ("b", "g", "mean", "var")
    stream = [f"{bn}/{name}:0" for bn in ("bn0", "blocks/0/bn2", "blocks/1/bn2") for name in norm]
    stream += ["stem:3", "blocks/0/c1:2", "blocks/0/c2:3", "blocks/1/c1:2", "blocks/1/c2:3"]
    cuttable = [(g.size, structure(g)) for g in groups if g.cuttable]
    # flattened [4, 4, 6] into fc1: channel c stands at c, c + 6, c + 12, ...
    assert (6, whole(*stream, "fc1:0")) in cuttable
    for i in (0, 1):
        inner = [f"blocks/{i}/bn1/{name}:0" for name in norm]
        inner += [f"blocks/{i}/c1:3", f"blocks/{i}/c2:2"]
        assert (10, whole(*inner)) in cuttable
    assert (14, whole("fc1:1", "b1:0", "fc2:0")) in cuttable
    assert len(cuttable) == 4
    channel = next(g for g in groups if g.size == 6)
    member = next(m for m in channel.members if m.path == "fc1")
    np.testing.assert_array_equal(channel.labels(member), np.tile(np.arange(6), 16))


def test_lstm_by_hand():
    groups = read(ZOO["lstm"])
    (units,) = [g for g in groups if g.cuttable]
    gates = {
        (name, axis, 6 * i, 1) for name, axis in (("w", 1), ("u", 1), ("b", 0)) for i in range(4)
    }
    assert structure(units) == gates | whole("u:0", "out:0")


def test_dense_net_segments():
    groups = read(ZOO["dense_net"])
    sizes = [g.size for g in groups.at("fc", 0)]
    assert sizes == [4, 6, 6, 6]
    second = groups.at("fc", 0)[1]
    assert ("blocks/2/c", 2, 4, 1) in structure(second)
    assert ("fc", 0, 4, 1) in structure(second)


def test_fused_qkv_segments():
    groups = read(ZOO["gpt"])
    found = [(g.size, structure(g)) for g in groups.at("qkv", 1)]
    heads = {("qkv", 1, 0, 8), ("qkv", 1, 16, 8), ("qkv", 1, 32, 8), ("o", 0, 0, 8)}
    heads |= {("bqkv", 0, 16 * i, 8) for i in range(3)}
    assert (2, heads) in found
    value = {("qkv", 1, 32, 1), ("bqkv", 0, 32, 1), ("o", 0, 0, 1)}
    assert (8, value) in found
    assert len(found) == 3


def test_learned_positions_stay():
    """Only 6 of the 9 positions are met; the tail is met by nothing."""
    groups = read(ZOO["gpt"])
    assert all(not g.cuttable for g in groups.at("pos", 0))


def test_linen_attention_by_hand():
    groups = read(ZOO["linen_attention"])
    heads = groups.at("params/mha/query/kernel", 1)[0]
    names = ("query", "key", "value")
    expected = {(f"params/mha/{n}/kernel", 1, 0, 1) for n in names}
    expected |= {(f"params/mha/{n}/bias", 0, 0, 1) for n in names}
    assert structure(heads) == expected | {("params/mha/out/kernel", 0, 0, 1)}
    assert heads.size == 3


def test_grouped_convolution():
    groups = read(ZOO["grouped"])
    assert [g.size for g in groups.at("g", 3)] == [3, 6]  # groups, then outputs of a group
    assert [g.size for g in groups.at("a", 3)] == [3, 4]
    assert groups.at("a", 3)[0] is groups.at("g", 3)[0]
    residual = read(ZOO["grouped_residual"])
    assert residual.at("a", 3) == residual.at("g", 3)


# ---------------------------------------------------------------------------- fail-safe

A, B = zoo.normal(3, 8), zoo.normal(8, 2, seed=2)
AB = {"a": A, "b": B}
X = zoo.normal(2, 3)
mystery = Primitive("mystery")
mystery.def_impl(lambda x: x * 2)
mystery.def_abstract_eval(lambda x: x)


def through(middle):
    """h = middle(x a); h b"""
    return lambda p, x: middle(x @ p["a"]) @ p["b"]


def callback(h):
    return jax.pure_callback(lambda z: z, jax.ShapeDtypeStruct(h.shape, h.dtype), h)


def misaligned(h):
    return (h.reshape(2, 4, 2) * jnp.ones((4, 1))).reshape(2, 8)[:, ::3][:, :1] * jnp.ones((2, 8))


def sharded(h):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    total = jax.shard_map(
        lambda z: lax.all_gather(lax.psum(z, "d"), "d", tiled=True),
        mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False,
    )  # fmt: skip
    return total(h)


FAIL_SAFE = {
    "unknown": (through(mystery.bind), "mystery is not understood"),
    "callback": (through(callback), "pure_callback is not understood"),
    "debug_print": (
        through(lambda h: (jax.debug.print("{}", h), h)[1]),
        "debug_print is not understood",
    ),
    "cumsum": (through(lambda h: jnp.cumsum(h, -1)), "cumsum depends on the order"),
    "sort": (through(lambda h: jnp.sort(h, -1)), "sort reorders"),
    "top_k": (through(lambda h: lax.top_k(h, 8)[0]), "top_k selects by value"),
    "rev": (through(lambda h: h[:, ::-1]), "rev reorders"),
    "fft": (through(lambda h: jnp.fft.fft(h).real), "fft mixes positions"),
    "shard_map": (through(sharded), "shard_map is not understood"),
    "unstack": (
        through(lambda h: jnp.stack(jnp.unstack(h, axis=1), 1)),
        "unstack takes each index apart",
    ),
    "scatter": (
        through(lambda h: h.at[:, jnp.array([1, 3])].set(0.0)),
        "scatter writes axis 1 by position",
    ),
    "scatter_add": (
        through(lambda h: jnp.zeros((2, 8)).at[:, jnp.array([0, 1, 2, 3, 4, 5, 6, 6])].add(h)),
        "scatter-add by position",
    ),
    "gather": (
        through(lambda h: jnp.take_along_axis(h, jnp.argsort(jnp.ones((2, 8)), -1), -1)),
        "gather looks axis 1 up by position",
    ),
    "dynamic_slice": (
        through(lambda h: jnp.tile(lax.dynamic_slice(h, (0, 1), (2, 4)), (1, 2))),
        "dynamic_slice",
    ),
    "solve": (
        through(lambda h: jnp.linalg.solve(jnp.eye(8) * 2, h.T).T),
        "is not understood",
    ),
    "matrix_function": (
        through(lambda h: h @ jnp.linalg.inv(h.T @ h + jnp.eye(8))),
        "is not understood",
    ),
    "strided_part": (through(lambda h: jnp.tile(h[:, :6:3], (1, 4))), "strided slice of a part"),
    "result": (lambda p, x: (x @ p["a"], x @ p["a"] @ p["b"]), "axis 1 of output[0] @ result"),
    "argmax": (
        lambda p, x: (jnp.argmax(x @ p["a"], -1), x @ p["a"] @ p["b"]),
        "argmax returns positions",
    ),
    "ragged_contraction": (
        lambda p, x: lax.ragged_dot_general(
            x @ p["a"], p["b"], jnp.array([5, 3]),
            lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), [1], []),
        ),
        "ragged_dot over a ragged contraction",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAIL_SAFE)
def test_what_is_not_understood_stays_with_its_line(name):
    fn, reason = FAIL_SAFE[name]
    groups = coupling(fn)(AB, X)
    found = groups.at("a", 1)
    assert not any(g.cuttable for g in found)
    lines = [r for g in found for r in g.reasons if reason in r]
    assert lines, [g.reasons for g in found]
    assert " @ " in lines[0]
    assert "result" in reason or "test_coupling_groups.py:" in lines[0]


def test_roll_leaves_single_indices():
    groups = coupling(through(lambda h: jnp.roll(h, 1, -1) + h))(AB, X)
    (alone,) = groups.at("a", 1)
    assert not alone.cuttable
    assert "single indices" in alone.reasons[0]
    assert "test_coupling_groups.py:" in alone.reasons[0]


def test_axes_of_size_one_stay():
    params = {"a": zoo.normal(3, 1), "b": zoo.normal(1, 2)}
    (group,) = coupling(through(jnp.tanh))(params, X).at("a", 1)
    assert group.size == 1
    assert "size 1" in group.reasons[0]


def test_call_site_stands_before_the_inner_line():
    @jax.jit
    def inner(h):
        return jnp.cumsum(h, -1)

    def fn(p, x):
        first = inner(x @ p["c"])
        second = inner(x @ p["a"])
        return (first + second) @ p["b"]

    groups = coupling(fn)(AB | {"c": A}, X)
    sites = {r.split(" @ ")[1].split(" > ")[0] for r in groups.at("a", 1)[0].reasons[:1]}
    other = {r.split(" @ ")[1].split(" > ")[0] for r in groups.at("c", 1)[0].reasons[:1]}
    assert sites
    assert other
    assert sites != other


UNDERSTOOD = {
    "tile": through(lambda h: jnp.tile(h, (1, 2))[:, :8]),
    "batched_gather": lambda p, x: (
        jnp.take_along_axis(x[:, None] * jnp.ones((2, 4, 1)) @ p["a"],
                            jnp.zeros((2, 1, 1), int), 1)[:, 0] @ p["b"]
    ),
    "scatter_rows": through(lambda h: jnp.zeros((4, 8)).at[jnp.array([2, 0])].add(h)[:2]),
    "cache_set": through(lambda h: jnp.zeros((4, 8)).at[1:3].set(h)[:2]),
    "complex": through(lambda h: jnp.abs(lax.complex(h, 2 * h))),
    "device_put": through(jax.device_put),
    "psum_of_vmap": lambda p, x: jax.vmap(
        lambda z: lax.psum(z @ p["a"], "i") @ p["b"], axis_name="i"
    )(x),
    "all_gather_of_vmap": lambda p, x: jax.vmap(
        lambda z: lax.all_gather(z @ p["a"], "i")[0] @ p["b"], axis_name="i"
    )(x),
    "unstack_rows": lambda p, x: sum(jnp.unstack(x @ p["a"])) @ p["b"],
    "barrier": through(lax.optimization_barrier),
    "max_over_rows": lambda p, x: (x @ p["a"]).max(0) @ p["b"],
    "named": through(lambda h: checkpoint_name(h, "h")),
    "fori": lambda p, x: lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h), x @ p["a"]) @ p["b"],
    "associative": through(lambda h: lax.cumsum(h, 0)),
    "vmap": lambda p, x: jax.vmap(lambda z: jax.nn.relu(z @ p["a"]) @ p["b"])(x),
    "remat": through(jax.checkpoint(jnp.tanh)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_understood_and_cut(name):
    """Primitives beyond the common ones: the hidden axis is one group, and cutting it is right."""
    fn = UNDERSTOOD[name]
    (group,) = coupling(fn)(AB, X).at("a", 1)
    assert structure(group) == whole("a:1", "b:0")
    assert group.exact
    kept = group.keep([0, 2, 3, 7])
    small, smaller = cut(fn, AB, kept, X)
    np.testing.assert_allclose(smaller(small, X), fn(masked(AB, kept), X), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- surface


def test_shapes_are_enough():
    case = ZOO["resnet"]
    shapes = jax.eval_shape(lambda: case.params)
    abstract = coupling(case.fn)(shapes, jax.ShapeDtypeStruct(case.x.shape, case.x.dtype))
    assert [structure(g) for g in abstract] == [structure(g) for g in read(case)]


def test_static_arguments_pass_as_they_are():
    def fn(p, x, activation, flag, scale=None):
        assert flag is True
        assert activation == "tanh"
        return jnp.tanh(x @ p["a"]) @ p["b"]

    groups = coupling(fn)(AB | {"name": "net"}, X, "tanh", True, None)
    assert groups.at("a", 1)[0].cuttable


def test_table():
    text = repr(read(ZOO["soft_hidden"]))
    assert "a:1, b:0" in text
    assert "because axis 1 of input[0] @ argument" in text
    assert "masking is not removing: reduce_max @ zoo.py:" in text


def test_keep_makes_a_complete_record():
    group = read(ZOO["lstm"]).at("out", 0)[0]
    kept = group.keep([4, 1])
    gates = [1, 4, 7, 10, 13, 16, 19, 22]
    expected = {"w": {1: gates}, "u": {0: [1, 4], 1: gates}, "b": {0: gates}, "out": {0: [1, 4]}}
    found = {path: {k: v.tolist() for k, v in axes.items()} for path, axes in kept.items()}
    assert found == expected


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 6], "0 to 5"),
        ([-1], "0 to 5"),
        ([1, 1], "twice"),
        ([], "at least one"),
        ([0.5], "integer"),
        ([[0, 1], [2, 3]], "every step must keep the same"),
    ],
)
def test_keep_refuses(indices, message):
    group = read(ZOO["lstm"]).at("out", 0)[0]
    with pytest.raises(InputError, match=message):
        group.keep(indices)


def test_keep_refuses_what_cannot_be_cut():
    groups = read(ZOO["lstm"])
    with pytest.raises(InputError, match=r"w axis 0 cannot be cut: axis 2 of input\[0\]"):
        groups.at("w", 0)[0].keep([0])
    with pytest.raises(InputError, match="no group stands on axis 5 of w"):
        groups.at("w", 5)


# Primitives of jax.lax that stay opaque on purpose: every axis they meet is pinned.
OPAQUE = """
after_all all_gather all_to_all axis_index create_token custom_linear_solve dce_sink ppermute
ragged_all_to_all reduce reduce_window rng_bit_generator rng_uniform
select_and_gather_add select_and_scatter select_and_scatter_add stage
"""


def test_every_primitive_of_lax_is_known():
    """A new primitive is noticed here: give it a rule, or add it to the opaque ones."""
    public = {v.name for v in vars(lax).values() if isinstance(v, Primitive)}
    handled = set(RULES) | set(CALLS) | {"scan", "while", "cond"} | set(OPAQUE.split())
    assert not public - handled
