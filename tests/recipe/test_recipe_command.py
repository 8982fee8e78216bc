"""Recipes from the command line: files, changed fields, exit codes; a Llama all the way through."""

import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from recipe_cases import CTX, kept
from tiny import write_llama

import jaxcompress as jc
from jaxcompress import cli
from jaxcompress.recipe.config import read_config
from jaxcompress.recipe.files import read_file

CONFIG = """
from ml_collections import config_dict

def get_config(name="plain"):
    config = config_dict.ConfigDict()
    config.name = name
    config.model = {{"path": {path!r}}}
    config.data = {{"train": {train!r}, "heldout": {heldout!r}, "ctx": {ctx}, "tokens": 256}}
    config.stages = (
        {{"method": "magnitude", "pattern": "2:4"}},
        {{"method": "finetune", "steps": 9, "batch_size": 8, "wins_back": 1e6}},
        {{"method": "rtn", "bits": 4, "group_size": 32}},
        {{"method": "export", "path": "exports/small", "compare": True}},
    )
    return config
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Stored in bfloat16."""
    path = write_llama(tmp_path_factory.mktemp("models") / "llama", layers=2)
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def file(llama, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "small.py"
    path.write_text(CONFIG.format(path=str(llama), ctx=CTX, **texts))
    return str(path)


def command(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `jaxcompress run`."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", *map(str, arguments)])
    return (stop.value.code, *capsys.readouterr())


def test_fields_of_a_file(file):
    changes = ["--config.mesh.fsdp=4", "--config.stages[1].steps=10", "--config.seed=7"]
    given = read_file(f"{file}:other", changes)
    assert given.name == "other"
    assert given.mesh.fsdp == 4
    assert given.seed == 7
    assert [stage.get("steps") for stage in given.stages] == [None, 10, None, None]
    assert given.stages[1]["batch_size"] == 8
    unset = read_file(file, ["--config.model.revision=main", "--config.data.calibration=a.txt"])
    assert (unset.model.revision, unset.data.calibration) == ("main", "a.txt")
    assert read_file(file).name == "plain"


@pytest.mark.parametrize("brackets", ["()", "[]"])
def test_options_that_a_stage_of_the_file_leaves_out(brackets, file, tmp_path):
    path, text = tmp_path / "other.py", pathlib.Path(file).read_text()
    head, stages = text.split("config.stages = (")
    stages, end = stages.rsplit(")", 1)
    path.write_text(f"{head}config.stages = {brackets[0]}{stages}{brackets[1]}{end}")
    options = {"accumulate": 2, "clip": 0.5, "keep_zeros": False, "include": "**/kernel"}
    changes = [f"--config.stages[1].{name}={value}" for name, value in options.items()]
    found = read_config(read_file(str(path), [*changes, "--config.stages[1].steps=2"])).stages[1]
    assert {name: found[name] for name in options} == options
    assert (found["steps"], found["batch_size"]) == (2, 8)


REFUSED = {
    "misspelt": (["--config.mesh.fdsp=4"], "fdsp=4: no such field; the nearest are fsdp"),
    "section": (["--config.msh.fsdp=4"], "fsdp=4: no such field; the nearest are mesh"),
    "type": (["--config.seed=x"], "--config.seed=x: no such field, or no value for it"),
    "stage": (["--config.stages[9].steps=1"], "--config.stages[9].steps=1: no such field"),
    "option": (
        ["--config.stages[1].step=1"],
        "config.stages[1].step: finetune has no such option; the nearest are steps",
    ),
    "flag": (["--mesh.fsdp=4"], "--mesh.fsdp=4: unknown; fields of the config are --config."),
    "mesh": (["--config.mesh.data=3"], "error: config.mesh: mesh 3 x 1 x 1"),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_change_is_one_line(changes, said, file, tmp_path, capsys):
    out = tmp_path / "out"
    code, told, error = command(capsys, "--config", file, "--workdir", out, *changes)
    assert (code, told) == (2, "")
    assert error.startswith("jaxcompress: error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not out.exists()


FILES = {
    "no file": (None, "no such config file"),
    "no Python": ("def get_config(:", "cannot read the config (invalid syntax"),
    "its own error": ("def get_config():\n    raise KeyError('lr')", "cannot read the config ('lr"),
    "its own file": (
        "def get_config():\n    open('lacking')",
        "No such file or directory: 'lacking",
    ),
    "frozen": (
        "from ml_collections import FrozenConfigDict\ndef get_config():\n"
        "    return FrozenConfigDict({'stages': [{'method': 'rtn'}]})",
        "Bad FrozenConfigDict initialization: Cannot contain a dict",
    ),
    "no function": ("x = 1", "cannot read the config (module"),
    "misspelt": (
        "from ml_collections import ConfigDict\ndef get_config():\n"
        "    return ConfigDict({'stges': ()})",
        "config.stges: no such field; the nearest are stages",
    ),
}


@pytest.mark.parametrize(("text", "said"), FILES.values(), ids=FILES)
def test_a_wrong_file_is_one_line(text, said, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # of the file before
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    code, _, error = command(
        capsys, "--config", path, "--workdir", tmp_path / "out", "--config.seed=1"
    )
    assert code == 2
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def ran(file, tmp_path_factory):
    """A run whose recovery is asked for too much, over a mesh that splits parameters."""
    root = tmp_path_factory.mktemp("run") / "out"
    changes = ["--config.mesh.fsdp=2", "--config.stages[1].steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(cli, "_say", said.append)
        patch.setattr(sys, "argv", ["jaxcompress", "run", "--config", "a b.py"])
        with pytest.raises(SystemExit) as stop:
            cli.main(["run", "--config", file, "--workdir", str(root), *changes])
    return stop.value.code, said, root, json.loads((root / "report.json").read_text())


def test_a_check_that_fails_fails_the_run(ran):
    code, said, _, report = ran
    assert code == 1
    (line,) = said
    assert line.startswith("jaxcompress: 1 of 2 checks failed: 02-finetune wins back")
    assert [check["passed"] for check in report["checks"]] == [False, True]
    assert report["config"]["mesh"]["fsdp"] == report["hardware"]["mesh"]["fsdp"] == 2
    assert report["config"]["stages"][1]["steps"] == 1
    assert report["command"] == "jaxcompress run --config 'a b.py'"


def test_transformers_computes_the_same_from_the_export(ran, llama):
    _, _, root, report = ran
    out = root / "exports" / "small"
    ids = np.arange(64, dtype=np.int64)[None] % 300
    opened = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        theirs = opened(torch.from_numpy(ids)).logits.numpy()
    model = jc.load(out, dtype="float32")
    ours = np.asarray(model(jnp.asarray(ids, jnp.int32)))
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.ptp(theirs))
    assert (out / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    text = report["checks"][1]["text"]
    assert report["checks"][1]["name"] == "PyTorch computes the same from the export"
    told = jc.evaluate(model, text=report["data"][1]["name"], ctx=CTX, tokens=256)
    assert f"perplexity {told['perplexity']:.6g} here" in text


def test_what_is_measured_is_what_is_deployed(ran):
    """bfloat16 where the checkpoint is, though what trains is float32."""
    _, _, root, report = ran
    small = jc.load(root / "exports" / "small")
    start, exported = report["stages"][0], report["stages"][-1]
    assert exported["size"]["bytes_memory"] == jc.inspect(small)["total"]["bytes"]
    assert start["size"]["bytes_memory"] == 2 * start["size"]["parameters"]
    assert {row["bits"] for row in report["stages"][2]["layers"]} == {16}
    told = jc.evaluate(
        jc.load(root / "exports" / "small", dtype="float32"),
        text=report["data"][1]["name"],
        ctx=CTX,
        tokens=256,
    )
    assert exported["quality"]["heldout"]["perplexity"] == pytest.approx(told["perplexity"], 1e-5)
    assert {value.dtype.name for value in kept(root, "02-finetune").values()} == {"float32"}


FRESH = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.slow
def test_a_fresh_model_with_a_tokenizer_of_its_own(texts, tmp_path):
    given = {
        "model": {
            "architecture": FRESH,
            "tokenizer": "train:300",
            "compute_dtype": "bfloat16",
            "scan_layers": True,
            "remat": True,
        },
        "data": {**texts, "ctx": CTX, "tokens": 256},
        "stages": (
            {"method": "finetune", "steps": 2, "batch_size": 8},
            {"method": "export", "dtype": "bfloat16", "compare": True},
        ),
    }
    report = jc.run(given, tmp_path / "out")
    assert all("kl" not in stage["quality"]["heldout"] for stage in report["stages"])
    model = jc.load(tmp_path / "out" / "export")
    assert model.params["embed"]["embedding"].dtype == jnp.bfloat16
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "export")
    text = "carry less, and you will travel far"
    assert model.tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert model.config.vocab_size == len(theirs) <= 300
    assert report["model"]["name"] == "a fresh model"
    loss = [stage["quality"]["heldout"]["perplexity"] for stage in report["stages"]]
    assert loss[1] < loss[0]
