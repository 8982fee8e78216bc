"""Every stage that prunes while it trains, or step by step, in one small recipe."""

import jax
import numpy as np
import pytest
from recipe_cases import CTX, assert_same, buffers, config, kept, training

from jaxcompress import recipe
from jaxcompress.core.errors import InputError
from jaxcompress.data.batches import Batches
from jaxcompress.data.language import text_dataset
from jaxcompress.pruning import schedules
from jaxcompress.recipe import schedule_stages
from jaxcompress.recipe.config import read_config
from jaxcompress.recipe.runner import prepare
from jaxcompress.training.mesh import make_mesh
from jaxcompress.training.objective import next_token
from jaxcompress.training.settings import Training, train
from jaxcompress.training.transform import Transform

ONE = "layers/1/kernel"
STAGES = (
    training("gradual", sparsity=0.6, interval=1, matrices=ONE),
    training(),
    training("rigl", sparsity=0.7, interval=1, matrices="layers/0/kernel"),
    training("set", sparsity=0.7, interval=1, end=1, matrices="layers/2/kernel"),
    training("group_lasso", strength=12.0, groups="rows", matrices="head/kernel"),
    training("l1", strength=1.0, matrices="layers/2/kernel"),
    training("sr_ste", pattern="2:4", matrices=ONE),
    training("movement", sparsity=0.5, interval=1, matrices="layers/*/kernel"),
    training("soft_movement", threshold=0.45, strength=0.01, score_rate=0.1, matrices=ONE),
    training("l0", start=0.15, gate_rate=1.0, strength=0.1, matrices=ONE),
    training("learned_n_m", pattern="1:4", train="gates", matrices=ONE),
    training("lottery", sparsity=0.6, rounds=2, rewind=1, matrices="layers/*/kernel"),
    training("iterative", prune={"method": "random"}, sparsity=0.75, rounds=2),
    {
        "method": "greedy",
        "candidates": (
            {"method": "magnitude", "sparsity": 0.99, "include": "head/kernel"},
            {"method": "rtn", "bits": 8, "group_size": 16, "include": "head/kernel"},
        ),
        "validation_samples": 4,
    },
    training(
        "iterative",
        prune={"method": "depth", "calibration_samples": 4},
        sparsity=0.67,
        rounds=2,
        progression="linear",
        steps=1,
    ),
)
NAMES = [f"{i + 1:02d}-{stage['method']}" for i, stage in enumerate(STAGES)]


@pytest.fixture(scope="module")
def ran(texts, toy, tmp_path_factory):
    root = tmp_path_factory.mktemp("schedules") / "out"
    report = recipe.run(config(texts, *STAGES), root, model=toy)
    return [kept(root, name) for name in NAMES], report


def zeros(params, path=ONE):
    return float((params[path] == 0).mean())


def test_each_stage_leaves_the_zeros_that_it_was_asked_for(ran):
    after, _ = ran
    assert zeros(after[0]) == int(0.6 * 1024) / 1024
    np.testing.assert_array_equal(after[0][ONE] == 0, after[1][ONE] == 0)  # finetuned
    for stage, path in ((2, "layers/0/kernel"), (3, "layers/2/kernel")):
        assert zeros(after[stage], path) == pytest.approx(0.7, abs=0.001)
        assert zeros(after[stage]) == zeros(after[0])  # the others keep theirs
    gone = (after[4]["head/kernel"] == 0).all(0)
    assert 0 < gone.sum() < len(gone)
    assert zeros(after[5], "layers/2/kernel") > zeros(after[4], "layers/2/kernel")
    np.testing.assert_array_equal((after[6][ONE].T.reshape(-1, 4) != 0).sum(1), 2)
    for i in range(3):
        assert zeros(after[7], f"layers/{i}/kernel") == 0.5
    assert 0.05 < zeros(after[8]) < 1
    assert 0.1 < zeros(after[9]) < 0.9  # of gates that had all been alike
    assert ((after[10][ONE].T.reshape(-1, 4) != 0).sum(1) <= 1).all()
    for i in (0, 2):
        assert zeros(after[11], f"layers/{i}/kernel") == pytest.approx(0.6, abs=0.002)
    assert ((after[11][ONE] == 0) >= (after[10][ONE] == 0)).all()  # it had more zeros than that
    for path in ("layers/0/kernel", "head/kernel"):
        assert zeros(after[12], path) == pytest.approx(0.75, abs=0.002)
        assert ((after[12][path] == 0) | (after[11][path] != 0)).all()  # zeros stay
    assert "head/kernel/codes" in after[13]  # rounding cost less than removing
    assert {path.split("/")[1] for path in after[14] if path.startswith("layers/")} == {"0"}


def test_the_report_tells_what_became_zero(ran):
    _, report = ran
    notes = {stage["name"]: stage.get("notes", []) for stage in report["stages"]}
    assert any("head/kernel: " in n and "columns" in n for n in notes["05-group_lasso"])
    assert any(n.startswith("greedy: kept 2-rtn of: 1-magnitude") for n in notes["14-greedy"])
    losses = {stage["name"]: stage["losses"] for stage in report["stages"]}
    assert [row["step"] for row in losses["13-iterative"]] == [3, 6]
    assert losses["12-lottery"][-1]["step"] == 3 + 2 * 2


def test_a_stage_is_the_schedule_called_by_hand(ran, texts, toy, tmp_path):
    rows = text_dataset(texts["train"], toy.tokenizer, CTX)
    where = schedules.targets(toy, np.zeros((1, CTX), np.int32), include=ONE)

    def gradual(inner):
        return schedules.gradual(inner, where, sparsity=0.6, begin=0, end=2, interval=1)

    by_hand = train(
        toy, next_token(toy), Batches(rows, 8, seed=5),
        Training(steps=3, batch_size=8, learning_rate=1e-2), workdir=tmp_path, mesh=make_mesh(),
        seed=5, transform=Transform(gradual, paths=tuple(where)),
    )  # fmt: skip
    assert_same(ran[0][0], buffers(by_hand.params))


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        (training("gradual", sparsity=1.5), r"config.stages\[0\].sparsity 1.5"),
        (training("gradual", sparsty=0.5), "gradual has no such option"),
        (training("gradual", matrices="nothing/*"), "nothing"),
        (training("sr_ste", pattern="2:5"), "pattern 2:5"),
        (training("learned_n_m", pattern="1:3"), "pattern 1:3"),
        (training("group_lasso", groups="block:5x5"), "groups block:5x5"),
        (training("lottery", rewind=3), "rounds 5, rewind 3"),
        (training("iterative", rounds=0), "rounds 0"),
        (training("iterative", prune={"method": "magnitud"}), "magnitud"),
        (training("iterative", prune={"method": "magnitude", "size": 1}), "magnitude.size"),
        ({"method": "greedy", "candidates": ()}, "candidates"),
        ({"method": "greedy"}, "candidates"),
    ],
)
def test_what_is_wrong_is_refused_before_any_work(texts, toy, stage, text):
    with pytest.raises(InputError, match=text) as caught:
        prepare(read_config(config(texts, stage)), toy)
    assert "\n" not in str(caught.value)


def test_options_of_a_stage_are_those_of_its_schedule():
    assert set(schedule_stages.SCHEDULES) <= set(recipe.stages.STAGES)
    known = recipe.stages.options_of("rigl")
    assert {"sparsity", "fraction", "matrices", "spared", "learning_rate", "wins_back"} <= set(
        known
    )
    assert jax.tree.leaves(known)
