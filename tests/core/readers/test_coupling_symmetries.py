"""Every derived symmetry leaves the function as it is, and the classes are those known by hand."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax

from jaxcompress.core.errors import InputError
from jaxcompress.core.readers.coupling import SymmetryError, coupling, verify
from jaxcompress.core.readers.coupling.verify import random_diagonal, random_matrix

ZOO = zoo.zoo()


def read(name):
    case = ZOO[name]
    return coupling(case.fn)(case.params, case.x)


@pytest.mark.parametrize("name", ZOO)
def test_random_members_of_every_symmetry(name):
    case = ZOO[name]
    checks = verify(read(name), case.params, case.x, tolerance=1e-4)
    assert checks


def test_verify_draws_what_it_is_not_given():
    case = ZOO["resnet"]
    shapes = jax.eval_shape(lambda: case.params)
    groups = coupling(case.fn)(shapes, jax.ShapeDtypeStruct(case.x.shape, case.x.dtype))
    assert len(verify(groups)) > 10


def test_verify_names_what_fails():
    case = ZOO["mlp"]
    groups = read("mlp")
    groups.fn = lambda p, x: case.fn(p, x) + (p["blocks"][0]["ln"]["g"] ** 2).sum()
    with pytest.raises(SymmetryError, match=r"diagonal .*blocks/0/ln/g"):
        verify(groups, case.params, case.x)


def test_verify_notices_a_cut_that_differs():
    case = ZOO["mlp"]
    groups = read("mlp")
    groups.fn = lambda p, x: case.fn(p, x) + jnp.cos(p["blocks"][0]["up"]["w"][0]).sum()
    with pytest.raises(SymmetryError, match="masking is removing"):
        verify(groups, case.params, case.x)


def test_verify_refuses_a_function_that_is_not_finite():
    groups = coupling(lambda p, x: jnp.log(-jnp.abs(x @ p)) - 1)(zoo.normal(3, 4), zoo.normal(2, 3))
    with pytest.raises(InputError, match="not finite"):
        verify(groups)


# ---------------------------------------------------------------------------- diagonals by hand


def vectors(group):
    return [
        ({(m[0].path, m[0].offset): w for m, w in d.exponents.items()}, bool(d.positive))
        for d in group.diagonals()
    ]


def test_rms_gain_folds_into_its_consumers():
    (residual,) = read("llama").at("emb", 1)
    found = {frozenset(d.by_axis.items()) for d in residual.diagonals()}
    expected = set()
    for i in range(2):
        at = f"layers/{i}/"
        for gain, consumers in (("n1", "qkv"), ("n2", ("gate", "up"))):
            vector = {(at + gain, 0): Fraction(1)}
            vector |= {(at + name, 0): Fraction(-1) for name in consumers}
            expected.add(frozenset(vector.items()))
    expected.add(frozenset({("nf", 0): Fraction(1), ("head", 0): Fraction(-1)}.items()))
    assert found == expected
    assert not any(d.positive for d in residual.diagonals())


def test_tied_embedding_has_no_vector_for_the_last_norm():
    (residual,) = read("llama_tied").at("emb", 1)
    paths = {m[0].path for d in residual.diagonals() for m in d.exponents}
    assert "layers/0/n1" in paths
    assert not paths & {"nf", "emb"}


def test_layer_norm_gain_and_bias_fold_together():
    (residual,) = read("mlp").at("inp/w", 1)
    assert [d.by_axis for d in residual.diagonals()] == [
        {
            (f"blocks/{i}/ln/b", 0): 1,
            (f"blocks/{i}/ln/g", 0): 1,
            (f"blocks/{i}/up/w", 0): -1,
        }
        for i in range(2)
    ]


def test_up_and_down():
    groups = read("llama")
    (hidden,) = groups.at("layers/0/up", 1)
    (diagonal,) = hidden.diagonals()
    assert {frozenset(diagonal.by_axis.items())} == {
        frozenset({("layers/0/up", 1): Fraction(1), ("layers/0/down", 0): Fraction(-1)}.items())
    } or {frozenset(diagonal.by_axis.items())} == {
        frozenset({("layers/0/up", 1): Fraction(-1), ("layers/0/down", 0): Fraction(1)}.items())
    }
    assert not diagonal.positive


def test_relu_wants_positive():
    groups = read("flattened")
    diagonals = [d for d in groups.at("a", 1)[0].diagonals() if len(d.exponents) == 4]
    assert diagonals
    assert diagonals[0].positive.startswith("zoo.py:")
    (units,) = read("resnet").at("fc1", 1)
    (diagonal,) = units.diagonals()
    assert diagonal.positive
    assert "positive diagonal" in units.symmetries


def test_fused_gate_up_scales_the_up_half():
    (hidden,) = read("fused_glu").at("gate_up", 1)
    ((vector, positive),) = vectors(hidden)
    assert set(vector) == {("gate_up", 8), ("b", 8), ("down", 0)}
    assert vector["gate_up", 8] == vector["b", 8] == -vector["down", 0]
    assert not positive
    with pytest.raises(InputError, match="in part"):
        hidden.diagonals()[0].by_axis


def test_rotary_pairs_and_value_output():
    groups = read("llama")
    kv, repeats, pair = groups.at("layers/0/q", 1)
    assert [kv.size, repeats.size, pair.size] == [2, 2, 4]
    (pairs,) = groups.diagonals(kv, pair)
    assert {m[0].path for m in pairs.exponents} == {"layers/0/q", "layers/0/k"}
    assert len(pairs.exponents) == 4  # both halves of each
    value = groups.at("layers/0/v", 1)[1]
    found = groups.diagonals(kv, value)
    assert [{m[0].path for m in d.exponents} for d in found] == [{"layers/0/v", "layers/0/o"}]


@pytest.mark.parametrize("name", ["llama", "llama_scan", "linen_attention", "gpt"])
def test_joint_diagonals_leave_the_function(name):
    case = ZOO[name]
    groups = read(name)
    path = {
        "llama": "layers/0/{}",
        "llama_scan": "layers/{}",
        "linen_attention": "params/mha/{}/kernel",
        "gpt": "qkv",
    }[name]
    rng = np.random.default_rng(0)
    host = jax.tree.map(np.asarray, case.params)  # nothing to compile
    fn = jax.jit(case.fn)
    before = fn(case.params, case.x)
    tried = 0
    for part in ("q", "k", "v") if name.startswith("llama") else ("query", "value"):
        at = path.format(part)
        stacked = name == "llama_scan"
        axes = (1, 2) if name == "linen_attention" else (2,) if stacked else (1,)
        on = [g for axis in axes for g in groups.at(at, axis)]
        pairs = [(on[0], other) for other in on[1:]]
        for pair in pairs:
            for diagonal in groups.diagonals(*pair):
                after = fn(diagonal.apply(host, random_diagonal(diagonal, rng)), case.x)
                np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4)
                tried += 1
    assert tried >= 2


def test_diagonal_can_leave_parameters_alone():
    (residual,) = read("llama").at("emb", 1)
    left = residual.diagonals(unscaled=["layers/0/n1", "layers/0/q"])
    assert len(left) == len(residual.diagonals()) - 1


def test_squares_and_roots_get_whole_exponents():
    def fn(p, x):
        return jnp.square(x @ p["a"]) @ p["b"]

    params, x = {"a": zoo.normal(3, 8), "b": zoo.normal(8, 2)}, zoo.normal(2, 3)
    groups = coupling(fn)(params, x)
    (diagonal,) = groups.at("a", 1)[0].diagonals()
    assert {abs(w) for w in diagonal.by_axis.values()} == {1, 2}
    verify(groups, params, x)


def test_pruning_directions_of_smoothquant():
    """A vector with -1 on every parameter of a contraction, +1 on what makes its input."""
    (residual,) = read("llama").at("emb", 1)
    wanted = {("layers/0/q", 0), ("layers/0/k", 0), ("layers/0/v", 0)}
    (found,) = [d for d in residual.diagonals() if wanted <= set(d.by_axis)]
    sign = found.by_axis["layers/0/q", 0]
    assert all(found.by_axis[at] == sign for at in wanted)


# What an axis meets besides products must restrict it: each of these was wrong once.
RESTRICTED = {
    "max_over_rows": (lambda h: h.max(0, keepdims=True), True, "permutation"),
    "pool": (
        lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (2, 1), (1, 1), "VALID"),
        True,
        "permutation",
    ),
    "cummax": (lambda h: lax.cummax(h, axis=0), True, "permutation"),
    "sort_rows": (lambda h: jnp.sort(h, 0), True, "permutation"),
    "prod_over_rows": (lambda h: h.prod(0, keepdims=True), None, "permutation"),
    "padded_rows": (
        lambda h: jnp.pad(h, ((0, 1), (0, 0)), constant_values=1.0),
        None,
        "general linear, T 1 = 1",
    ),
    "padded_rows_zero": (lambda h: jnp.pad(h, ((0, 1), (0, 0))), False, "general linear"),
    "ones_row": (
        lambda h: jnp.concatenate([jnp.ones((1, 8)), h]),
        None,
        "general linear, T 1 = 1",
    ),
    "zeros_row": (lambda h: jnp.concatenate([jnp.zeros((1, 8)), h]), False, "general linear"),
    "shifted": (lambda h: h + 1.0, None, "general linear, T 1 = 1"),
    "doubled": (lambda h: 2 * h - h[:1], False, "general linear"),
    "absolute": (jnp.abs, True, "permutation"),
    "relu6": (jax.nn.relu6, None, "permutation"),
    "cast": (lambda h: h.astype(jnp.bfloat16).astype(jnp.float32), False, "general linear"),
    "to_int": (lambda h: h.astype(jnp.int32).astype(jnp.float32), None, "permutation"),
    "to_float8": (
        lambda h: h.astype(jnp.float8_e4m3fn).astype(jnp.float32),
        None,
        "permutation",
    ),
    "unit_norm": (
        lambda h: h / jnp.sqrt((h * h).sum(-1, keepdims=True)),
        None,
        "orthogonal",
    ),
    "gram": (lambda h: (h @ h.T) @ h, None, "orthogonal"),
    "centred": (lambda h: h - h.mean(-1, keepdims=True), None, "general linear, T 1 = 1"),
    "positions": (lambda h: h * jnp.arange(8.0), False, None),
    "cumprod_rows": (lambda h: jnp.cumprod(h, 0), None, "permutation"),
    "square": (jnp.square, False, "permutation"),
    "scatter_mul": (
        lambda h: jnp.ones((2, 8)).at[jnp.array([0, 0])].multiply(h),
        None,
        "permutation",
    ),
    "infinite_mask": (
        lambda h: jnp.maximum(jnp.where(jnp.array([[True], [False]]), h, -jnp.inf), -9.0),
        None,
        "permutation",
    ),
}


@pytest.mark.parametrize("name", RESTRICTED)
def test_what_restricts_an_axis(name):
    """diagonal: True positive only, False any, None there is none; and the matrices' level."""
    middle, positive, level = RESTRICTED[name]
    params = {"a": zoo.normal(3, 8), "b": zoo.normal(8, 2)}
    x = zoo.normal(2, 3)

    def fn(p, x):
        return middle(x @ p["a"]) @ p["b"]

    groups = coupling(fn)(params, x)
    (group,) = groups.at("a", 1)
    diagonals = group.diagonals()
    assert [bool(d.positive) for d in diagonals] == ([] if positive is None else [positive])
    if level is None:
        assert {m.level for m in group.matrices()} == {"identity"}
    else:
        found = {m.level + (", T 1 = 1" if m.fixes_ones else "") for m in group.matrices()}
        assert found == {level}
    if name not in ("to_float8", "to_int"):  # rounding jumps
        tolerance = 2e-2 if name == "cast" else 1e-4
        verify(groups, params, x, tolerance=tolerance)


# ---------------------------------------------------------------------------- matrices


def fold_gains(group, params, gains):
    """Scale by every diagonal so that the gains become 1."""
    for diagonal in group.diagonals():
        (member,) = [m for m in diagonal.exponents if m[0].path in gains]
        gain = np.asarray(_leaf(params, member[0].path), np.float64)
        assert diagonal.exponents[member] == 1
        params = diagonal.apply(params, 1 / gain)
    return params


def _leaf(params, path):
    for key in path.split("/"):
        params = params[int(key) if isinstance(params, list) else key]
    return params


@pytest.mark.parametrize("name", ["llama", "llama_scan"])
def test_quarot_by_folding_gains(name):
    """With gains the residual is only a permutation; folded, it is orthogonal (QuaRot)."""
    case = ZOO[name]
    groups = read(name)
    (residual,) = groups.at("emb", 1)
    gains = [m.path for m in residual.members if m.path.split("/")[-1] in ("n1", "n2", "nf")]
    assert {m.level for m in residual.matrices()} == {"permutation"}
    folded = fold_gains(residual, jax.tree.map(np.asarray, case.params), gains)
    for path in gains:
        np.testing.assert_allclose(_leaf(folded, path), 1, rtol=1e-5)
    fn = jax.jit(case.fn)
    before = fn(case.params, case.x)
    np.testing.assert_allclose(fn(folded, case.x), before, rtol=1e-3, atol=1e-5)
    (rotation,) = residual.matrices(uniform=gains)
    assert (rotation.level, rotation.fixes_ones) == ("orthogonal", False)
    turned = rotation.apply(folded, random_matrix(rotation, np.random.default_rng(0)))
    assert np.abs(_leaf(turned, "emb") - case.params["emb"]).max() > 0.1
    np.testing.assert_allclose(fn(turned, case.x), before, rtol=1e-3, atol=1e-5)


def test_quarot_needs_untying():
    """Tied: the last gain cannot be folded, and declared uniform it would be wrong to."""
    (residual,) = read("llama_tied").at("emb", 1)
    foldable = {m[0].path for d in residual.diagonals() for m in d.exponents}
    assert "nf" not in foldable
    gains = [m.path for m in residual.members if m.path in foldable and "/n" in m.path]
    assert {m.level for m in residual.matrices(uniform=gains)} == {"permutation"}


def test_layer_norm_is_orthogonal_fixing_ones():
    case = ZOO["mlp"]
    (residual,) = read("mlp").at("inp/w", 1)
    gains = [f"blocks/{i}/ln/g" for i in range(2)]
    folded = fold_gains(residual, jax.tree.map(np.asarray, case.params), gains)
    before = case.fn(case.params, case.x)
    classes = residual.matrices(uniform=gains)
    stream = max(classes, key=lambda c: len(c.signs))
    assert (stream.level, stream.fixes_ones) == ("orthogonal", True)
    matrix = random_matrix(stream, np.random.default_rng(0))
    np.testing.assert_allclose(matrix.sum(1), 1)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(12), atol=1e-12)
    turned = stream.apply(folded, matrix)
    np.testing.assert_allclose(case.fn(turned, case.x), before, rtol=1e-3, atol=1e-5)
    any_rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0]
    wrong = case.fn(stream.apply(folded, any_rotation), case.x)
    assert np.abs(wrong - before).max() > 1e-2


def test_value_output_is_general_linear_and_so_are_keys_without_rotary():
    value = read("llama").at("layers/0/v", 1)[1]
    (classes,) = value.matrices()
    assert classes.level == "general linear"
    assert sorted((m.path, sign) for m, sign in classes.signs.items()) in (
        [("layers/0/o", -1), ("layers/0/v", 1)],
        [("layers/0/o", 1), ("layers/0/v", -1)],
    )
    features = next(g for g in read("alibi").at("q", 1) if g.size == 4)
    assert [m.level for m in features.matrices()] == ["general linear"]
    pair = read("llama").at("layers/0/q", 1)[2]
    assert {m.level for m in pair.matrices()} == {"identity"}  # frequencies differ


def test_another_matrix_in_each_layer():
    """In a scanned model v -> o takes another T per step, the residual does not."""
    case = ZOO["llama_scan"]
    groups = read("llama_scan")
    (classes,) = groups.at("layers/v", 2)[1].matrices()
    assert classes.steps == 2
    turned = classes.apply(case.params, random_matrix(classes, np.random.default_rng(0)))
    before = case.fn(case.params, case.x)
    np.testing.assert_allclose(case.fn(turned, case.x), before, rtol=1e-3, atol=1e-5)
    (residual,) = groups.at("emb", 1)
    assert {m.steps for m in residual.matrices()} == {0}
    by_gain = {m[0].path: d.steps for d in residual.diagonals() for m in d.exponents}
    assert by_gain["layers/n1"] == 2
    assert by_gain["nf"] == 0


def test_symmetries_by_name():
    groups = read("llama")
    assert groups.at("layers/0/v", 1)[1].symmetries == (
        "selection",
        "any diagonal",
        "general linear",
    )
    assert groups.at("emb", 0)[0].symmetries == ()
    assert groups.at("emb", 1)[0].symmetries == ("selection", "any diagonal")


def test_apply_works_under_jit():
    case = ZOO["llama"]
    groups = read("llama")
    (diagonal,) = groups.at("layers/0/up", 1)[0].diagonals()
    d = jnp.linspace(0.5, 2, 40)
    scaled = jax.jit(diagonal.apply)(case.params, d)
    np.testing.assert_allclose(
        scaled["layers"][0]["up"],
        diagonal.apply(case.params, np.asarray(d))["layers"][0]["up"],
        rtol=1e-5,
    )
    (classes,) = groups.at("layers/0/v", 1)[1].matrices()
    matrix = jnp.asarray(random_matrix(classes, np.random.default_rng(0)), jnp.float32)
    turned = jax.jit(classes.apply)(case.params, matrix)
    before = case.fn(case.params, case.x)
    np.testing.assert_allclose(case.fn(turned, case.x), before, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (40, 40)])
def test_wrong_shapes_are_refused(shape):
    case = ZOO["llama"]
    (group,) = read("llama").at("layers/0/up", 1)
    with pytest.raises(InputError, match="wants"):
        group.diagonals()[0].apply(case.params, np.ones(shape))
    with pytest.raises(InputError, match="size 40"):
        group.matrices()[0].apply(case.params, np.ones((3, 3)))
