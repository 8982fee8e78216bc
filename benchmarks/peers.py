"""What comparisons with other libraries share: models, tokens, kept figures, their processes."""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

import jaxcompress as jc
from jaxcompress.data.text import calibration_batch, token_ids


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
