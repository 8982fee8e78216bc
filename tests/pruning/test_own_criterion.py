"""A criterion of a user's own: a function, and `compress` takes it with every pattern and scope.

`CONTRIBUTING.md` promises no more than that function, its name in a registry and a line of test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.methods import METHODS
from jaxcompress.pruning import scores
from jaxcompress.pruning.unstructured import method

N, K = 16, 24


def gblm(
    weight: jax.Array, sum_squares: jax.Array, squared_gradient: jax.Array, *, alpha: float = 100.0
) -> jax.Array:
    """GBLM: the smallest |w| (||x|| + alpha ||dL/dw||) go.

    Source: Das et al., arXiv:2311.04902, equation 5.

    Args:
      weight: `[*lead, N, K]`.
      sum_squares: of each input over the tokens, `[*lead, K]`.
      squared_gradient: mean over sequences, `[*lead, N, K]`.
      alpha: how much gradients count beside the inputs.
    """
    inputs = jnp.sqrt(sum_squares)[..., None, :]
    return jnp.abs(weight) * (inputs + alpha * jnp.sqrt(squared_gradient))


def apply(params, ids):
    hidden = params["table"][ids]
    hidden = jnp.tanh(hidden @ params["first"]["kernel"])
    return hidden @ params["second"]["kernel"]


def model():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "table": jax.random.normal(keys[0], (10, K)),
        "first": {"kernel": jax.random.normal(keys[1], (K, N))},
        "second": {"kernel": jax.random.normal(keys[2], (N, 10))},
    }
    return jc.Model(apply, params)


IDS = np.random.default_rng(0).integers(0, 10, (6, 8))


def expected_scores(alpha):
    """Of the first matrix `[N, K]`, by autograd sequence by sequence."""
    params = jax.tree.map(jnp.asarray, model().params)

    def loss(params, ids):
        logp = jax.nn.log_softmax(apply(params, ids[None])[0, :-1])
        return -jnp.take_along_axis(logp, ids[1:, None], axis=-1).mean()

    gradients = [jax.grad(loss)(params, row)["first"]["kernel"].T for row in IDS]
    fisher = np.mean(np.square(np.array(gradients, np.float64)), axis=0)
    norms = np.linalg.norm(np.array(params["table"])[IDS].reshape(-1, K), axis=0)
    return np.abs(params["first"]["kernel"].T) * (norms + alpha * np.sqrt(fisher))


def pruned(own, **options):
    small = jc.compress(
        model(), own, include="*/kernel", calibration=IDS, sequential="none", **options
    )
    return {name: np.array(small.params[name]["kernel"]).T for name in ("first", "second")}


def test_the_lowest_of_its_scores_go_and_its_options_are_options():
    for alpha in (0.0, 3.0):
        out = pruned(method(gblm), sparsity=0.5, alpha=alpha)["first"]
        order = np.argsort(expected_scores(alpha).reshape(-1), kind="stable")
        mask = np.ones(N * K, bool)
        mask[order[: N * K // 2]] = False
        np.testing.assert_array_equal(out != 0, mask.reshape(N, K))


@pytest.mark.parametrize("scope", ["layer", "row", "global"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:2x2"])
def test_every_pattern_and_scope(pattern, scope):
    out = pruned(method(gblm, scope=scope), pattern=pattern, sparsity=0.5)
    sizes = {name: matrix.size for name, matrix in out.items()}
    zeros = {name: int((matrix == 0).sum()) for name, matrix in out.items()}
    if pattern == "2:4":
        for matrix in out.values():
            assert ((matrix.reshape(-1, 4) != 0).sum(1) == 2).all()
    elif scope == "global":
        assert sum(zeros.values()) == sum(sizes.values()) // 2
    else:
        assert zeros == {name: size // 2 for name, size in sizes.items()}
    if pattern.startswith("block"):
        for matrix in out.values():
            blocks = (matrix == 0).reshape(matrix.shape[0] // 2, 2, -1, 2).sum((1, 3))
            assert set(np.unique(blocks)) <= {0, 4}
    if scope == "row" and pattern == "unstructured":
        assert all(((m == 0).sum(1) == m.shape[1] // 2).all() for m in out.values())


@pytest.mark.parametrize("allocation", ["erk", "owl", "global"])
def test_every_allocation(allocation):
    out = pruned(method(gblm), sparsity=0.5, allocation=allocation)
    assert sum(int((m == 0).sum()) for m in out.values()) == sum(m.size for m in out.values()) // 2


def test_the_measured_allocation():
    out = pruned(method(gblm), sparsity=0.25, allocation="measured")
    assert sum(int((m == 0).sum()) for m in out.values()) == sum(m.size for m in out.values()) // 4


@pytest.mark.parametrize("store", ["masked", "sparse", "bitmask", "csr"])
def test_every_storage_holds_the_same(store):
    zeros = pruned(method(gblm), sparsity=0.5)
    small = jc.compress(
        model(),
        method(gblm),
        include="*/kernel",
        calibration=IDS,
        sequential="none",
        sparsity=0.5,
        store=store,
    )
    for name, matrix in zeros.items():
        np.testing.assert_array_equal(jc.dense(small.params[name]["kernel"]).T, matrix)


def test_without_data_it_says_what_it_needs_by_its_name():
    with pytest.raises(jc.InputError, match="gblm: needs calibration data"):
        jc.compress(model(), method(gblm), include="*/kernel")
    with pytest.raises(jc.InputError, match=r"gblm: no option 'alpa'.*alpha"):
        jc.compress(model(), method(gblm), include="*/kernel", calibration=IDS, alpa=1.0)


def test_a_method_of_ones_own_needs_no_data_where_its_score_needs_none():
    def smallest(weight: jax.Array) -> jax.Array:
        """The largest go."""
        return -jnp.abs(weight)

    small = jc.compress(model(), method(smallest), include="first/kernel", sparsity=0.25)
    before = np.abs(np.array(model().params["first"]["kernel"]))
    gone = np.array(small.params["first"]["kernel"]) == 0
    assert before[gone].min() >= before[~gone].max()


def test_the_registry_is_all_that_a_name_takes():
    """A function in SCORES is a method of its name: nothing else lists the criteria."""
    assert set(scores.SCORES) <= set(METHODS)
    for name, score in scores.SCORES.items():
        assert METHODS[name].score is score
        assert METHODS[name].summary == (score.__doc__ or "").split("\n")[0]
