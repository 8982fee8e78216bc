"""Sweeps: rows that are what `compress` and `evaluate` give, a killed one that goes on, figures."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from recipe_cases import CTX, VOCAB, WIDTH
from tiny import write_llama, write_text

import jaxcompress as jc
from jaxcompress.cli import main
from jaxcompress.core.errors import InputError
from jaxcompress.data.text import calibration_batch, token_ids
from jaxcompress.recipe.sweep import ROWS, Task, middle_matrix, sweep
from jaxcompress.recipe.sweep_plan import Swept

METHODS = ("magnitude", "wanda:allocation=owl", "svd", "depth", "grasp:sparsity=0.5")


@pytest.fixture(scope="module")
def task(texts, toy):
    heldout = token_ids(texts["heldout"], toy.tokenizer)[:320]
    calibration = calibration_batch(texts["train"], toy.tokenizer, samples=4, ctx=CTX)
    return Task(toy, heldout, calibration, ctx=CTX)


@pytest.fixture(scope="module")
def swept(task, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new"
    return out, sweep(task, out, METHODS, sparsities=[0.25, 0.5])


def row_of(rows, label, **options):
    (found,) = [r for r in rows if r["method"] == label and r["options"] == options]
    return found


def test_a_row_is_what_compress_and_evaluate_give(task, swept):
    rows = swept[1]
    small = jc.compress(
        task.model, "wanda", sparsity=0.25, allocation="owl", calibration=task.calibration
    )
    row = row_of(rows, "wanda:allocation=owl", sparsity=0.25, allocation="owl")
    for role, ids in (("heldout", task.heldout), ("train", task.calibration)):
        expected = jc.evaluate(small, text=np.ravel(ids), ctx=CTX)["perplexity"]
        assert row["quality"][role]["perplexity"] == pytest.approx(expected, rel=1e-6)
    kernels = [r for r in jc.inspect(small)["tensors"] if r["name"].endswith("kernel")]
    gone = sum(r["sparsity"] * np.prod(r["shape"]) for r in kernels)
    assert row["removed"] == pytest.approx(gone / sum(np.prod(r["shape"]) for r in kernels))
    assert row["of"] == "the weights of the matrices"
    assert len(row["quality"]["heldout"]["slices"]) == 5


def test_how_much_went_is_told_in_what_goes(task, swept):
    rows = swept[1]
    whole = 2 * VOCAB * WIDTH + 3 * WIDTH**2
    row = row_of(rows, "depth", drop=1)
    assert row["removed"] == pytest.approx(WIDTH**2 / whole)
    assert row["of"] == "the model's parameters"
    factors = row_of(rows, "svd", ratio=0.5)
    assert 0.5 <= factors["removed"] < 0.6  # whole ranks
    assert factors["of"] == "the bytes of the matrices"


def test_strengths_and_patterns(swept):
    runs = [(r["method"], r["options"]) for r in swept[1][1:]]
    assert [o for m, o in runs if m == "magnitude"] == [
        {"sparsity": 0.25},
        {"sparsity": 0.5},
        {"pattern": "2:4"},
    ]
    assert [o for m, o in runs if m == "svd"] == [{"ratio": 0.75}, {"ratio": 0.5}]
    assert [o for m, o in runs if m == "depth"] == [{"drop": 1}]
    assert [o["sparsity"] for m, o in runs if m.startswith("grasp") and "pattern" not in o] == [0.5]


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("kmeans", [{"bits": b} for b in (8, 6, 5, 4, 3, 2)]),
        ("shrink", [{"budget": 0.7}, {"budget": 0.5}]),
        ("depth:score=angular", [{"score": "angular", "drop": 1}]),
        ("share", [{"layers": 2}]),
        ("wanda:pattern=2:4", [{"pattern": "2:4"}]),
        (
            "taylor:pattern=block:2x2:scope=row",
            [{"pattern": "block:2x2", "scope": "row", "sparsity": s} for s in (0.3, 0.5)],
        ),
    ],
)
def test_the_option_that_says_how_much(task, text, runs):
    assert Swept.read(text).runs(task.model, [0.3, 0.5], ["2:4"]) == runs


def test_a_threshold_is_that_of_normally_distributed_weights(task):
    (run,) = Swept.read("threshold").runs(task.model, [0.5], [])
    weights = np.abs(np.random.default_rng(0).normal(size=100_000))
    assert (weights < run["deviations"]).mean() == pytest.approx(0.5, abs=0.01)


def test_what_a_method_refuses_is_a_row(swept):
    row = row_of(swept[1], "wanda:allocation=owl", pattern="2:4", allocation="owl")
    assert "removes the same of every matrix" in row["refused"]


def test_maps_of_the_run_at_half(task, swept):
    rows = [row for row in swept[1] if "decisions" in row]
    assert [row["method"] for row in rows] == list(METHODS)
    row = row_of(swept[1], "magnitude", sparsity=0.5)
    (told,) = row["decisions"]
    assert told["where"] == middle_matrix(task.model) == "layers/1/kernel"
    assert set(row["layers"].values()) == {0.5}
    owl = row_of(swept[1], "wanda:allocation=owl", sparsity=0.5, allocation="owl")
    assert len(set(owl["layers"].values())) > 1


def test_a_figure_for_each_method_and_one_of_all(swept):
    out, _ = swept
    names = {path.name for path in out.glob("*.svg")}
    assert {"magnitude.svg", "magnitude-map.svg", "depth-map.svg", "overview.svg"} <= names
    assert {"wanda-allocation-owl.svg", "wanda-allocation-owl-map1.svg"} <= names
    texts = {path.name: path.read_text() for path in out.glob("*.svg")}
    for text in texts.values():
        ElementTree.fromstring(text)
        assert not re.search(r"https?://(?!www\.w3\.org)", text)
    shown = set(ElementTree.fromstring(texts["overview.svg"]).itertext())
    assert set(METHODS) <= shown
    assert {"2:4", "held out", "calibration"} <= set(
        ElementTree.fromstring(texts["magnitude.svg"]).itertext()
    )


def test_a_killed_sweep_goes_on_behind_its_last_row(task, swept, tmp_path, monkeypatch):
    lines = (swept[0] / ROWS).read_text().splitlines()
    (tmp_path / ROWS).write_text("\n".join(lines[:4]) + "\n" + lines[4][:50])  # torn
    ran = []
    from jaxcompress.recipe import sweep as module

    def compress(model, name, **options):
        ran.append(name)
        return jc.compress(model, name, **options)

    monkeypatch.setattr(module, "compress", compress)
    rows = sweep(task, tmp_path, ["magnitude"], sparsities=[0.25, 0.5])
    assert ran == ["magnitude"]  # 2:4, whose row was torn

    def same(row):
        return {key: value for key, value in row.items() if key != "seconds"}

    assert [same(r) for r in rows] == [same(json.loads(line)) for line in lines[1:5]]


def test_another_sweep_does_not_mix_in(task, swept):
    other = Task(task.model, task.heldout, task.calibration, ctx=CTX, seed=1)
    with pytest.raises(InputError, match="of another model, data or seed"):
        sweep(other, swept[0], ["magnitude"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wnda", "wanda"),
        ("wanda:sparsty=0.5", "sparsity"),
        ("wanda:sparsity=half", "must be of type float"),
        ("wanda:scope=rows", "use one of layer, row, global"),
    ],
)
def test_bad_methods_are_one_clear_line(text, words):
    with pytest.raises(InputError, match=words):
        Swept.read(text)


def test_the_command(tmp_path, monkeypatch, capsys):
    write_llama(tmp_path / "llama", layers=1)
    write_text(tmp_path / "text.txt", 20)
    monkeypatch.chdir(tmp_path)
    command = (
        "sweep llama --methods threshold,random:pattern=2:4 --sparsity 0.5 --text text.txt "
        "--tokens 64 --calibration text.txt --calibration-samples 2 --ctx 16 --out swept"
    )
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 0
    told = capsys.readouterr()
    assert "2 runs: swept/overview.svg" in told.out
    assert "threshold(deviations=0.67449): " in told.err
    rows = [json.loads(line) for line in (tmp_path / "swept" / ROWS).read_text().splitlines()]
    assert rows[0]["name"] == "llama"
    assert rows[3]["options"] == {"pattern": "2:4"}
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--sparsity", "1.5"])
    assert ended.value.code == 2
