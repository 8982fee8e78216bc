"""Where to spend: exact sums, closed forms, brute force, and what the papers' formulas give."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.methods import compress
from jaxcompress.pruning import allocation
from jaxcompress.pruning.unstructured import METHODS

sparsities = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.77, 0.95, 0.999])
sizes_lists = st.lists(st.integers(1, 300), min_size=1, max_size=6)


def asked(sizes, sparsity):
    return int(Fraction(str(sparsity)) * sum(sizes))


@given(sizes_lists, st.integers(0, 1000), st.booleans(), sparsities)
def test_global_threshold_equals_a_stable_sort_of_everything(sizes, seed, ties, sparsity):
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(-2, 3, n) if ties else rng.normal(size=n) for n in sizes]
    scores = [x.astype(np.float32) for x in drawn]
    counts = allocation.global_threshold(lambda: iter(scores), sparsity)
    gone = np.argsort(np.concatenate(scores), kind="stable")[: asked(sizes, sparsity)]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(counts, np.bincount(owner[gone], minlength=len(sizes)))


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6), sparsities
)
def test_erdos_renyi_removes_exactly_what_is_asked(shapes, sparsity):
    sizes = [n * k for n, k in shapes]
    counts = allocation.erdos_renyi(shapes, sparsity)
    assert counts.sum() == asked(sizes, sparsity)
    assert (counts >= 0).all()
    assert (counts <= sizes).all()


def test_erdos_renyi_kernel_is_its_closed_form():
    shapes = [(64, 32, 3, 3), (128, 64, 3, 3), (100, 128)]  # out, in, window
    n = np.array([np.prod(s) for s in shapes], float)
    raw = np.array([(64 + 32 + 6) / n[0], (128 + 64 + 6) / n[1], 228 / n[2]])
    # At 0.9 no density reaches 1, so one scale serves all; at 0.6 the last matrix stays whole.
    epsilon = 0.1 * n.sum() / (raw * n).sum()
    assert (epsilon * raw < 1).all()
    counts = allocation.erdos_renyi(shapes, 0.9)
    np.testing.assert_allclose(1 - counts / n, epsilon * raw, atol=1 / n.min())
    epsilon = (0.4 * n.sum() - n[2]) / (raw * n)[:2].sum()
    assert (epsilon * raw[:2] < 1).all()
    counts = allocation.erdos_renyi(shapes, 0.6)
    assert counts[2] == 0
    np.testing.assert_allclose(1 - counts[:2] / n[:2], epsilon * raw[:2], atol=1e-3)


def test_owl_is_the_papers_formula_where_blocks_are_equal():
    rng = np.random.default_rng(0)
    # Three blocks of two matrices each, with ever heavier tails.
    metrics = [np.abs(rng.standard_t(df, (40, 25))).astype(np.float32) for df in (9, 9, 4, 4, 2, 2)]
    blocks, sparsity, spread = list("aabbcc"), 0.7, 0.08
    shares = allocation.outlier_shares(lambda: iter(metrics), blocks, threshold=3.0)
    counts = allocation.outlier_weighted(shares, [1000] * 6, blocks, sparsity, spread=spread)
    whole = [np.concatenate([metrics[i], metrics[i + 1]]) for i in (0, 2, 4)]
    outliers = np.array([(m > 3 * m.mean()).mean() for m in whole])
    assert len(set(outliers)) == 3
    density = (outliers - outliers.min()) / np.ptp(outliers) * 2 * spread
    density = density - density.mean() + 1 - sparsity
    assert counts.sum() == asked([1000] * 6, sparsity)
    np.testing.assert_allclose(counts / 1000, np.repeat(1 - density, 2), atol=1e-3)


@given(sizes_lists, st.integers(0, 99), st.sampled_from([0.1, 0.5, 0.9]))
def test_owl_removes_exactly_what_is_asked(sizes, seed, sparsity):
    rng = np.random.default_rng(seed)
    shares = rng.uniform(0, 0.1, len(sizes))
    blocks = rng.integers(0, 3, len(sizes)).tolist()
    counts = allocation.outlier_weighted(shares, sizes, blocks, sparsity, spread=0.04)
    assert counts.sum() == asked(sizes, sparsity)


@given(st.lists(st.integers(4, 12), min_size=1, max_size=3), st.integers(0, 999), st.booleans())
def test_measured_split_is_the_best_one(sizes, seed, bent):
    """Against every split, for losses that are convex, or bent so that only their hull is."""
    rng = np.random.default_rng(seed)
    grid = (0.25, 0.5, 0.75, 0.9)
    curves = []
    for n in sizes:
        steps = rng.uniform(0, 1, n)
        curves.append(np.concatenate([[0], np.cumsum(steps if bent else np.sort(steps))]))
    sparsity = 0.6
    counts = allocation.measured(
        sizes, lambda i, count: float(curves[i][count]), sparsity, grid=grid
    )
    assert counts.sum() == asked(sizes, sparsity)

    def hull(i):  # the convex minorant of the measured points, by brute force over all chords
        places = [0, *sorted({int(s * sizes[i]) for s in grid} - {0})]
        chords = [
            [
                curves[i][a]
                + (curves[i][b] - curves[i][a]) * (np.arange(places[-1] + 1) - a) / (b - a)
                for a, b in itertools.combinations_with_replacement(places, 2)
                if a <= x <= b and a < b
            ]
            for x in range(places[-1] + 1)
        ]
        return np.array(
            [
                min(chord[x] for chord in chords[x])
                if x not in places
                else min(curves[i][x], min(chord[x] for chord in chords[x]))
                for x in range(places[-1] + 1)
            ]
        )

    hulls = [hull(i) for i in range(len(sizes))]
    cost = sum(h[c] for h, c in zip(hulls, counts, strict=True))
    splits = itertools.product(*(range(len(h)) for h in hulls))
    best = min(
        sum(h[c] for h, c in zip(hulls, split, strict=True))
        for split in splits
        if sum(split) == asked(sizes, sparsity)
    )
    assert cost <= best + 1e-9


def test_measured_beyond_the_grid_is_refused():
    with pytest.raises(InputError, match=r"beyond 0\.5"):
        allocation.measured([10], lambda i, count: 0.0, 0.6, grid=(0.5,))


# --------------------------------------------------------------------- through `compress`


def tree():
    keys = iter(jax.random.split(jax.random.key(3), 4))
    return {
        "blocks": {"kernel": jax.random.normal(next(keys), (2, 8, 16))},
        "head": {"kernel": 3 * jax.random.normal(next(keys), (16, 24))},
        "narrow": {"kernel": jax.random.normal(next(keys), (16, 4))},
    }


def zeros(params):
    return {name: int((np.array(leaf["kernel"]) == 0).sum()) for name, leaf in params.items()}


@pytest.mark.parametrize("allocate", ["global", "erk"])
@pytest.mark.parametrize("scope", ["layer", "row"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:2x4"])
def test_allocations_remove_exactly_the_fraction_of_all(allocate, scope, pattern):
    out = jc.prune(tree(), sparsity=0.45, allocation=allocate, scope=scope, pattern=pattern)
    total = 2 * 8 * 16 + 16 * 24 + 16 * 4
    unit = 1 if pattern == "unstructured" else 8
    assert sum(zeros(out).values()) == unit * int(Fraction("0.45") * (total // unit))
    if scope == "row":
        lost = (np.array(out["head"]["kernel"]) == 0).sum(0)  # kernels are [in, out]
        assert np.ptp(lost) <= max(1, unit // 2)  # one block more is 4 columns more


def test_a_smaller_matrix_keeps_more_under_erk():
    gone = zeros(jc.prune(tree(), sparsity=0.6, allocation="erk"))
    assert gone["narrow"] / 64 < gone["head"] / 384


def test_a_kernels_window_counts_under_erk():
    params = {
        "conv": {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 8, 16))},
        "dense": {"kernel": jax.random.normal(jax.random.key(1), (64, 32))},
    }
    axes = {"conv/kernel": (0, 1, 2), "dense/kernel": (0,)}
    out = jc.prune(params, sparsity=0.8, allocation="erk", axes=axes)
    expected = allocation.erdos_renyi([(16, 8, 3, 3), (32, 64)], 0.8)
    assert [zeros(out)["conv"], zeros(out)["dense"]] == expected.tolist()


def test_scope_global_is_allocation_global():
    by_scope = jc.prune(tree(), sparsity=0.5, scope="global")
    by_allocation = jc.prune(tree(), sparsity=0.5, allocation="global")
    jax.tree.map(np.testing.assert_array_equal, by_scope, by_allocation)


def test_measured_prunes_what_costs_least():
    """Losses are given: pruning `head` costs nothing, the second of the stacked blocks most."""
    params = tree()
    matrices = [
        (jnp.swapaxes(params[name]["kernel"], -1, -2), {"path": name})
        for name in ("blocks", "head", "narrow")
    ]

    costs = [np.array([1.0, 5.0])[:, None, None], 0.0, 2.0]

    def measure(index, prune):
        before = matrices[index][0]
        gone = np.array(prune(before) == 0).reshape(before.shape)
        return float((gone * costs[index]).sum())

    survey = METHODS["magnitude"].survey
    each = survey(lambda: iter(matrices), sparsity=0.6, allocation="measured", measure=measure)
    gone = [np.array(f(m) == 0) for f, (m, _) in zip(each, matrices, strict=True)]
    assert gone[1].sum() == int(0.95 * 384)
    assert gone[0][0].sum() == int(Fraction("0.6") * 704) - int(0.95 * 384)
    assert gone[0][1].sum() == gone[2].sum() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "2:4", "allocation": "erk"}, "removes the same of every matrix"),
        ({"allocation": "owl"}, "score of the activations"),
        ({"allocation": "measured"}, "needs the model"),
    ],
)
def test_what_cannot_be_allocated_is_told(options, words):
    with pytest.raises(InputError, match=words) as caught:
        jc.prune(tree(), **options)
    assert "\n" not in str(caught.value)


def language_model(layers=3, outliers=(0.0, 2.0, 8.0)):
    """Residual blocks of which the later ones have ever heavier weights here and there."""
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def block(scale):
        kernel = jax.random.normal(next(keys), (16, 16)) / 4
        heavy = jax.random.bernoulli(next(keys), 0.03, kernel.shape)
        return {"a": {"kernel": kernel + scale * heavy}, "b": {"kernel": kernel.T}}

    def run(params, hidden):
        return hidden + jnp.tanh(hidden @ params["a"]["kernel"]) @ params["b"]["kernel"]

    params = {
        "table": jax.random.normal(next(keys), (11, 16)),
        "layers": {str(i): block(outliers[i]) for i in range(layers)},
    }
    walk = jc.Blocks(
        embed=lambda params, ids: params["table"][ids],
        block=run,
        head=lambda params, hidden: hidden @ params["table"].T,
    )
    return jc.Model(lambda params, ids: walk.run(params, ids), params, walk)


def test_owl_through_the_walk_spends_less_on_blocks_without_outliers():
    model = language_model()
    ids = np.random.default_rng(0).integers(0, 11, (4, 12))
    small = compress(
        model, "wanda", sparsity=0.5, allocation="owl", calibration=ids, include="layers/**"
    )
    lost = [
        sum(
            int((np.array(leaf["kernel"]) == 0).sum())
            for leaf in small.params["layers"][i].values()
        )
        for i in "012"
    ]
    assert sum(lost) == 3 * 512 // 2
    assert lost[0] > lost[1] > lost[2] or lost[0] > lost[2] > 0
    assert max(lost) / 512 - min(lost) / 512 == pytest.approx(0.16, abs=2 / 512)
