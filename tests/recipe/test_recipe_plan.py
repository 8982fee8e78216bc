"""Dry runs: the plan of a recipe, which refuses what a run refuses, and writes nothing."""

import importlib

import jax
import pytest
from recipe_cases import CTX, config, training

from jaxcompress import cli, recipe
from jaxcompress.core.errors import InputError

planning = importlib.import_module("jaxcompress.recipe.plan")

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "float32",
}
MODEL = {"architecture": ARCHITECTURE, "tokenizer": "train:300"}
STAGES = (
    {"method": "depth", "drop": 1, "calibration_samples": 4},
    training("distill", teacher_bits=8, temperature=3.0, batch_size=16),
    {"method": "rtn", "group_size": 32},
    {"method": "export"},
)


@pytest.fixture
def given(texts):
    return config(texts, *STAGES, model=MODEL, mesh={"data": 4, "fsdp": 2})


def test_a_row_for_each_stage(given):
    """Depth leaves a layer less: embeddings, norms and head, and 10304 parameters in each layer."""
    title, _, *rows = next(recipe.plan(given)).splitlines()
    assert title.startswith("On each of 8 devices (data 4, fsdp 2, tensor 1)")
    cells = {row.split()[0]: row.split() for row in rows}
    assert list(cells) == ["01-depth", "02-distill", "03-rtn", "04-export"]
    ends = 2 * 300 * 32 + 32
    whole, cut = (f"{(ends + layers * 10304) / 1000:.0f}K" for layers in (2, 1))
    assert [row[1:3] for row in cells.values()] == [
        [whole, "-"],
        [cut, cut],
        [cut, "-"],
        [cut, "-"],
    ]


def test_every_step_that_trains_is_compiled(given, monkeypatch):
    calls = []

    def compile_step(*args, **options):
        calls.append((args, options))
        return "compiled"

    monkeypatch.setattr(planning, "compile_step", compile_step)
    given["mesh"] = {"data": -1, "fsdp": 4}
    table, *told = recipe.plan(given, "v5e:4x4")
    assert "16 devices (data 4, fsdp 4, tensor 1)" in table
    assert told == ["", "02-distill: one step on", "compiled"]
    (((topology, student, settings, objective, batch), options),) = calls
    assert (topology, settings.batch_size) == ("v5e:4x4", 16)
    assert student.config.num_hidden_layers == 1
    assert objective.keywords == {"temperature": 3.0}
    assert batch["ids"].shape == (16, CTX)
    (teacher,) = options["teachers"]
    assert teacher.config.num_hidden_layers == 2
    assert "Affine" in str(jax.tree.structure(teacher.params))
    assert {name: options[name] for name in ("data", "fsdp", "tensor")} == {
        "data": -1,
        "fsdp": 4,
        "tensor": 1,
    }


WRONG = {
    "mesh": ({"mesh": {"data": 3}}, "config.mesh: mesh 3 x 1 x 1"),
    "parallel": ({"mesh": {"parallel": "xmap"}}, "config.mesh.parallel 'xmap': use jit or pmap"),
    "model": ({"model": {**MODEL, "path": "x"}}, "config.model: give either path, or architec"),
    "batch": (
        {"stages": [training(batch_size=12)]},
        "config.stages[0].batch_size 12: does not divide over mesh.data",
    ),
    "recovery": (
        {"stages": [training(wins_back=0.3)]},
        "config.stages[0].wins_back: no stage before it changes the model",
    ),
    "export": (
        {"stages": [{"method": "export"}, {"method": "export"}]},
        "config.stages[1].path 'export': another stage exports there",
    ),
    "data": ({"data": {"train": "no.txt", "heldout": "no.txt"}}, "no such file"),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_what_a_run_refuses(change, said, given):
    given |= change
    for function in (lambda: list(recipe.plan(given)), lambda: recipe.run(given, "unused")):
        with pytest.raises(InputError) as error:
            function()
        assert said in str(error.value)


def test_the_command_writes_nothing(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({config(texts, STAGES[2], model=MODEL)!r})\n"
    )
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--config", "small.py", "--dry-run"])
    assert stop.value.code == 0
    assert "01-rtn" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--config", "small.py", "--topology", "v5e:4x4", "--workdir", "out"])
    assert stop.value.code == 2
    assert "--topology: compiles for a pod, and is used with --dry-run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*") if path.suffix != ".pyc"] == ["small.py"]
