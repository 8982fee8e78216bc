"""A calibrated method over a directory: one block in memory, what is done on the disk; kills."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

import jaxcompress as jc
from jaxcompress.checkpoints.leaves import Leaves
from jaxcompress.checkpoints.safetensors import save_file
from jaxcompress.convert import convert
from jaxcompress.core.deferred import Deferred, is_deferred, parameters_read
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.layerwise.journal import Journal
from jaxcompress.models.loading import load

DRAW = {"calibration_samples": 4, "ctx": 16}
IDS = np.random.default_rng(0).integers(0, 300, (4, 16)).astype(np.int32)


def write_gpt2(directory):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    tiny.write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    llama = tiny.write_llama(root / "llama", layers=2)
    # Compressed already: what is selected is pruned on its grid, the rest travels as it is.
    packed = jc.compress(jc.load(llama), "rtn", bits=8, group_size=32)
    jc.save(packed, root / "packed")
    jc.save(packed, root / "packed_native", "native")
    tiny.write_llama(root / "tied", layers=2, tie_word_embeddings=True)
    write_gpt2(root / "gpt2")
    tiny.write_text(root / "text.txt")
    return root


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize(
    ("source", "method", "container", "options"),
    [
        ("llama", "sparsegpt", "auto", {}),
        pytest.param(
            "llama",
            "wanda",
            "native",
            {"pattern": "2:4", "store": "sparse"},
            marks=pytest.mark.slow,
        ),
        ("llama", "wanda", "sparse-24-bitmask", {"pattern": "2:4"}),
        pytest.param("llama", "svd_llm", "auto", {"ratio": 0.5}, marks=pytest.mark.slow),
        pytest.param(
            "llama",
            "refit",
            "auto",
            {"include": ["layers/1/**/kernel", "lm_head/kernel"]},
            marks=pytest.mark.slow,
        ),
        pytest.param("tied", "wanda", "auto", {}, marks=pytest.mark.slow),
        ("gpt2", "wanda", "auto", {"exclude": ["layers/0/attn/c_attn/kernel"]}),
        pytest.param(
            "packed", "wanda", "auto", {"include": ["layers/0/**/kernel"]}, marks=pytest.mark.slow
        ),
        ("packed_native", "wanda", "native", {"store": "sparse", "pattern": "2:4"}),
    ],
)
def test_from_the_disk_as_in_memory(sources, tmp_path, source, method, container, options):
    """The files that `save` writes of the model that `compress` makes in memory, byte for byte."""
    options = dict(options)
    selected = {name: options.pop(name, None) for name in ("include", "exclude")}
    said = convert(
        sources / source,
        tmp_path / "streamed",
        method,
        options=options,
        container=container,
        calibration=sources / "text.txt",
        **DRAW,
        **selected,
    )
    assert list(said)
    assert not list(tmp_path.glob("*.matrices"))
    model, data = jc.load(sources / source), sources / "text.txt"
    small = jc.compress(model, method, calibration=data, **DRAW, **options, **selected)
    jc.save(small, tmp_path / "whole", container)
    assert files(tmp_path / "streamed") == files(tmp_path / "whole")


def test_nothing_is_read_before_it_is_needed(sources, tmp_path, monkeypatch):
    names, once = [], Leaves.read
    monkeypatch.setattr(Leaves, "read", lambda self, name: names.append(name) or once(self, name))
    model = load(sources / "llama", deferred=True)
    assert not names
    assert all(isinstance(leaf, Deferred) for _, leaf in leaves_with_paths(model.params))
    whole = jc.load(sources / "llama")
    for (path, leaf), (_, full) in zip(
        leaves_with_paths(model.params), leaves_with_paths(whole.params), strict=True
    ):
        assert (leaf.shape, leaf.dtype, leaf.size) == (full.shape, full.dtype, full.size), path
        np.testing.assert_array_equal(leaf.read(), full)
    names.clear()
    with Journal(tmp_path / "kept") as journal:
        small = jc.compress(model, "wanda", calibration=IDS, journal=journal)
        monkeypatch.undo()
        # The table, then block after block; neither the last norm nor the head, which stay.
        assert names[0] == "model.embed_tokens.weight"
        assert [name.split(".")[2] for name in names[1:]] == ["0"] * 9 + ["1"] * 9
        assert is_deferred(small.params)
        expected = jc.compress(whole, "wanda", calibration=IDS)
        for (path, leaf), (_, full) in zip(
            leaves_with_paths(small.params), leaves_with_paths(expected.params), strict=True
        ):
            np.testing.assert_array_equal(leaf.read(), full, err_msg=path)


def test_which_parameters_a_function_reads(sources):
    model = load(sources / "llama", deferred=True)
    paths = [path for path, _ in leaves_with_paths(model.params)]
    blocks = model.blocks

    def read(function, inputs):
        found = parameters_read(function, model.params, inputs)
        return [path for path, here in zip(paths, found, strict=True) if here]

    hidden = np.zeros((1, 4, 64), np.float32)
    assert read(blocks.embed, IDS) == ["embed/embedding"]
    assert read(blocks.head, hidden) == ["final_norm/scale", "lm_head/kernel"]


def command(source, out, method, text, *more):
    return [
        sys.executable, "-m", "jaxcompress", "compress", str(source), str(out), "--method", method,
        "--calibration", str(text), "--calibration-samples", "4", "--ctx", "32", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_command_that_is_killed_ends_with_the_same_bytes(sources, tmp_path):
    """SIGKILL once the first block is on the disk, and again; then it is let be."""
    source = tiny.write_llama(tmp_path / "source", layers=4)
    how = ("sparsegpt", sources / "text.txt", "--pattern", "2:4")
    subprocess.run(command(source, tmp_path / "whole", *how), check=True, capture_output=True)
    kept = tmp_path / "out.matrices"
    for blocks in (1, 2):
        run = subprocess.Popen(
            command(source, tmp_path / "out", *how),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while len(list(kept.glob("*.json"))) < blocks and run.poll() is None:
            time.sleep(0.005)
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    before = {path.name: path.stat().st_mtime_ns for path in kept.glob("*.json")}
    assert {path for name in before for path in json.loads((kept / name).read_text())} >= {
        f"layers/{i}/mlp/up_proj/kernel" for i in range(2)
    }
    last = subprocess.run(
        command(source, tmp_path / "out", *how), check=True, capture_output=True, text=True
    )
    assert "verified" in last.stdout
    assert not kept.exists()
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def write_layers(directory, layers, width=512, inner=1024):
    """A Llama of random weights, larger than what is fun to draw by PyTorch."""
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))

    tensors = {
        "model.embed_tokens.weight": drawn(300, width),
        "lm_head.weight": drawn(300, width),
        "model.norm.weight": np.ones(width, np.float32),
    }
    for i in range(layers):
        own = {f"self_attn.{n}_proj": drawn(width, width) for n in "qkvo"}
        own |= {f"mlp.{n}_proj": drawn(inner, width) for n in ("gate", "up")}
        own |= {"mlp.down_proj": drawn(width, inner)}
        own |= {n: np.ones(width, np.float32) for n in ("input_layernorm",)}
        own |= {"post_attention_layernorm": np.ones(width, np.float32)}
        tensors |= {f"model.layers.{i}.{n}.weight": value for n, value in own.items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 300,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    tiny.write_tokenizer(directory)
    return directory


def peak_memory(arguments):
    """The most anonymous memory of a process, in MB."""
    run = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while run.poll() is None:
        try:
            with open(f"/proc/{run.pid}/status") as status:
                found = re.search(r"RssAnon:\s+(\d+) kB", status.read())
        except ProcessLookupError:
            break
        peak = max(peak, int(found[1]) if found else 0)
        time.sleep(0.005)
    assert run.wait() == 0, run.stderr.read().decode()[-2000:]
    return peak / 1024


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_layers(sources, tmp_path):
    peaks = []
    for layers in (4, 28):  # 10.5 MB each
        source = write_layers(tmp_path / f"source{layers}", layers)
        how = ("wanda", sources / "text.txt", "--verify-memory", "0")
        peaks.append(peak_memory(command(source, tmp_path / f"out{layers}", *how)))
    assert peaks[1] - peaks[0] < 100  # of 252 MB more weights; twice that, were they loaded
