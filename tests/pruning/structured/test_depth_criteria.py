"""Depth by angles of runs and greedily by the loss, against NumPy and brute force."""

import itertools

import jax
import numpy as np
import pytest
import structured_cases as cases

from jaxcompress.core.errors import InputError
from jaxcompress.models import build_model, take_layers
from jaxcompress.pruning.depth import angular_distances, depth, depth_shapes, greedy_by_loss


@pytest.fixture(scope="module")
def four_layers():
    config = type(cases.CONFIGS["llama"])(
        **{
            **vars(cases.CONFIGS["llama"]),
            "num_hidden_layers": 4,
            "windows": (),
            "scan_layers": True,
        }
    )
    model = build_model(config, seed=5)
    return model, cases.inputs_of(model, samples=10, length=9)


def test_angular_distance_of_runs(four_layers):
    model, ids = four_layers
    hidden = [model.blocks.embed(model.params, ids)]
    for block in model.blocks.of(model.params):
        hidden.append(model.blocks.block(block, hidden[-1]))
    last = [np.asarray(h, np.float64)[:, -1] for h in hidden]
    for run in (1, 2, 3):
        expected = []
        for a, b in zip(last, last[run:]):
            cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            expected.append(np.mean(np.arccos(cosine) / np.pi))
        np.testing.assert_allclose(angular_distances(model, ids, run), expected, atol=1e-5)
    small = depth(model, calibration=ids, drop=2, score="angular")
    start = int(np.argmin(angular_distances(model, ids, 2)))
    assert f"dropped layers [{start}, {start + 1}]" in small.notes[-1]


def mean_loss(model, ids):
    logits = np.asarray(jax.nn.log_softmax(model(ids[:, :-1])), np.float64)
    return -np.take_along_axis(logits, ids[:, 1:, None], -1).mean()


def test_greedy_by_the_loss_is_brute_force(four_layers):
    model, ids = four_layers
    gone, losses = greedy_by_loss(model, ids, 2)
    alone = {
        i: mean_loss(take_layers(model, [j for j in range(4) if j != i]), ids) for i in range(4)
    }
    first = min(alone, key=alone.get)
    second = {
        i: mean_loss(take_layers(model, [j for j in range(4) if j not in (i, first)]), ids)
        for i in set(range(4)) - {first}
    }
    assert gone == sorted([first, min(second, key=second.get)])
    np.testing.assert_allclose(losses, [alone[first], min(second.values())], rtol=1e-5)
    pairs = itertools.combinations(range(4), 2)
    assert losses[1] >= min(mean_loss(take_layers(model, p), ids) for p in pairs) - 1e-5


def test_a_fraction_of_the_layers(four_layers):
    model, ids = four_layers
    assert depth(model, calibration=ids, sparsity=0.5).config.num_hidden_layers == 2
    assert depth_shapes(model, sparsity=0.25).config.num_hidden_layers == 3
    with pytest.raises(InputError, match="drop 4"):
        depth(model, calibration=ids, drop=4)
    with pytest.raises(InputError, match="token ids"):
        depth(model, calibration=ids.astype(np.float32)[..., None], score="perplexity")
