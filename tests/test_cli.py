"""The command line, as a person uses it, against transformers in PyTorch."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from marks import slow_but
from tiny import write_llama, write_text

import jaxcompress as jc
from jaxcompress.checkpoints.safetensors import SafetensorsFile, save_file
from jaxcompress.cli import main
from jaxcompress.methods import METHODS


def run(*arguments):
    """Exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return ended.value.code


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    write_llama(root / "llama")
    write_text(root / "text.txt")
    return root


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def torch_model(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def torch_logits(directory, ids):
    with torch.no_grad():
        return torch_model(directory)(torch.tensor(ids)).logits.numpy()


def our_logits(directory, ids):
    return np.asarray(jc.load(directory)(np.asarray(ids, np.int32)))


def assert_same_logits(directory):
    ids = np.random.default_rng(0).integers(0, 300, (2, 48))
    theirs, ours = torch_logits(directory, ids), our_logits(directory, ids)
    assert np.abs(theirs - ours).max() < 1e-4 * np.ptp(theirs)


def torch_perplexity(directory, ids, ctx):
    windows = torch.tensor(np.asarray(ids)[: len(ids) // ctx * ctx].reshape(-1, ctx))
    with torch.no_grad():
        logp = torch.log_softmax(torch_model(directory)(windows).logits[:, :-1].double(), -1)
    return math.exp(-logp.gather(-1, windows[:, 1:, None]).mean().item())


EXPORTS = {
    "int4": (["--method", "rtn", "--bits", "4", "--group-size", "32"], "compressed-tensors"),
    "int8": (["--method", "rtn", "--dtype", "int8", "--group-size", "-1"], "compressed-tensors"),
    "int3": (["--method", "rtn", "--bits", "3", "--group-size", "32"], "compressed-tensors"),
    "tensor": (["--method", "rtn", "--bits", "8", "--granularity", "tensor"], "compressed-tensors"),
    "head": (["--method", "rtn", "--include", "lm_head/kernel"], "compressed-tensors"),
    "2of4": (["--method", "magnitude", "--pattern", "2:4"], "dense"),
    "global": (["--method", "magnitude", "--sparsity", "0.4", "--scope", "global"], "dense"),
    "dense": (["--method", "rtn", "--bits", "4", "--format", "dense"], "dense"),
}


@pytest.mark.parametrize("name", slow_but(EXPORTS, ["int4", "int3", "2of4", "dense"]))
def test_pytorch_opens_what_is_written(name, place, out, capsys):
    arguments, container = EXPORTS[name]
    extra = [] if "--group-size" in arguments or "magnitude" in arguments else ["--group-size", 32]
    assert run("compress", place / "llama", out, *arguments, *extra) == 0
    said = capsys.readouterr().out
    assert container in said
    assert "tensors and logits of 64 tokens verified" in said
    assert_same_logits(out)
    assert (out / "tokenizer.json").read_bytes() == (
        place / "llama" / "tokenizer.json"
    ).read_bytes()
    assert not list(out.parent.glob("*.partial"))


def test_streaming_equals_compressing_in_memory(place, out, tmp_path):
    options = {"bits": 4, "group_size": 32, "range": "mse"}
    assert (
        run("compress", place / "llama", out, "--bits", 4, "--group-size", 32, "--range", "mse")
        == 0
    )
    small = jc.compress(jc.load(place / "llama"), "rtn", **options)
    jc.save(small, tmp_path / "memory")
    a, b = (SafetensorsFile(d / "model.safetensors") for d in (out, tmp_path / "memory"))
    assert sorted(a.keys()) == sorted(b.keys())
    for name in a.keys():
        np.testing.assert_array_equal(a.read(name), b.read(name))
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (tmp_path / "memory" / "config.json").read_text()
    )


def test_verbs_compose_and_zeros_stay(place, out, tmp_path):
    assert (
        run(
            "compress", place / "llama", tmp_path / "a", "--method", "magnitude", "--pattern", "2:4"
        )
        == 0
    )
    assert run("compress", tmp_path / "a", out, "--bits", 4, "--group-size", 32) == 0
    kernel = jc.load(out).params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    zeros = (
        np.asarray(jc.load(tmp_path / "a").params["layers"]["0"]["mlp"]["up_proj"]["kernel"]) == 0
    )
    assert zeros.mean() == 0.5
    np.testing.assert_array_equal(np.asarray(kernel.dense())[zeros], 0)
    # and the other way round: pruning an int4 model leaves it int4
    assert run("compress", place / "llama", tmp_path / "b", "--bits", 4, "--group-size", 32) == 0
    assert (
        run(
            "compress", tmp_path / "b", tmp_path / "c", "--method", "magnitude", "--sparsity", "0.5"
        )
        == 0
    )
    kernel = jc.load(tmp_path / "c").params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.bits == 4
    assert (np.asarray(kernel.dense()) == 0).mean() >= 0.5
    assert_same_logits(tmp_path / "c")


def test_asymmetric_goes_native_by_itself_and_warns_otherwise(place, out, tmp_path, capsys):
    arguments = ["--bits", 4, "--group-size", 32, "--no-symmetric"]
    assert run("compress", place / "llama", out, *arguments) == 0
    assert "native" in capsys.readouterr().out
    assert (
        run(
            "compress",
            place / "llama",
            tmp_path / "ct",
            *arguments,
            "--format",
            "compressed-tensors",
        )
        == 0
    )
    assert "transformers" in capsys.readouterr().out
    ids = np.arange(64)[None] % 300
    np.testing.assert_array_equal(our_logits(out, ids), our_logits(tmp_path / "ct", ids))


def test_depth_drops_a_layer_and_stays_a_stock_model(place, out, capsys):
    arguments = ["--calibration", place / "text.txt", "--calibration-samples", 4, "--ctx", 64]
    assert run("compress", place / "llama", out, "--method", "depth", "--drop", 1, *arguments) == 0
    assert "dropped layers" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
    assert_same_logits(out)


def test_evaluate_follows_the_protocol(place, out, capsys):
    run("compress", place / "llama", out, "--bits", 4, "--group-size", 32)
    capsys.readouterr()
    assert (
        run(
            "evaluate",
            out,
            "--text",
            place / "text.txt",
            "--ctx",
            64,
            "--tokens",
            1000,
            "--against",
            place / "llama",
            "--json",
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    ids = jc.load(out).tokenizer.encode((place / "text.txt").read_text())[:1000]
    assert found["tokens"] == 15 * 63
    assert found["ctx"] == 64
    assert found["perplexity"] == pytest.approx(torch_perplexity(out, ids, 64), rel=1e-4)
    windows = np.asarray(ids)[:960].reshape(-1, 64)
    dense, small = (
        torch.log_softmax(torch.tensor(torch_logits(d, windows))[:, :-1].double(), -1)
        for d in (place / "llama", out)
    )
    kl = (dense.exp() * (dense - small)).sum(-1).mean().item()
    assert found["kl"] == pytest.approx(kl, rel=1e-3)
    agreed = (dense.argmax(-1) == small.argmax(-1)).double().mean().item()
    assert found["agreement"] == pytest.approx(agreed, abs=2e-3)


def test_inspect_generate_methods(place, out, capsys):
    run("compress", place / "llama", out, "--bits", 4, "--group-size", 32)
    capsys.readouterr()
    assert run("inspect", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["tensors"]}
    row = rows["model.layers.0.mlp.up_proj.weight"]
    # 4 bits and a float32 scale per 32 weights
    assert (row["shape"], row["bits"]) == ([128, 64], 5)
    assert found["total"]["bytes"] < 300_000
    assert run("inspect", out) == 0
    assert "model.layers.0.mlp.up_proj.weight" in capsys.readouterr().out
    assert run("generate", out, "--prompt", "Once upon", "--max-new-tokens", 5) == 0
    text = capsys.readouterr().out
    assert text.startswith("Once upon")
    model = torch_model(out)
    ids = jc.load(out).tokenizer.encode_prompt("Once upon")
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0].tolist()
    assert text.rstrip("\n") == jc.load(out).tokenizer.decode(theirs)
    assert run("methods") == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[:-1]] == list(METHODS)
    assert run("methods", "rtn", "svd") == 0
    assert "--group-size" in capsys.readouterr().out
    assert run("methods", "rtm") == 2
    assert "nearest" in capsys.readouterr().err


def test_an_option_of_another_method_is_noted(place, out, capsys):
    given = ("--method", "rtn", "--bits", 4, "--group-size", 32, "--sparsity", 0.5)
    assert run("compress", place / "llama", out, *given) == 0
    assert "rtn does not use --sparsity" in capsys.readouterr().err


def test_unknown_architecture_streams(place, out, capsys):
    source = out.parent / "stranger"
    shutil.copytree(place / "llama", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "stranger"}))
    assert run("compress", source, out, "--bits", 4, "--group-size", 32) == 0
    assert "logits not" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert_same_logits(out)
    assert (
        run(
            "compress",
            source,
            out.parent / "d",
            "--method",
            "depth",
            "--calibration",
            place / "text.txt",
        )
        == 2
    )
    assert "llama, mistral" in capsys.readouterr().err


BAD = {
    "no such model": (["compress", "nowhere/at/all", "OUT"], "nowhere/at/all"),
    "no such hub name": (["compress", "nobody/nothing", "OUT"], "nobody/nothing"),
    "sparsity": (["compress", "MODEL", "OUT", "--method", "magnitude", "--sparsity", "1.5"], "1.5"),
    "group size": (["compress", "MODEL", "OUT", "--group-size", "48"], "--group-size"),
    "bits": (["compress", "MODEL", "OUT", "--bits", "9"], "1 to 8"),
    "dtype": (["compress", "MODEL", "OUT", "--dtype", "int99"], "bits 99"),
    "contradiction": (["compress", "MODEL", "OUT", "--dtype", "int4", "--bits", "8"], "contradict"),
    "method": (["compress", "MODEL", "OUT", "--method", "rtm"], "rtn"),
    "pattern of paths": (["compress", "MODEL", "OUT", "--include", "layer/*"], "the nearest are"),
    "n:m": (["compress", "MODEL", "OUT", "--method", "magnitude", "--pattern", "5:4"], "n:m"),
    "calibration": (["compress", "MODEL", "OUT", "--method", "depth"], "--calibration"),
    "calibration file": (
        ["compress", "MODEL", "OUT", "--method", "depth", "--calibration", "no.txt"],
        "no.txt",
    ),
    "option": (["compress", "MODEL", "OUT", "--nonsense"], "nonsense"),
    "text": (["evaluate", "MODEL", "--text", "no.txt"], "no.txt"),
    "neither": (["evaluate", "MODEL"], "--text"),
    "inspect": (["inspect", "no.pth"], "no.pth"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, place, out, capsys):
    arguments, words = BAD[name]
    named = {"MODEL": place / "llama", "OUT": out}
    assert run(*(named.get(a, a) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()
    assert not list(out.parent.glob("out*"))


def damaged(kind: str, source: pathlib.Path, directory: pathlib.Path) -> None:
    shutil.copytree(source, directory)
    weights = directory / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "huge header":
        weights.write_bytes((10**15).to_bytes(8, "little") + weights.read_bytes()[8:])
    elif kind == "huge tensor":
        header = {"w": {"dtype": "F32", "shape": [10**9, 10**6], "data_offsets": [0, 4 * 10**15]}}
        text = json.dumps(header).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text)
    elif kind == "dtype":
        weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"Q99"'))
    elif kind == "pickle":
        weights.unlink()

        class Payload:
            def __reduce__(self):
                return (os.system, (f"touch {directory}/ran",))

        torch.save({"w": Payload()}, directory / "pytorch_model.bin")
    elif kind == "nan":
        with SafetensorsFile(weights) as file:
            tensors = {name: file.read(name) for name in file.keys()}
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
        save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "model.safetensors"),
        ("huge header", "1000000000000000"),
        ("huge tensor", "model.safetensors"),
        ("dtype", "Q99"),
        ("pickle", "system"),
        ("nan", "layers/1/mlp/up_proj/kernel: 1 weights are NaN"),
    ],
)
def test_damaged_checkpoints_are_refused(kind, words, place, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    damaged(kind, place / "llama", source)
    assert run("compress", source, out, "--bits", 4, "--group-size", 32) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not list(out.parent.glob("out*"))
    assert not (source / "ran").exists()


def test_an_existing_directory_is_only_replaced_when_asked(place, out, capsys):
    assert run("compress", place / "llama", out, "--bits", 8, "--group-size", 32) == 0
    assert run("compress", place / "llama", out, "--bits", 4, "--group-size", 32) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert jc.load(out).params["layers"]["0"]["mlp"]["up_proj"]["kernel"].bits == 8
    assert (
        run("compress", place / "llama", out, "--bits", 4, "--group-size", 32, "--overwrite") == 0
    )
    assert jc.load(out).params["layers"]["0"]["mlp"]["up_proj"]["kernel"].bits == 4


def test_the_same_command_takes_up_a_killed_run(place, out, monkeypatch, capsys):
    from jaxcompress.checkpoints.huggingface_writer import CheckpointWriter

    command = [
        "compress",
        place / "llama",
        out,
        "--bits",
        4,
        "--group-size",
        32,
        "--verify-memory",
        "0",
    ]
    add, written = CheckpointWriter.add, []

    def dies(self, name, value):
        if len(written) == 20:
            raise KeyboardInterrupt
        written.append(name)
        add(self, name, value)

    monkeypatch.setattr(CheckpointWriter, "add", dies)
    assert run(*command) == 130
    assert not out.exists()
    resumed = []
    monkeypatch.setattr(
        CheckpointWriter, "add", lambda self, n, v: (resumed.append(n), add(self, n, v))[1]
    )
    other = [*command[:4], 8, *command[5:]]
    assert run(*other) == 2
    assert "another command" in capsys.readouterr().err
    assert run(*command) == 0
    assert resumed
    assert not set(resumed) & set(written)
    monkeypatch.undo()
    assert run(*command[:2], out.parent / "whole", *command[3:]) == 0
    assert (out / "model.safetensors").read_bytes() == (
        out.parent / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_killed_run_over_all_matrices_ends_where_the_unbroken_one_does(
    place, out, tmp_path, monkeypatch, capsys
):
    """Weights of few distinct sizes: the ties at the threshold are shared out over matrices."""
    from jaxcompress.checkpoints.huggingface_writer import CheckpointWriter

    source = tmp_path / "source"
    shutil.copytree(place / "llama", source)
    with SafetensorsFile(source / "model.safetensors") as file:
        tensors = {name: np.round(file.read(name) * 4) / 4 for name in file.keys()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    arguments = ["--method", "magnitude", "--scope", "global", "--verify-memory", "0"]
    assert run("compress", source, tmp_path / "whole", *arguments) == 0
    said = capsys.readouterr().out
    assert "55296 of 110592 selected weights are zero" not in said  # zeros were there before
    add, written = CheckpointWriter.add, []

    def dies(self, name, value):
        if len(written) == 12:
            raise KeyboardInterrupt
        written.append(name)
        add(self, name, value)

    monkeypatch.setattr(CheckpointWriter, "add", dies)
    assert run("compress", source, out, *arguments) == 130
    monkeypatch.undo()
    assert run("compress", source, out, *arguments) == 0
    assert "of those compressed in this run" in capsys.readouterr().out
    weights = [(d / "model.safetensors").read_bytes() for d in (out, tmp_path / "whole")]
    assert weights[0] == weights[1]


OFF = {
    "ctx of calibration": ["compress", "MODEL", "OUT", "--method", "depth", "--ctx", "0"],
    "samples": ["compress", "MODEL", "OUT", "--method", "depth", "--calibration-samples", "0"],
    "seed": ["compress", "MODEL", "OUT", "--method", "depth", "--ctx", "64", "--seed", "-1"],
    "stride": ["evaluate", "MODEL", "--text", "TEXT", "--ctx", "64", "--stride", "0"],
    "tokens": ["evaluate", "MODEL", "--text", "TEXT", "--ctx", "64", "--tokens", "-5"],
}


@pytest.mark.parametrize("name", OFF)
def test_numbers_out_of_range_are_refused(name, place, out, capsys):
    named = {"MODEL": place / "llama", "OUT": out, "TEXT": place / "text.txt"}
    extra = ["--calibration", place / "text.txt"] if OFF[name][0] == "compress" else []
    assert run(*(named.get(a, a) for a in OFF[name]), *extra) == 2
    error = capsys.readouterr().err
    assert OFF[name][-2].removeprefix("--").split("-")[-1] in error
    assert len(error.strip().splitlines()) == 1
    assert not list(out.parent.glob("out*"))


@pytest.mark.parametrize("first", [["--bits", 4, "--group-size", 32], ["--store", "sparse"]])
def test_compressed_leaves_are_rounded_anew(first, place, out, tmp_path):
    method = "magnitude" if "--store" in first else "rtn"
    assert run("compress", place / "llama", tmp_path / "a", "--method", method, *first) == 0
    assert run("compress", tmp_path / "a", out, "--bits", 8, "--group-size", 32) == 0
    before, after = (
        jc.load(d).params["layers"]["0"]["mlp"]["up_proj"]["kernel"] for d in (tmp_path / "a", out)
    )
    assert after.bits == 8
    old, new = np.asarray(before.dense()), np.asarray(after.dense())
    np.testing.assert_array_equal(new[old == 0], 0)
    assert np.abs(old - new).max() <= np.asarray(after.scale).max() / 2


def test_options_that_a_method_does_not_use_are_noted(place, out, capsys):
    assert run("compress", place / "llama", out, "--group-size", 32, "--ctx", 64, "--seed", 1) == 0
    said = capsys.readouterr().err
    assert "rtn does not use --ctx" in said
    assert "rtn does not use --seed" in said
    assert "--calibration" not in said
    arguments = ["--calibration", place / "text.txt", "--calibration-samples", 4, "--ctx", 64]
    other = out.parent / "other"
    arguments += ["--include", "layers/**"]
    assert run("compress", place / "llama", other, "--method", "depth", *arguments) == 0
    assert "depth does not use --include" in capsys.readouterr().err


def test_compressed_tensors_refuses_weights_stored_in_by_out(out, tmp_path, capsys):
    config = transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    arguments = ["--group-size", 32, "--format", "compressed-tensors"]
    assert run("compress", tmp_path / "gpt2", out, *arguments) == 2
    assert "--format native" in capsys.readouterr().err
    assert not list(out.parent.glob("out*"))


def test_a_compressed_embedding_is_warned_of(place, out, capsys):
    arguments = ["--group-size", 32, "--include", "embed/embedding"]
    container = ["--format", "compressed-tensors"]
    assert run("compress", place / "llama", out, *arguments, *container) == 0
    assert "no compressed embedding" in capsys.readouterr().out
    other = out.parent / "auto"
    assert run("compress", place / "llama", other, *arguments) == 0
    assert "native" in capsys.readouterr().out


def test_hub_names_are_read_from_the_cache(place, tmp_path, monkeypatch, capsys):
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(place / "llama", repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run("inspect", "someone/tiny") == 0
    assert "149,440 parameters" in capsys.readouterr().out
    out = tmp_path / "out"
    assert run("compress", "someone/tiny", out, "--group-size", 32) == 0
    assert_same_logits(out)


def test_what_lies_beside_a_bare_file_stays_there(out, tmp_path):
    folder = tmp_path / "downloads"
    folder.mkdir()
    torch.save(torch.nn.Linear(8, 8).state_dict(), folder / "weights.pth")
    (folder / "diary.txt").write_text("private")
    assert run("compress", folder / "weights.pth", out, "--method", "magnitude") == 0
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors"}


def test_images_and_texts_go_to_models_that_read_them(place, tmp_path, capsys):
    assert run("evaluate", place / "llama", "--images", "cifar.parquet") == 2
    assert "token ids, not images" in capsys.readouterr().err


def test_one_scale_for_a_matrix_that_comes_in_chunks(place, out, tmp_path, monkeypatch):
    arguments = ["--bits", 8, "--granularity", "tensor"]
    assert run("compress", place / "llama", tmp_path / "whole", *arguments) == 0
    monkeypatch.setattr("jaxcompress.convert.ROWS_BYTES", 4096)
    assert run("compress", place / "llama", out, *arguments) == 0
    weights = [(d / "model.safetensors").read_bytes() for d in (out, tmp_path / "whole")]
    assert weights[0] == weights[1]


def test_real_model_perplexity(assets, tmp_path, capsys):
    """The figure of the assets' own note, from transformers in PyTorch: 35.3125."""
    text = assets / "text" / "tinystories-valid.txt"
    assert (
        run(
            "evaluate",
            assets / "tinystories-656k",
            "--text",
            text,
            "--ctx",
            512,
            "--tokens",
            130000,
            "--json",
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["tokens"] == 129283
    assert found["perplexity"] == pytest.approx(35.3125, abs=2e-3)


def test_compiled_programs_are_kept_where_the_environment_says(tmp_path, monkeypatch):
    from jaxcompress.cli import _keep_compiled_programs

    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"):
        monkeypatch.setenv(name, "")  # so that the old value comes back
        monkeypatch.delenv(name)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no directory can be made there
    _keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _keep_compiled_programs()
    made = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert made.is_dir()
    assert made.is_relative_to(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    _keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


def test_a_second_run_compiles_nothing_anew(tmp_path):
    """The cache that the command line sets up is one that JAX reads."""
    model = write_llama(tmp_path / "model", layers=1)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    for name in [n for n in environment if n.startswith("JAX_COMPILATION_CACHE")]:
        del environment[name]
    written = []
    for out in ("a", "b"):
        command = [sys.executable, "-m", "jaxcompress", "compress", model, tmp_path / out]
        command += ["--method", "magnitude", "--sparsity", "0.5"]
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        written.append({p.name for p in (tmp_path / "jaxcompress").rglob("*-cache")})
    assert written[0]
    assert written[0] == written[1]


def test_the_cache_of_keys_and_values(place, capsys):
    from jaxcompress.cli_options import kv_cache_option
    from jaxcompress.models.kv_cache import KV_CACHE_DTYPES

    (option,) = kv_cache_option(lambda: None).__click_params__
    assert set(option.type.choices) == set(KV_CACHE_DTYPES)
    asked = ("evaluate", place / "llama", "--text", place / "text.txt", "--ctx", 32)
    found = []
    for more in ((), ("--kv-cache", "int4")):
        assert run(*asked, "--tokens", 200, "--json", *more) == 0
        found.append(json.loads(capsys.readouterr().out.strip().splitlines()[-1])["perplexity"])
    small = jc.quantize_kv_cache(jc.load(place / "llama"), "int4")
    by_hand = jc.evaluate(small, text=str(place / "text.txt"), ctx=32, tokens=200)["perplexity"]
    assert found[0] != found[1] == by_hand
    assert run("generate", place / "llama", "--prompt", "a", "--kv-cache", "int8") == 0
