"""Model directories: opening what others wrote, and writing what survives being killed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest

from jaxcompress.checkpoints.huggingface import index_name, open_checkpoint, single_name
from jaxcompress.checkpoints.huggingface_writer import (
    CheckpointWriter,
    tensor_digest,
    verify_checkpoint,
    write_checkpoint,
)
from jaxcompress.checkpoints.safetensors import save_file
from jaxcompress.checkpoints.tensors import TensorChunks
from jaxcompress.checkpoints.torch_writer import save_state_dict
from jaxcompress.core.errors import InputError

SINGLE, INDEX = single_name("model"), index_name("model")
RNG = np.random.default_rng(0)
TENSORS = {
    "embed.weight": RNG.normal(size=(7, 4)).astype(np.float32),
    "layers.0.w": RNG.normal(size=(5, 4)).astype(ml_dtypes.bfloat16),
    "layers.1.w": RNG.integers(0, 99, (3, 4), np.int32),
    "scalar": np.float32(3.0),
    "empty": np.zeros((0, 4), np.float16),
    "mask": RNG.random((9,)) < 0.5,
}
CONFIG = {"model_type": "llama", "hidden_size": 4}


def equal(checkpoint, tensors=TENSORS):
    return set(checkpoint.keys()) == set(tensors) and all(
        checkpoint.read(n).dtype == np.asarray(t).dtype
        and checkpoint.read(n).tobytes() == np.asarray(t).tobytes()
        for n, t in tensors.items()
    )


def content(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in pathlib.Path(directory).rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("max_shard_bytes", [5e9, 120, 1])
def test_what_is_written_is_read_back(tmp_path, max_shard_bytes):
    out = write_checkpoint(
        tmp_path / "out", CONFIG, TENSORS.items(), max_shard_bytes=max_shard_bytes
    )
    checkpoint = open_checkpoint(out)
    assert checkpoint.config == CONFIG
    assert equal(checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    files = sorted(content(out))
    if max_shard_bytes == 5e9:
        assert files == ["config.json", SINGLE]
    else:
        shards = len(files) - 2
        assert shards > 1
        assert files[1] == f"model-00001-of-{shards:05d}.safetensors"
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(
            np.asarray(t).nbytes for t in TENSORS.values()
        )


def test_no_shard_is_larger_than_asked_unless_one_tensor_is(tmp_path):
    tensors = {f"t{i}": np.ones(n, np.uint8) for i, n in enumerate([30, 50, 10, 100, 5, 5])}
    out = write_checkpoint(tmp_path / "out", None, tensors.items(), max_shard_bytes=80)
    sizes = {}
    for name, shard in json.loads((out / INDEX).read_text())["weight_map"].items():
        sizes[shard] = sizes.get(shard, 0) + tensors[name].nbytes
    assert sorted(sizes.values()) == [10, 10, 80, 100]


def test_transformers_opens_what_we_write(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    out = write_checkpoint(
        tmp_path / "out", json.loads(config.to_json_string()), state.items(), max_shard_bytes=4000
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_tensors_come_in_pieces_and_only_when_needed(tmp_path):
    big = TENSORS["embed.weight"]
    pieces = TensorChunks(big.shape, big.dtype, (big[i : i + 2] for i in range(0, 7, 2)))
    items = [("a", lambda: pieces), ("b", lambda: TENSORS["mask"])]
    out = write_checkpoint(tmp_path / "out", None, items)
    assert equal(open_checkpoint(out), {"a": big, "b": TENSORS["mask"]})


def test_companions_travel_along(tmp_path):
    source = tmp_path / "source"
    (source / "1_Pooling").mkdir(parents=True)
    (source / "chat_templates").mkdir()
    carried = [
        "tokenizer.json", "generation_config.json", "chat_template.jinja", "merges.txt",
        "README.md", "tokenizer.model", "1_Pooling/config.json", "chat_templates/tool.jinja",
    ]  # fmt: skip
    left = [
        "config.json", "pytorch_model.bin", INDEX, "quantize_config.json", ".gitattributes",
        "model-00001-of-00002.safetensors", "tf_model.h5",
    ]  # fmt: skip
    for name in carried + left:
        (source / name).write_text(name)
    out = write_checkpoint(tmp_path / "out", CONFIG, TENSORS.items(), companions_from=source)
    assert set(content(out)) == {*carried, "config.json", SINGLE}
    assert all((out / name).read_text() == name for name in carried)


class Killed(BaseException):
    """Stands for the process dying: nothing catches it."""


def lazily(calls):
    return [(n, lambda n=n, t=t: calls.append(n) or t) for n, t in TENSORS.items()]


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "shutil.rmtree"])
def test_a_run_killed_anywhere_leaves_nothing_finished_and_resumes(tmp_path, monkeypatch, function):
    module, name = (sys.modules[function.split(".")[0]], function.split(".")[1])
    real = getattr(module, name)
    unbroken = content(
        write_checkpoint(tmp_path / "unbroken", CONFIG, TENSORS.items(), max_shard_bytes=60)
    )
    for survived in range(100):
        out, left = tmp_path / f"out{survived}", [survived]

        def dying(*args, left=left, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args, **kwargs)

        def export(calls, out=out):
            write_checkpoint(
                out, CONFIG, lazily(calls), max_shard_bytes=60, fingerprint="this command"
            )

        first, second = [], []
        with monkeypatch.context() as patch:
            patch.setattr(module, name, dying)
            try:
                export(first)
            except Killed:
                pass
            else:
                break
        if not out.exists():
            export(second)
        assert content(out).items() >= unbroken.items()
        assert len(first) + len(second) <= len(TENSORS) + 1  # at most one is computed twice
    assert survived >= (1 if function == "shutil.rmtree" else 5)


def test_a_killed_process_resumes_where_it_was(tmp_path):
    program = textwrap.dedent("""
        import os, signal, sys
        import numpy as np
        from jaxcompress.checkpoints.huggingface_writer import write_checkpoint
        def tensors():
            for i in range(6):
                if i == int(sys.argv[2]):
                    os.kill(os.getpid(), signal.SIGKILL)
                def make(i=i):
                    print(i)
                    return np.full((10,), i, np.float32)
                yield f"t{i}", make
        write_checkpoint(sys.argv[1], {}, tensors(), max_shard_bytes=90, fingerprint="x")
    """)
    out = tmp_path / "out"

    def run(die_at):
        return subprocess.run(
            [sys.executable, "-u", "-c", program, str(out), str(die_at)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    killed = run(5)
    assert killed.returncode == -signal.SIGKILL
    assert killed.stdout.split() == ["0", "1", "2", "3", "4"]
    assert not out.exists()
    again = run(-1)
    assert again.stdout.split() == ["5"], again.stderr
    assert all(open_checkpoint(out).read(f"t{i}")[0] == i for i in range(6))


def start_and_break(out, fingerprint, tensors=("a", "b")):
    def items():
        yield from ((name, np.full(4, 7.0)) for name in tensors)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_checkpoint(out, {}, items(), fingerprint=fingerprint)


def test_another_command_does_not_take_over(tmp_path):
    start_and_break(tmp_path / "out", "first")
    for other in ["second", None]:
        with pytest.raises(InputError, match="left unfinished by another command"):
            CheckpointWriter(tmp_path / "out", {}, fingerprint=other)
    with CheckpointWriter(tmp_path / "out", {}, fingerprint="first") as writer:
        assert "a" in writer
        assert "b" in writer
    start_and_break(tmp_path / "new", "first")
    with CheckpointWriter(tmp_path / "new", {}, fingerprint="second", overwrite=True) as writer:
        assert "a" not in writer
    assert open_checkpoint(tmp_path / "new").keys() == []


def test_without_a_fingerprint_a_run_begins_afresh(tmp_path):
    start_and_break(tmp_path / "out", None)
    assert not list(tmp_path.iterdir())
    start_and_break(tmp_path / "out", "x")
    journal = tmp_path / "out.partial" / ".journal.jsonl"  # as of a run that was killed
    journal.write_text(journal.read_text().replace('"x"', "null"))
    with CheckpointWriter(tmp_path / "out", {}) as writer:
        assert "a" not in writer


def test_damage_to_the_unfinished_part_is_noticed(tmp_path):
    start_and_break(tmp_path / "out", "x", ["a", "b", "c"])
    spool = tmp_path / "out.partial" / ".shard.data"
    data = bytearray(spool.read_bytes())
    data[40] ^= 1  # in b
    spool.write_bytes(data)
    journal = tmp_path / "out.partial" / ".journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])  # c's line is cut
    with CheckpointWriter(tmp_path / "out", {}, fingerprint="x") as writer:
        assert [name in writer for name in "abc"] == [True, False, False]
        writer.add("b", np.zeros(2))
        writer.add("c", np.ones(2))
    expected = {"a": np.full(4, 7.0), "b": np.zeros(2), "c": np.ones(2)}
    assert equal(open_checkpoint(tmp_path / "out"), expected)


def test_damage_to_a_closed_shard_is_found_at_the_end(tmp_path):
    start_and_break(tmp_path / "out", "x", ["a"])

    def items():
        yield "b", np.ones(2)  # closes the shard of a
        shard = tmp_path / "out.partial" / "model-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\1")

    with pytest.raises(InputError, match="a reads back otherwise"):
        write_checkpoint(tmp_path / "out", {}, items(), fingerprint="x", max_shard_bytes=1)
    assert not (tmp_path / "out").exists()


def test_existing_directories_are_respected(tmp_path):
    out = write_checkpoint(tmp_path / "out", CONFIG, TENSORS.items())
    with pytest.raises(InputError, match="exists"):
        write_checkpoint(out, CONFIG, [])
    assert equal(open_checkpoint(out))
    write_checkpoint(out, CONFIG, [("x", np.ones(1))], overwrite=True)
    assert open_checkpoint(out).keys() == ["x"]
    homework = tmp_path / "homework"
    homework.mkdir()
    (homework / "essay.txt").write_text("...")
    with pytest.raises(InputError, match="holds no checkpoint"):
        write_checkpoint(homework, CONFIG, [], overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        write_checkpoint(homework / "essay.txt", CONFIG, [])
    (tmp_path / "taken.partial").mkdir()
    (tmp_path / "taken.partial" / "essay.txt").write_text("...")
    with pytest.raises(InputError, match="in the way"):
        write_checkpoint(tmp_path / "taken", CONFIG, [])
    assert [p.name for p in tmp_path.glob("*.partial")] == ["taken.partial"]


def test_a_checkpoint_may_replace_its_own_source(tmp_path):
    out = write_checkpoint(tmp_path / "out", CONFIG, TENSORS.items())
    source = open_checkpoint(out)
    halves = [(n, lambda n=n: source.read(n)[:2]) for n in ["embed.weight", "layers.0.w"]]
    write_checkpoint(out, source.config, halves, companions_from=out, overwrite=True)
    assert equal(open_checkpoint(out), {n: TENSORS[n][:2] for n, _ in halves})


def test_mistakes_of_the_caller_are_errors(tmp_path):
    with CheckpointWriter(tmp_path / "a", None) as writer:
        writer.add("x", np.ones(1))
        with pytest.raises(ValueError, match="written twice"):
            writer.add("x", np.ones(1))
    with pytest.raises(ValueError, match="its shape needs 8"):
        write_checkpoint(
            tmp_path / "b", None, [("x", TensorChunks((2,), np.dtype("f4"), [np.ones(1, "f4")]))]
        )
    with pytest.raises(InputError, match="no dtype int4"):
        write_checkpoint(tmp_path / "c", None, [("x", np.ones(1, ml_dtypes.int4))])


def test_a_failed_tensor_does_not_spoil_the_next(tmp_path):
    def breaking():
        yield np.ones(1, np.float32)
        raise RuntimeError

    with CheckpointWriter(tmp_path / "out", None) as writer:
        with pytest.raises(RuntimeError):
            writer.add("x", TensorChunks((2,), np.dtype("f4"), breaking()))
        writer.add("y", np.arange(3))
    assert equal(open_checkpoint(tmp_path / "out"), {"y": np.arange(3)})


def test_the_callers_own_check_comes_before_the_name(tmp_path):
    seen = []

    def check(directory):
        seen.append(equal(open_checkpoint(directory)) and not (tmp_path / "out").exists())
        if len(seen) == 1:
            raise InputError("not good enough")

    def export():
        with CheckpointWriter(tmp_path / "out", CONFIG, fingerprint="x", check=check) as writer:
            for name, tensor in TENSORS.items():
                writer.add(name, tensor)

    with pytest.raises(InputError, match="not good enough"):
        export()
    assert not list(tmp_path.iterdir())
    export()
    assert seen == [True, True]
    assert equal(open_checkpoint(tmp_path / "out"))


def test_verifying_names_what_is_wrong(tmp_path):
    out = write_checkpoint(tmp_path / "out", None, TENSORS.items())
    digests = {name: tensor_digest([np.asarray(t)]) for name, t in TENSORS.items()}
    verify_checkpoint(out, digests)
    with pytest.raises(InputError, match="mask reads back otherwise"):
        verify_checkpoint(out, {**digests, "mask": tensor_digest([~TENSORS["mask"]])})
    with pytest.raises(InputError, match="missing or surplus tensors: other"):
        verify_checkpoint(out, {**digests, "other": ""})


# --- Opening ----------------------------------------------------------------------------------


def test_torch_directories_open_as_well(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    state = TENSORS
    save_state_dict(tmp_path / "pytorch_model.bin", state)
    assert equal(open_checkpoint(tmp_path))
    names = sorted(state)
    shards = {
        "pytorch_model-00001-of-00002.bin": names[:2],
        "pytorch_model-00002-of-00002.bin": names[2:],
    }
    for file, part in shards.items():
        save_state_dict(tmp_path / file, {n: state[n] for n in part})
    (tmp_path / "pytorch_model.bin").unlink()
    weight_map = {n: file for file, part in shards.items() for n in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(tmp_path)
    assert equal(checkpoint)
    np.testing.assert_array_equal(
        checkpoint.read_rows("embed.weight", 2, 5), TENSORS["embed.weight"][2:5]
    )


def test_a_single_file_opens_as_well(tmp_path):
    save_file(TENSORS, tmp_path / "weights.safetensors")
    assert equal(open_checkpoint(tmp_path / "weights.safetensors"))
    assert equal(open_checkpoint(tmp_path))  # the only one there


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"x": "gone.safetensors"}}, "names gone.safetensors, which is not in"),
        ({"weight_map": {"y": "here.safetensors"}}, "y should be in here.safetensors"),
        ({"weight_map": {"x": "../here.safetensors"}}, "no plain file name"),
        ({"weight_map": {"x": 3}}, "no plain file name"),
        ({"weight_map": {}}, "no weight_map"),
        ({}, "no weight_map"),
        ([], "a JSON object was expected"),
        ("{", "no valid JSON"),
    ],
)
def test_a_wrong_index_is_one_line(tmp_path, index, message):
    save_file({"x": np.ones(1)}, tmp_path / "here.safetensors")
    text = index if isinstance(index, str) else json.dumps(index)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_directories_without_weights_are_one_line(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(InputError, match="no weights here"):
        open_checkpoint(tmp_path)
    save_file({}, tmp_path / "a.safetensors")
    save_file({}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="2 safetensors files but no index"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_files_are_one_line(tmp_path):
    save_file({}, tmp_path / SINGLE)
    (tmp_path / SINGLE).chmod(0)
    with pytest.raises(InputError, match=r"cannot read .*Permission denied"):
        open_checkpoint(tmp_path)


def test_real_weights(assets):
    checkpoint = open_checkpoint(assets / "tinystories-656k")
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.info("lm_head.weight") == ((2048, 128), np.float32)
    assert "tokenizer.json" in map(str, checkpoint.companions)
