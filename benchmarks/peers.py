"""What comparisons with other libraries share: models, tokens, kept figures, their processes."""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import jaxcompress as jc
from jaxcompress.data.text import calibration_batch, token_ids

SECONDS = ["what", "warm", "cold", "theirs", "ratio warm", "ratio cold"]


def models(wanted):
    """name -> (directory, calibration text, evaluation text)."""
    assets = Path(os.environ["JAXCOMPRESS_ASSETS"])
    known = {
        "tinystories": (
            str(assets / "tinystories-656k"),
            str(assets / "text" / "tinystories-train-head.txt"),
            str(assets / "text" / "tinystories-valid.txt"),
        ),
        "py4m": ("builtin:py4m", "python-stdlib", "python-stdlib:heldout"),
    }
    return {name: known[name] for name in wanted.split(",")}


class Kept:
    """Figures by name in a file, computed when they are first asked for."""

    def __init__(self, path):
        self.path = path
        self.known = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, name, compute):
        if name not in self.known:
            self.known[name] = compute()
            self.path.write_text(json.dumps(self.known, indent=1))
            print(name, self.known[name], flush=True)
        return self.known[name]


def peer(python, program, *given, cache=None):
    """What a process prints; its errors end this one."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    if cache is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [python, "-c", program, *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


class Comparison:
    """One model that both sides compress: a checkpoint that both open, and the same tokens."""

    def __init__(self, name, path, calibration, heldout, kept, args, dtype=None):
        self.name, self.kept, self.args = name, kept, args
        self.folder = kept.path.parent / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.source = path
        self.model = jc.load(path)
        if not Path(path).is_dir():
            self.source = str(self.folder / "dense")
            if not Path(self.source).exists():
                jc.save(self.model, self.source, "dense")
        if dtype is not None:
            self.model = jc.load(self.source, dtype=dtype)
        tokenizer = self.model.tokenizer
        self.heldout = token_ids(heldout, tokenizer)[: args.tokens]
        self.tokens = []
        for draw in range(max(args.draws, 1)):
            ids = calibration_batch(calibration, tokenizer, samples=32, ctx=512, seed=draw)
            np.save(self.tokens_file(draw), ids)
            self.tokens.append(ids)

    def tokens_file(self, draw):
        """Where the calibration tokens of a draw lie."""
        return self.folder / f"tokens-{draw}.npy"

    def perplexity(self, model):
        """On the held-out tokens."""
        return jc.evaluate(model, text=self.heldout, ctx=512)["perplexity"]


def of(values, form=".3f"):
    """Mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} +- {error:{form.lstrip('+')}}"


def random_llama(folder):
    """A directory with a Llama of 6 layers, d 512, and calibration tokens for it."""
    out = folder / "six"
    if not (out / "tokens-0.npy").exists():
        import torch
        import transformers

        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=2048,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=6,
            num_attention_heads=8,
            tie_word_embeddings=True,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(out)
        assets = Path(os.environ["JAXCOMPRESS_ASSETS"])
        for file in (assets / "tinystories-656k").glob("tokenizer*"):
            shutil.copy(file, out)
        ids = np.random.default_rng(0).integers(0, 2048, (32, 512)).astype(np.int32)
        np.save(out / "tokens-0.npy", ids)
    return str(out)


class Timed:
    """Alternating runs of a program of ours and one of theirs, processes from start to end.

    Args:
      ours: program; its argument is "model|tokens|out|...".
      theirs: likewise, in the peer's environment.
      kept: where figures lie.
      args: of the command line: `peer`, `runs`.
      clock: table with the columns `SECONDS`.
    """

    def __init__(self, ours, theirs, kept, args, clock):
        self.ours, self.theirs, self.kept, self.args, self.clock = ours, theirs, kept, args, clock

    def __call__(self, name, source, tokens, how):
        """A row: medians, and the medians of the ratios of runs that stood beside each other."""
        found = {"warm": [], "cold": [], "theirs": []}
        folder = self.kept.path.parent
        out = folder / "out"
        for number in range(-1, self.args.runs):  # the first one fills the cache
            for side in found:
                cold = folder / "no-programs"
                shutil.rmtree(cold, ignore_errors=True)
                cache = {"warm": folder / "programs", "cold": cold}.get(side)
                python, program = sys.executable, self.ours
                if side == "theirs":
                    python, program = self.args.peer, self.theirs
                if not python or (number < 0 and side != "warm"):
                    continue

                def compute(python=python, program=program, cache=cache):
                    shutil.rmtree(out, ignore_errors=True)
                    start = time.perf_counter()
                    peer(python, program, f"{source}|{tokens}|{out}|{how}", cache=cache)
                    return time.perf_counter() - start

                seconds = self.kept(f"seconds {name} {number} {side}", compute)
                if number >= 0:
                    found[side].append(seconds)
        medians = [f"{statistics.median(v):.1f}" if v else "" for v in found.values()]
        ratios = ["", ""]
        if found["theirs"]:
            pairs = [zip(found[side], found["theirs"]) for side in ("warm", "cold")]
            ratios = [f"{statistics.median(b / a for a, b in pair):.2f}" for pair in pairs]
        self.clock.add(name, *medians, *ratios)
