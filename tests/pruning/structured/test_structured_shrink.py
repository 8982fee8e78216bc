"""Depth and width under one budget."""

import jax
import numpy as np
import pytest
import structured_cases as cases

from jaxcompress.core.errors import InputError
from jaxcompress.core.flops import flops
from jaxcompress.models import build_model
from jaxcompress.pruning.structured.budget import Costs, MeasuredLoss, State, record
from jaxcompress.pruning.structured.cutting import Cut, Settings
from jaxcompress.pruning.structured.data import data_of
from jaxcompress.pruning.structured.shrink import _parts, shrink


def parameters(model):
    return sum(x.size for x in jax.tree.leaves(model.params))


def operations(model, inputs):
    return flops(model.apply, model.params, inputs).total


@pytest.fixture(scope="module")
def llama():
    config = type(cases.CONFIGS["llama"])(
        **{**vars(cases.CONFIGS["llama"]), "num_hidden_layers": 3, "windows": ()}
    )
    model = build_model(config, seed=5)
    return model, cases.inputs_of(model, samples=8, length=9)


@pytest.mark.parametrize(
    ("cost", "measure", "kinds"),
    [
        pytest.param("parameters", "loss", "all", marks=pytest.mark.slow),
        ("flops", "loss", "depth,neurons"),
        ("parameters", "taylor", "heads,neurons,width"),
    ],
)
def test_the_budget_is_kept(llama, cost, measure, kinds):
    model, ids = llama
    small = shrink(
        model, calibration=ids, budget=0.6, cost=cost, measure=measure, kinds=kinds, multiple=4
    )
    count = parameters if cost == "parameters" else (lambda m: operations(m, ids))
    assert count(small) <= 0.6 * count(model)
    assert count(small) >= 0.35 * count(model)  # steps are small: no more goes than asked
    assert build_model(small.config, small.params)(ids).shape == (8, 9, cases.VOCAB)
    if kinds != "all":
        kept = {
            "depth": "num_hidden_layers",
            "width": "hidden_size",
            "heads": "num_attention_heads",
        }
        for axis, field in kept.items():
            if axis not in kinds:
                assert getattr(small.config, field) == getattr(model.config, field)
    steps = [note for note in small.notes if note.startswith("shrink:")]
    assert len(steps) > 2


@pytest.mark.parametrize("stacked", [False, True])
def test_costs_are_those_of_the_model_that_is_built(llama, stacked):
    model, ids = llama
    if stacked:
        from jaxcompress.models import with_scan_layers

        model = with_scan_layers(model, True)
    cut = Cut.of(model, data_of(model, ids))
    parts = _parts(cut, Settings(score="magnitude", multiple=4), {"width", "neurons"})
    counts = tuple(part.size // 2 for part in parts)
    small = shrink_to(model, cut, parts, counts)
    state = State((0, 1, 2), counts)
    assert Costs(cut, parts, "parameters")(state) == parameters(small)
    assert Costs(cut, parts, "flops")(state) == operations(small, ids)
    shallow = State((0, 2), counts)
    one = operations(small, ids) - Costs(cut, parts, "flops")(shallow)
    assert 0.15 < one / operations(small, ids) < 0.34


def shrink_to(model, cut, parts, counts):
    groups = [g for part in parts for g in part.groups]
    indices = [i for part, n in zip(parts, counts) for i in part.indices(n)]
    return cut.result(groups, indices, Settings(), "test")


def test_the_measured_loss_is_that_of_the_masked_network(llama):
    model, ids = llama
    cut = Cut.of(model, data_of(model, ids))
    parts = _parts(cut, Settings(score="magnitude", multiple=4), {"neurons"})
    loss = MeasuredLoss(cut, parts, data_of(model, ids), depth=True)
    small = shrink_to(model, cut, parts, (20,))
    logits = np.asarray(jax.nn.log_softmax(small(ids[:, :-1])), np.float64)
    expected = -np.take_along_axis(logits, ids[:, 1:, None], -1).mean()
    np.testing.assert_allclose(loss(State((0, 1, 2), (20,))), expected, rtol=1e-5)
    assert record(parts, State((0, 1, 2), (20,)))


def test_filters_of_each_layer_have_their_own_count():
    model = cases.reference("resnet_b")
    images = cases.inputs_of(model, samples=8)
    labels = np.arange(8, dtype=np.int32)
    small = shrink(
        model, calibration=(images, labels), budget=0.8, cost="flops", multiple=2, score="taylor"
    )
    assert operations(small, images) <= 0.8 * operations(model, images)
    assert small.config.widths == model.config.widths


def test_a_strangers_network_shrinks():
    model = cases.plain_model()
    ids = np.random.default_rng(0).integers(0, cases.VOCAB, (4, 6)).astype(np.int32)
    small = shrink(model, calibration=ids, budget=0.8, multiple=2)
    assert parameters(small) <= 0.8 * parameters(model)


def test_refusals(llama):
    model, ids = llama
    with pytest.raises(InputError, match=r"budget 1\.5"):
        shrink(model, calibration=ids, budget=1.5)
    with pytest.raises(InputError, match="kinds 'height'"):
        shrink(model, calibration=ids, kinds="height")
    with pytest.raises(InputError, match="nothing is left to cut"):
        shrink(model, calibration=ids, budget=0.01, kinds="neurons", measure="taylor", multiple=8)
