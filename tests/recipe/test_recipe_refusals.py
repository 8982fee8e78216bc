"""What is wrong with a recipe is told in one line, before anything is written."""

import pathlib

import jax
import numpy as np
import pytest
from recipe_cases import config, training
from tiny import write_llama

from jaxcompress import load, recipe
from jaxcompress.core.errors import InputError
from jaxcompress.recipe import runner, store
from jaxcompress.recipe.config import read_config

DEPTH = {"method": "depth", "calibration_samples": 4}
RTN = {"method": "rtn", "group_size": 16}
MAGNITUDE = {"method": "magnitude", "pattern": "2:4"}
EXPORT = {"method": "export"}
EVALUATE = {"method": "evaluate"}


def refused(given, workdir, model=None) -> str:
    with pytest.raises(InputError) as error:
        recipe.run(given, workdir, model=model)
    assert not workdir.exists()
    text = str(error.value)
    assert "\n" not in text
    return text


FIELDS = {
    "stges": ({"stges": ()}, "config.stges: no such field; the nearest are stages"),
    "model": ({"model": {"pth": "x"}}, "config.model.pth: no such field; the nearest are path"),
    "data": ({"data": {"heldot": "x"}}, "config.data.heldot: no such field; the nearest are hel"),
    "mesh": ({"mesh": {"fdsp": 2}}, "config.mesh.fdsp: no such field; the nearest are fsdp"),
    "seed": ({"seed": "x"}, "config.seed 'x': must be int"),
    "flag": ({"seed": True}, "config.seed True: must be int"),
    "negative": ({"seed": -1}, "config.seed -1: must be 0 or more"),
    "large": ({"seed": 2**40}, "config.seed 1099511627776: must be 0 or more"),
    "set": ({"stages": {1}}, "config.stages: is a set; must be a number, text"),
    "array": ({"stages": [{"method": np.zeros(2)}]}, "config.stages[0].method: is a ndarray; must"),
    "ctx": ({"data": {"ctx": "16"}}, "config.data.ctx '16': must be int"),
    "files": ({"data": {"train": ("a", 1)}}, "config.data.train[1] 1: must be text"),
    "section": ({"data": "text.txt"}, "config.data 'text.txt': must be a dict of fields"),
    "list": ({"stages": RTN}, "must be a list"),
    "empty": ({"stages": ()}, "config.stages: is empty"),
}


@pytest.mark.parametrize(("change", "said"), FIELDS.values(), ids=FIELDS)
def test_a_wrong_field(change, said, texts, toy, tmp_path):
    assert said in refused({**config(texts, RTN), **change}, tmp_path / "out", toy)


def test_values_that_are_as_good(texts):
    """NumPy's numbers and paths are kept as what JSON holds."""
    given = config({**texts, "train": pathlib.Path(texts["train"])}, seed=np.int64(3))
    given["stages"] = [training(optimizer_options={"b2": np.float32(0.5)})]
    recipe_ = read_config(given)
    assert recipe_.plain()["stages"][0]["optimizer_options"] == {"b2": 0.5}
    assert (recipe_.seed, recipe_.data.train) == (3, texts["train"])


def test_what_is_no_config(tmp_path):
    assert "config: a str, must be a ConfigDict" in refused("configs/demo.py", tmp_path / "out")


# Stages, of which the last one is wrong: what is said of it.
STAGES = {
    "no method": ([{"steps": 3}], "[0]: must be dict(method=NAME, ...)"),
    "text": (["rtn"], "[0] 'rtn': must be a dict"),
    "no name": ([{"method": {"rtn": 4}}], "[0]: must be dict(method=NAME, ...)"),
    "unknown": ([{"method": "distil"}], "[0].method 'distil': unknown; the nearest are distill"),
    "option": ([training(step=3)], "[0].step: finetune has no such option; the nearest are steps"),
    "method's": (
        [{"method": "rtn", "bit": 4}],
        "[0].bit: rtn has no such option; the nearest are b",
    ),
    "evaluate's": ([{"method": "evaluate", "bits": 4}], "[0].bits: evaluate has no such option"),
    "type": ([RTN, training(steps="3")], "[1].steps '3': must be int"),
    "fraction": ([{"method": "rtn", "bits": 4.5}], "[0].bits 4.5: must be int"),
    "choice": ([{"method": "rtn", "range": "max"}], "[0].range 'max': use one of minmax, perc"),
    "no steps": ([{"method": "finetune"}], "[0].steps: is needed"),
    "steps 0": ([training(steps=0)], "[0].steps 0: must be 1 or more"),
    "log": ([training(log_every=0)], "[0].log_every 0: must be 1 or more"),
    "micro": ([training(accumulate=0)], "[0].accumulate 0: must be 1 or more"),
    "batch": ([training(batch_size=12)], "[0].batch_size 12: does not divide over mesh.data 8"),
    "micro-batch": ([training(accumulate=2)], "= 16; the nearest that does is 16"),
    "optimizer": ([training(optimizer="adam")], "[0].optimizer 'adam': unknown; the nearest are a"),
    "its option": ([training(optimizer_options={"b3": 1})], "[0].optimizer adamw: "),
    "its value": ([training(optimizer_options={"b2": "x"})], "{'b2': 'x'}: adamw cannot use them"),
    "the stage's": (
        [training(optimizer_options={"steps": 1})],
        "[0].optimizer_options steps: no o",
    ),
    "NaN": ([training(learning_rate=float("nan"))], "[0].learning_rate nan: must be a finite"),
    "schedule": ([training(schedule="cosin")], "[0].schedule 'cosin': unknown; the nearest are c"),
    "warmup": ([training(warmup=3)], "[0].learning_rate 0.01, warmup 3 of 3 steps"),
    "kind": ([training(train="scale")], "[0]: split: 'scale' is none of scales"),
    "nothing": ([training(train="scales")], "[0]: split: nothing to train is one of scales"),
    "pattern": ([training(include="*/bias")], "[0].include pattern '*/bias' matches none"),
    "loss": ([training("distill", loss="k")], "[0].loss 'k' is unknown; the nearest are kl"),
    "alpha": ([training("distill", alpha=2)], "[0].alpha 2 must be between 0 and 1"),
    "cold": ([training("distill", temperature=0.0)], "[0].temperature 0 must be above 0"),
    "mse": ([training("distill", loss="mse", temperature=2.0)], "[0].loss 'mse' has no temp"),
    "layers": ([training("distill", layers=9)], "[0].layers 9: the teacher has 3, take 1 to 3"),
    "which": ([training("distill", layers=(0, 7))], "layer 7 of a model with 3 layers"),
    "no teacher": ([training("distill", teacher="./no")], "[0].teacher: ./no: no such directory"),
    "guess": (
        [training("distill", teacher_bits=9)],
        "[0].teacher_bits: bits 9: integers of 1 to 8",
    ),
    "bits": ([{"method": "rtn", "bits": 9}], "[0]: head/kernel: bits 9: integers of 1 to 8"),
    "group": ([{"method": "rtn", "group_size": 5}], "kernel: group size 5 does not divide the 32"),
    "include": ([{**RTN, "include": "no/**"}], "[0].include pattern 'no/**' matches none of"),
    "exclude": ([{**RTN, "exclude": ("no/**",)}], "[0].exclude pattern 'no/**' matches none of"),
    "override": ([{**RTN, "overrides": {"layers/0/**": {"bits": 9}}}], "layers/0/kernel: bits 9"),
    "no options": ([{**RTN, "overrides": {"head/**": 4}}], "overrides.head/** 4: must be a dict"),
    "its name": ([{**RTN, "overrides": {"layers/0/**": {"bit": 9}}}], "kernel: no option 'bit'"),
    "sparsity": ([{"method": "magnitude", "sparsity": 1.5}], "sparsity 1.5: must be a fraction"),
    "n:m": ([{"method": "magnitude", "pattern": "4:2"}], "pattern '4:2': use 'unstructured'"),
    "drop": ([{**DEPTH, "drop": 3}], "[0].drop 3: the model has 3 layers, drop 1 to 2"),
    "drop again": ([DEPTH, {**DEPTH, "drop": 2}], "[1].drop 2: the model has 2 layers"),
    "samples": (
        [{**DEPTH, "calibration_samples": 10**6}],
        "[0].calibration_samples: 1000000 asked",
    ),
    "no samples": ([{**DEPTH, "calibration_samples": 0}], "[0].calibration_samples: 0 asked of da"),
    "wins back": ([EVALUATE, training(wins_back=0.3)], "[1].wins_back: no stage before it changes"),
    "format": ([{**EXPORT, "format": "gguf"}], "[0].format 'gguf': use one of auto"),
    "no form": ([{**EXPORT, "format": "dense"}], "[0].format dense: the model has no config"),
    "dtype": ([{**EXPORT, "dtype": "int3"}], "[0].dtype 'int3': use float32"),
    "compare": ([{**EXPORT, "compare": True}], "[0].compare: transformers opens language models"),
    "outside": ([{**EXPORT, "path": "../x"}], "[0].path '../x': must be a name under"),
    "absolute": ([{**EXPORT, "path": "/x"}], "[0].path '/x': must be a name under"),
    "here": ([{**EXPORT, "path": "."}], "[0].path '.': must be a name under"),
    "kept stages": ([{**EXPORT, "path": "stages/x"}], "[0].path 'stages/x': must be a name under"),
    "growing": ([{**EXPORT, "path": "export.partial"}], "export.partial': must not end in .parti"),
    "twice": ([EXPORT, RTN, EXPORT], "[2].path 'export': another stage exports there"),
}


@pytest.mark.parametrize(("stages", "said"), STAGES.values(), ids=STAGES)
def test_a_wrong_stage(stages, said, texts, toy, tmp_path):
    text = refused(config(texts, *stages), tmp_path / "out", toy)
    assert text.startswith("config.stages[")
    assert said in text


MESHES = {
    "product": ({"data": 3}, "config.mesh: mesh 3 x 1 x 1"),
    "free": ({"data": -1, "tensor": -1}, "config.mesh: mesh.tensor -1"),
    "pmap": (
        {"fsdp": 2, "parallel": "pmap"},
        "config.mesh.parallel 'pmap': plain data parallelism",
    ),
    "other": ({"parallel": "xmap"}, "config.mesh.parallel 'xmap': use jit or pmap"),
}


@pytest.mark.parametrize(("mesh", "said"), MESHES.values(), ids=MESHES)
def test_a_mesh_that_is_none(mesh, said, texts, toy, tmp_path):
    assert said in refused(config(texts, RTN, mesh=mesh), tmp_path / "out", toy)


DATA = {
    "train": ({"train": None}, [training()], "config.data.train: is needed"),
    "calibration": ({"train": None}, [DEPTH], "config.data.train: is needed"),
    "heldout": ({"heldout": None}, [RTN], "config.data.heldout: is needed"),
    "file": ({"train": "no.txt"}, [RTN], "config.data.train: no.txt: no such file"),
    "column": ({"column": "body"}, [RTN], "no column body"),
    "tokens": ({"tokens": 5}, [RTN], "config.data.tokens 5: less than one window of ctx 16"),
    "ctx": ({"ctx": 10**7}, [RTN], "holds not one window"),
    "one token": ({"ctx": 1}, [RTN], "config.data.ctx 1: 2 tokens or more"),
}


@pytest.mark.parametrize(("change", "stages", "said"), DATA.values(), ids=DATA)
def test_data_that_are_none(change, stages, said, texts, toy, tmp_path):
    given = config(texts, *stages)
    given["data"] |= change
    assert said in refused(given, tmp_path / "out", toy)


MODELS = {
    "none": ({}, "config.model: give either path, or architecture"),
    "two": ({"path": "x", "architecture": {"a": 1}}, "config.model: give either path, or archit"),
    "path": ({"path": "./no"}, "config.model.path: ./no: no such directory"),
    "builtin": ({"path": "builtin:no"}, "config.model.path: builtin:no: no such model"),
    "type": ({"architecture": {"model_type": "lama"}}, "config.model.architecture: config: mod"),
    "tokenizer": ({"architecture": {"a": 1}, "tokenizer": "train:x"}, "give train:SIZE, such as"),
    "other": ({"path": "x", "tokenizer": "y"}, "config.model.tokenizer: has no meaning for a loa"),
    "fresh": (
        {"architecture": {"a": 1}, "arch": "lstm"},
        "config.model.arch: has no meaning for a",
    ),
    "number": (
        {"architecture": {"model_type": "llama", "hidden_size": "32"}},
        "config.model.architecture: an entry is of the wrong type",
    ),
    "entry": (
        {"architecture": {"model_type": "llama", "vocab_size": "300"}},
        "config.model.architecture.vocab_size '300': must be int",
    ),
    "small": ({"architecture": {"a": 1}, "tokenizer": "train:9"}, "config.model.tokenizer: vocabu"),
}


@pytest.mark.parametrize(("model", "said"), MODELS.values(), ids=MODELS)
def test_a_model_that_is_none(model, said, texts, tmp_path):
    assert said in refused(config(texts, RTN, model=model), tmp_path / "out")


def test_tokens_that_the_model_does_not_know(texts, toy, tmp_path):
    params = {**toy.params, "head": {"kernel": toy.params["head"]["kernel"][:, :100]}}
    said = refused(config(texts, RTN), tmp_path / "out", toy.replace(params=params))
    assert "config.data.heldout: has token id " in said
    assert "and the model 100 outputs" in said


def test_a_batch_that_does_not_divide_over_the_processes(texts, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    given = config(texts, training(batch_size=1), mesh={"data": 1, "tensor": 8})
    assert "stages[0]: batch size 1: must be" in refused(given, tmp_path / "out", toy)


def test_what_the_export_of_a_language_model_cannot_hold(texts, tmp_path):
    path = str(write_llama(tmp_path / "llama", layers=1))
    cases = [
        ([{"method": "rtn", "group_size": 128}], "use --group-size 64"),
        ([{**RTN, "symmetric": False}, {**EXPORT, "compare": True}], "this one is native"),
        (
            [{**MAGNITUDE, "store": "sparse"}, {**EXPORT, "format": "compressed-tensors"}],
            "compressed-tensors has no form for NMSparse",
        ),
    ]
    model = load(path, dtype="float32")
    for stages, said in cases:
        assert said in refused(config(texts, *stages), tmp_path / "out", model)
    given = config(texts, RTN, model={"path": path, "compute_dtype": "fp8"})
    assert "config.model.compute_dtype: dtype 'fp8'" in refused(given, tmp_path / "out")


def test_a_directory_that_is_not_empty(texts, toy, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="is not empty, and no run of a recipe"):
        recipe.run(config(texts, RTN), tmp_path, model=toy)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    for text in ('{"model_type": "llama"}', "no JSON"):  # of a model, or of anything
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match="is not empty, and no run of a recipe"):
            begin(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "mine.txt").rename(tmp_path / "config.json.partial")  # a run killed as it began
    begin(tmp_path)


def begin(root):
    return store.Store(root).begin(recipe.Recipe(), {})


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match=r"cannot use .*: Not a directory"):
            begin(root)


def test_a_directory_that_only_the_first_process_sees(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(InputError, match="is not there on every machine of the run"):
        begin(tmp_path / "out")


def test_no_stage_is_refused_for_what_stages_before_it_made(texts, toy, tmp_path):
    """Not run: what is right is only seen to pass the checks."""
    stages = [
        {**DEPTH, "drop": 2},
        training("distill", layers=2, wins_back=0.1),
        {**MAGNITUDE, "store": "sparse"},
        training(train="values"),
        {"method": "rtn", "group_size": 16},
        training(train=("scales", "dense"), include=["layers/**", "embed"]),
        {**EXPORT, "path": "a/b"},
        {**EXPORT, "path": "a/c", "format": "native"},
    ]
    assert len(runner.prepare(read_config(config(texts, *stages)), toy).stages) == len(stages)
