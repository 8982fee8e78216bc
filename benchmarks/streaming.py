"""Peak memory and time of compressing a large checkpoint, tensor by tensor.

    python benchmarks/streaming.py --workdir /tmp/streaming --layers 32

Makes a Llama-7B-shaped directory of random bfloat16 weights (13 GB; fewer `--layers` for less),
runs `jaxcompress compress --method rtn --bits 4 --group-size 128` on it in a process of its own,
samples that process's anonymous and shared memory, copies the same bytes plainly for comparison,
deletes everything and prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

from jaxcompress.checkpoints.safetensors import SafetensorsWriter

HIDDEN, INNER, VOCAB, HEADS = 4096, 11008, 32000, 32


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    source, out = arguments.workdir / "dense", arguments.workdir / "int4"
    try:
        size = make_llama(source, arguments.layers)
        drop_from_cache(source)
        copy_seconds = plain_copy(source, arguments.workdir / "copy")
        shutil.rmtree(arguments.workdir / "copy")
        drop_from_cache(source)
        command = [sys.executable, "-m", "jaxcompress", "compress", str(source), str(out)]
        command += ["--method", "rtn", "--bits", "4", "--group-size", "128"]
        seconds, peak = run_and_watch(command)
        result = {
            "bytes_in": size,
            "bytes_out": sum(f.stat().st_size for f in out.iterdir()),
            "seconds": round(seconds, 1),
            "copy_seconds": round(copy_seconds, 1),
            "ratio": round(seconds / copy_seconds, 2),
            "peak_anonymous_and_shared_bytes": peak,
            "machine": platform.processor() or platform.machine(),
        }
        print(json.dumps(result))
    finally:
        shutil.rmtree(arguments.workdir, ignore_errors=True)


def make_llama(directory: pathlib.Path, layers: int) -> int:
    """Write a Llama-shaped checkpoint of random weights; returns its bytes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": HIDDEN,
                "intermediate_size": INNER,
                "num_hidden_layers": layers,
                "num_attention_heads": HEADS,
                "num_key_value_heads": HEADS,
                "vocab_size": VOCAB,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "tie_word_embeddings": False,
                "torch_dtype": "bfloat16",
            }
        )
    )
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for i in range(layers):
        at = f"model.layers.{i}"
        for name in "qkvo":
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{at}.mlp.gate_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{at}.mlp.up_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes[f"{at}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (HIDDEN,)
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(INNER * HIDDEN + 4096, np.float32) * 0.02).astype(
        ml_dtypes.bfloat16
    )
    names, total = list(shapes), 0
    weight_map, shards = {}, [names[i : i + 80] for i in range(0, len(names), 80)]
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        specs = {name: (shapes[name], ml_dtypes.bfloat16) for name in shard}
        with SafetensorsWriter(directory / file, specs, {"format": "pt"}) as writer:
            for name in shard:
                weight_map[name] = file
                rows, *rest = shapes[name]
                step = max(1, noise.size // max(int(np.prod(rest)), 1) - 1)
                for at in range(0, rows, step):
                    count = min(step, rows - at) * int(np.prod(rest))
                    offset = int(rng.integers(0, noise.size - count))
                    part = noise[offset : offset + count]
                    writer.write_rows(name, part.reshape(-1, *rest))
                total += rows * int(np.prod(rest)) * 2
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def plain_copy(source: pathlib.Path, target: pathlib.Path) -> float:
    """Seconds to read and write the same bytes."""
    target.mkdir()
    start = time.monotonic()
    for file in source.iterdir():
        with open(file, "rb") as reader, open(target / file.name, "wb") as writer:
            while block := reader.read(16 << 20):
                writer.write(block)
            writer.flush()
    return time.monotonic() - start


def drop_from_cache(directory: pathlib.Path) -> None:
    """Ask the system to forget the files, so that both sides read them from the disk."""
    import os

    for file in directory.iterdir():
        with open(file, "rb") as reader:
            os.fsync(reader.fileno())
            os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_and_watch(command: list[str]) -> tuple[float, int]:
    """Seconds of a command, and the most anonymous plus shared memory it had, in bytes."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command)
    status = pathlib.Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            fields = dict(
                line.split(":", 1) for line in status.read_text().splitlines() if ":" in line
            )
            kib = sum(int(fields.get(k, "0").split()[0]) for k in ("RssAnon", "RssShmem"))
            peak = max(peak, kib * 1024)
        except (OSError, ValueError, IndexError):
            pass  # the process has just ended
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - start, peak


if __name__ == "__main__":
    main()
