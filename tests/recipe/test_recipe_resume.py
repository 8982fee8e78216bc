"""A recipe that is stopped anywhere, and started again, ends where the unbroken one ends."""

import json

import pytest
from recipe_cases import Killed, assert_same, config, files, kept, killed, toy, training
from tiny import write_llama, write_text

from jaxcompress import methods, recipe
from jaxcompress.checkpoints.huggingface_writer import CheckpointWriter
from jaxcompress.core.errors import InputError
from jaxcompress.layerwise import journal
from jaxcompress.recipe import runner
from jaxcompress.recipe.store import Store
from jaxcompress.training import preemption
from jaxcompress.training.metrics import MetricsLog

EVERY = {"log_every": 1, "checkpoint_every": 2}
STAGES = (
    {"method": "depth", "drop": 1, "calibration_samples": 4},
    training("distill", steps=5, **EVERY),
    {"method": "magnitude", "pattern": "2:4"},
    training(steps=5, **EVERY),
    {"method": "rtn", "bits": 4, "group_size": 16},
    {"method": "export"},
)
NAMES = [f"{i + 1:02d}-{stage['method']}" for i, stage in enumerate(STAGES)]
MAKE_MODELS = NAMES[:5]


@pytest.fixture(scope="module")
def unbroken(texts, toy, tmp_path_factory):
    root = tmp_path_factory.mktemp("unbroken") / "out"
    return root, recipe.run(config(texts, *STAGES), root, model=toy)


def without_times(report):
    """What two runs of the same recipe have in common."""
    kept = json.loads(json.dumps(report))
    for name in ("command", "started", "seconds"):
        del kept[name]
    for stage in kept["stages"]:
        del stage["seconds"]
        for row in stage["layers"]:
            del row["seconds"]
    return kept


def assert_ends_alike(root, report, unbroken):
    for name in MAKE_MODELS:
        assert_same(kept(root, name), kept(unbroken[0], name))
    assert files(root / "export") == files(unbroken[0] / "export")
    assert without_times(report) == without_times(unbroken[1])


def test_stopped_behind_each_stage(unbroken, texts, toy, tmp_path, capsys):
    root, given = tmp_path / "out", config(texts, *STAGES)
    for done in range(len(STAGES)):
        # Before what the stage needs no more is removed; so it is when the run goes on.
        with killed(Store, "clean", 2 if not done else done + 1):
            recipe.run(given, root, model=toy)
        assert Store(root).record(NAMES[done])
        assert done + 1 == len(STAGES) or not Store(root).record(NAMES[done + 1])
    capsys.readouterr()
    report = recipe.run(given, root, model=toy)
    told = capsys.readouterr().out
    assert [f"{name}: done before" in told for name in NAMES] == [True] * len(NAMES)
    assert_ends_alike(root, report, unbroken)
    assert not [p for p in root.rglob("*") if p.name in ("checkpoints", "partial")]


def test_stopped_within_each_stage(unbroken, texts, toy, tmp_path, monkeypatch):
    """One run, stopped eight times: no stage that was done is done again."""
    monkeypatch.setattr(journal, "MATRICES", 1)
    root, given = tmp_path / "out", config(texts, *STAGES)

    def run():
        return recipe.run(given, root, model=toy)

    with killed(runner, "measure", 1):  # at the very beginning
        run()
    with killed(Store, "finish", 2):  # the layer is dropped and measured, but not kept
        run()
    with killed(MetricsLog, "write", 4):  # distilling, behind the checkpoint of step 2
        run()
    assert not Store(root).record("02-distill")
    with killed(MetricsLog, "write", 2) as steps:  # it goes on at step 3, and stops at step 4
        run()
    assert steps[0] == 2
    with killed(methods.Run, "__call__", 3):  # the third matrix of magnitude
        run()
    assert len(list((root / "stages" / "03-magnitude" / "partial").glob("*.json"))) == 2
    with killed(MetricsLog, "write", 1):  # fine-tuning, before any checkpoint
        run()
    with killed(methods.Run, "__call__", 3):  # the third matrix of rtn
        run()
    with killed(CheckpointWriter, "_close_shard", 2):  # exporting; the first is the last matrix's
        run()
    assert not (root / "export").exists()
    report = run()
    assert_ends_alike(root, report, unbroken)
    assert not [p for p in root.rglob("*") if "partial" in p.name or p.name == "checkpoints"]


def test_a_matrix_that_was_done_is_not_done_again(texts, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "MATRICES", 1)
    given = config(texts, {"method": "rtn", "group_size": 16})
    with killed(methods.Run, "__call__", 3):
        recipe.run(given, tmp_path / "out", model=toy)
    done = []
    original = methods.Run.__call__

    def noting(self, problem):
        done.append(problem.path)
        return original(self, problem)

    monkeypatch.setattr(methods.Run, "__call__", noting)
    report = recipe.run(given, tmp_path / "out", model=toy)
    assert done == ["layers/1/kernel", "layers/2/kernel"]
    assert all(row["seconds"] > 0 for row in report["stages"][1]["layers"])


def test_asked_to_stop_it_stops_at_a_checkpoint(texts, toy, tmp_path, monkeypatch):
    root, given = tmp_path / "out", config(texts, training(steps=5))
    with monkeypatch.context() as patch:
        patch.setattr(preemption.Preemption, "requested", lambda self: True)
        with pytest.raises(preemption.Preempted, match="step 1 of 5"):
            recipe.run(given, root, model=toy)
    recipe.run(given, root, model=toy)
    recipe.run(given, tmp_path / "whole", model=toy)
    assert_same(*(kept(tmp_path / name, "01-finetune") for name in ("out", "whole")))


def test_a_second_run_does_nothing_and_says_so(unbroken, texts, toy, capsys, monkeypatch):
    def never(*args, **options):
        raise Killed

    monkeypatch.setattr(runner, "measure", never)
    monkeypatch.setattr(runner, "write_report", never)
    times = {p: p.stat().st_mtime_ns for p in unbroken[0].rglob("*")}
    report = recipe.run(config(texts, *STAGES), unbroken[0], model=toy)
    assert report == json.loads((unbroken[0] / "report.json").read_text())
    assert "all 6 stages were done before; nothing to do" in capsys.readouterr().out
    assert times == {p: p.stat().st_mtime_ns for p in unbroken[0].rglob("*")}


def test_a_report_that_is_behind_is_written_again(unbroken, texts, toy, tmp_path):
    import shutil

    root = tmp_path / "out"
    shutil.copytree(unbroken[0], root)
    (root / "report.html").unlink()
    report = recipe.run(config(texts, *STAGES), root, model=toy)
    assert (root / "report.html").is_file()
    assert without_times(report) == without_times(unbroken[1])


CHANGES = {
    "an option": (
        lambda given: given["stages"][1].update(steps=6),
        "config.stages[1].steps: 5 before, 6 now",
    ),
    "a stage less": (
        lambda given: given["stages"].pop(),
        "config.stages: 6 entries before, 5 now",
    ),
    "the seed": (lambda given: given.update(seed=6), "config.seed: 5 before, 6 now"),
    "two": (
        lambda given: given.update(seed=6, name="other"),
        'config.name: "toy" before, "other" now; config.seed: 5 before, 6 now',
    ),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_another_config_is_refused(change, said, unbroken, texts, toy):
    given = config(texts, *STAGES)
    given["stages"] = [dict(stage) for stage in STAGES]
    change(given)
    before = files(unbroken[0])
    with pytest.raises(InputError) as error:
        recipe.run(given, unbroken[0], model=toy)
    assert "holds a run of another config: " in str(error.value)
    assert said in str(error.value)
    assert files(unbroken[0]) == before


def test_other_weights_are_refused(unbroken, texts, toy):
    params = {**toy.params, "embed": toy.params["embed"].at[0, 0].add(1e-3)}
    with pytest.raises(InputError, match=r"input\.model: .* before, .* now"):
        recipe.run(config(texts, *STAGES), unbroken[0], model=toy.replace(params=params))


def test_other_data_and_other_checkpoints_are_refused(texts, tmp_path):
    """A text of the same name, a model and a teacher in the same place."""
    text = write_text(tmp_path / "train.txt", 20)
    llama, teacher = (write_llama(tmp_path / name, layers=1) for name in ("llama", "teacher"))
    given = config(
        {**texts, "train": str(text)},
        training("distill", teacher=str(teacher)),
        model={"path": str(llama)},
    )
    prepared = runner.prepare(recipe.read_config(given))
    Store(tmp_path / "out").begin(prepared.recipe, prepared.about())

    def refused(field):
        again = runner.prepare(recipe.read_config(given))
        with pytest.raises(InputError, match=field):
            Store(tmp_path / "out").begin(again.recipe, again.about())

    write_llama(teacher, layers=1, seed=1)
    refused("input.teachers.*teacher: ")
    write_llama(teacher, layers=1)
    write_llama(llama, layers=1, seed=1)
    refused("input.model: ")
    write_llama(llama, layers=1)
    text.write_text(text.read_text().replace("river", "rivers"))
    refused("input.data.train: ")


def test_another_model_in_memory_is_another_function_of_the_same_name(texts, tmp_path):
    """Restored parameters go into the function that is given, whatever object it is."""
    given = config(texts, {"method": "rtn", "group_size": 16}, training(train="scales", steps=1))
    with killed(Store, "finish", 2, after=True):
        recipe.run(given, tmp_path / "out", model=toy())
    recipe.run(given, tmp_path / "out", model=toy())
    recipe.run(given, tmp_path / "whole", model=toy())
    assert_same(*(kept(tmp_path / name, "02-finetune") for name in ("out", "whole")))
