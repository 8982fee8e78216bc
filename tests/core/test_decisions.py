"""What methods tell of their decisions: their own scores and masks, and only to who listens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.core import decisions
from jaxcompress.core.decisions import SIDE, UNITS, Decision, averaged, listening
from jaxcompress.core.model import Blocks, Model
from jaxcompress.methods import compress
from jaxcompress.pruning.depth import layer_scores
from jaxcompress.pruning.structured import Settings, decide

WIDTH, LAYERS = 8, 3


def block(layer, hidden):
    return hidden + jax.nn.relu(hidden @ layer["up"]["kernel"]) @ layer["down"]["kernel"]


def model():
    keys = iter(jax.random.split(jax.random.key(0), 2 * LAYERS + 2))
    layers = {
        str(i): {
            "up": {"kernel": jax.random.normal(next(keys), (WIDTH, 2 * WIDTH))},
            "down": {"kernel": jax.random.normal(next(keys), (2 * WIDTH, WIDTH)) * (i + 1) / 8},
        }
        for i in range(LAYERS)
    }
    params = {"embed": jax.random.normal(next(keys), (16, WIDTH)), "layers": layers}
    walk = Blocks(
        embed=lambda params, ids: params["embed"][ids],
        block=block,
        head=lambda params, hidden: hidden @ params["embed"].T,
        where="layers",
    )
    return Model(walk.run, params, blocks=walk)


IDS = np.random.default_rng(0).integers(0, 16, (4, 6))


def heard(method, wanted=lambda path: True, **options):
    found = []
    with listening(found.append, wanted):
        small = compress(model(), method, calibration=IDS, **options)
    return found, small


def test_scores_and_masks_are_those_of_the_method():
    found, small = heard("wanda", sparsity=0.5, sequential="none")
    assert {d.where for d in found} == {
        f"layers/{i}/{kind}/kernel" for i in range(LAYERS) for kind in ("down", "up")
    }
    params = model().params
    inputs = np.array(params["embed"])[IDS].reshape(-1, WIDTH)
    weight = np.array(params["layers"]["0"]["up"]["kernel"]).T
    scores = np.abs(weight) * np.linalg.norm(inputs, axis=0)
    told = next(d for d in found if d.where == "layers/0/up/kernel")
    assert (told.what, told.by, told.size) == ("weights", "wanda", (2 * WIDTH, WIDTH))
    clipped = np.clip(scores, told.low, told.high)
    np.testing.assert_allclose(
        told.scores, (clipped - told.low) / (told.high - told.low), atol=1e-5
    )
    mask = np.array(small.params["layers"]["0"]["up"]["kernel"]).T != 0
    np.testing.assert_array_equal(told.kept, mask)


def test_only_wanted_matrices_are_told_and_nothing_changes():
    found, small = heard("magnitude", lambda path: path.startswith("layers/1/up"))
    assert [d.where for d in found] == ["layers/1/up/kernel"]
    plain = compress(model(), "magnitude")
    jax.tree.map(np.testing.assert_array_equal, small.params, plain.params)
    assert not decisions.is_wanted("layers/1/up/kernel")  # nobody listens any more


def test_neurons_are_told_with_their_scores():
    found, _ = heard("neurons", sparsity=0.25)
    made = decide(model(), "neurons", IDS, Settings(sparsity=0.25))
    assert len(found) == len(made.groups) == LAYERS
    for told, group, scores, kept in zip(found, made.groups, made.scores, made.kept, strict=True):
        assert (told.what, told.where, told.by) == ("neurons", group.name, "magnitude")
        np.testing.assert_array_equal(np.flatnonzero(told.kept[0]), kept)
        np.testing.assert_array_equal(np.argsort(told.scores[0]), np.argsort(scores))
        assert told.low == pytest.approx(scores.min())


@pytest.mark.parametrize("score", ["block_influence", "angular", "perplexity"])
def test_layers_are_told_with_their_scores(score):
    (told,), small = heard("depth", drop=1, score=score)
    assert (told.what, told.size) == ("layers", (1, LAYERS))
    gone = int(np.flatnonzero(told.kept[0] == 0)[0])
    assert f"[{gone}]" in small.notes[-1]
    assert told.scores[0, gone] == told.scores.min()
    if score == "block_influence":
        np.testing.assert_allclose(
            told.low + (told.high - told.low) * told.scores[0],
            layer_scores(model(), IDS),
            rtol=1e-5,
        )


def test_a_large_matrix_is_told_as_means_of_blocks():
    values = np.random.default_rng(0).normal(size=(2 * SIDE, 3 * SIDE))
    blocks = values.reshape(SIDE, 2, SIDE, 3).mean((1, 3))
    np.testing.assert_allclose(averaged(values, SIDE, SIDE), blocks, atol=1e-12)
    assert averaged(np.ones((SIDE + 1, 7)), SIDE, SIDE).shape == (SIDE, 7)
    assert (averaged(np.ones((SIDE + 1, 7)), SIDE, SIDE) == 1).all()
    told = Decision.of("weights", "w", "magnitude", values, values > 0)
    assert told.scores.shape == (SIDE, SIDE)
    assert told.kept.mean() == pytest.approx((values > 0).mean())
    assert Decision.of("neurons", "n", "x", np.arange(400), np.ones(400)).scores.shape == (1, 400)
    assert Decision.of("neurons", "n", "x", np.arange(900), np.ones(900)).size == (1, 900)
    assert Decision.of("neurons", "n", "x", np.arange(900), np.ones(900)).kept.shape == (1, UNITS)


def test_a_record_gives_the_maps_back_in_256_steps():
    rng = np.random.default_rng(1)
    told = Decision.of(
        "weights", "a/b", "taylor", rng.normal(size=(5, 9)), rng.random((5, 9)) > 0.5
    )
    again = Decision.read(told.record())
    assert (again.where, again.by, again.size, again.low) == ("a/b", "taylor", (5, 9), told.low)
    np.testing.assert_allclose(again.scores, told.scores, atol=0.5 / 255 + 1e-9)
    np.testing.assert_array_equal(again.kept, told.kept)


def test_equal_scores_are_a_map_too():
    told = Decision.of("heads", "h", "random", jnp.ones(4), [True] * 4)
    assert (told.scores == 0).all()
    assert (told.low, told.high) == (1.0, 1.0)
