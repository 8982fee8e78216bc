"""Wanda, SparseGPT and refit against llm-compressor: quality on the same tokens, and time.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/pruning_peers.py --peer VENV/bin/python \\
        [--models tinystories,py4m] [--draws 5]

The peer runs in an environment of its own (`pip install llmcompressor torch==2.13.0`); without
`--peer` its columns stay empty. Both sides are given the same checkpoint and the same calibration
tokens (`--draws` draws of 32 x 512), and write a directory; the clock runs from the start of the
process to the files written. All results are opened here and measured on the same tokens.
Won back: 1 - ln(ours / dense) / ln(theirs / dense), theirs the better of the peer's two.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.data.text import calibration_batch

PEER = """
import json, sys
import datasets, numpy, torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
model, tokens, out, method, structure = sys.argv[1:]
ids = numpy.load(tokens)
rows = {"input_ids": ids.tolist(), "attention_mask": numpy.ones_like(ids).tolist()}
kinds = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
recipe = kinds[method](sparsity=0.5, mask_structure=structure, targets=["re:.*_proj$"])
oneshot(model=model, dataset=datasets.Dataset.from_dict(rows), recipe=[recipe], output_dir=out,
        max_seq_length=ids.shape[1], num_calibration_samples=len(ids), precision="float32",
        shuffle_calibration_samples=False)
"""
OURS = """
import sys
import numpy
import jaxcompress as jc
model, tokens, out, method, pattern = sys.argv[1:]
small = jc.compress(jc.load(model), method, calibration=numpy.load(tokens), pattern=pattern)
jc.save(small, out, "dense", verify_memory=0)
"""
PATTERNS = {"50 %": ("unstructured", "0:0"), "2:4": ("2:4", "2:4")}


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


def dense_directory(path, folder):
    """A plain directory, which both sides open."""
    if Path(path).is_dir():
        return path
    jc.save(jc.load(path), folder / "dense", "dense")
    return str(folder / "dense")


def run(python, program, *given):
    """Seconds of a process, from its start to its end."""
    start = time.perf_counter()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [python, "-c", program, *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - start


def of(values):
    """Mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} +- {error:.3f}"


def main():
    """Prints and writes the table."""
    args = arguments(__doc__, peer="", models="tinystories,py4m", draws=5, tokens=60000)
    columns = ["model", "pattern", "dense", "wanda", "sparsegpt", "refit"]
    columns += ["their wanda", "their sparsegpt", "won back", "masks of wanda equal"]
    table = Table("Perplexity", columns)
    clock = Table("Seconds", ["model", "pattern", "sparsegpt", "their sparsegpt", "ratio"])
    for name, (path, calibration, heldout) in models(args.models).items():
        with tempfile.TemporaryDirectory() as folder:
            compare(name, path, calibration, heldout, Path(folder), args, table, clock)
    write(args.out, "pruning_peers", __doc__, [table, clock])


def compare(name, path, calibration, heldout, folder, args, table, clock):
    """The rows of one model."""
    model = jc.load(path)
    source = dense_directory(path, folder)

    def perplexity(what):
        found = jc.evaluate(what, text=heldout, ctx=512, tokens=args.tokens)
        return found["perplexity"]

    dense = perplexity(model)
    for pattern, (ours, theirs) in PATTERNS.items():
        found = {}
        seconds = {}
        for draw in range(args.draws):
            ids = calibration_batch(calibration, model.tokenizer, samples=32, ctx=512, seed=draw)
            tokens = folder / "tokens.npy"
            np.save(tokens, ids)
            sides = [("", sys.executable, OURS, ours, ("wanda", "sparsegpt", "refit"))]
            if args.peer:
                sides.append(("their ", args.peer, PEER, theirs, ("wanda", "sparsegpt")))
            for side, python, program, given, methods in sides:
                for method in methods:
                    out = folder / f"{side}{method}-{draw}-{ours.replace(':', '-')}"
                    took = run(python, program, source, tokens, out, method, given)
                    seconds.setdefault(side + method, []).append(took)
                    found.setdefault(side + method, []).append(perplexity(jc.load(out)))
        row = [of(found[m]) if m in found else "" for m in (*columns_of(found),)]
        table.add(name, pattern, dense, *row, *against(found, dense), equal(folder, ours, args))
        if args.peer:
            a, b = seconds["sparsegpt"], seconds["their sparsegpt"]
            ratio = statistics.median(y / x for x, y in zip(a, b))
            clock.add(name, pattern, statistics.median(a), statistics.median(b), ratio)


def columns_of(found):
    """Names of the perplexities, in the order of the table."""
    return ("wanda", "sparsegpt", "refit", "their wanda", "their sparsegpt")


def against(found, dense):
    """How much nearer to dense refit is than the better of the peer's."""
    if "their wanda" not in found:
        return [""]
    best = min(statistics.mean(found[m]) for m in ("their wanda", "their sparsegpt"))
    return [f"{1 - math.log(statistics.mean(found['refit']) / dense) / math.log(best / dense):.1%}"]


def equal(folder, pattern, args):
    """Share of the entries at which both sides' Wanda agree what goes, over all draws."""
    if not args.peer:
        return ""
    same = total = 0
    for draw in range(args.draws):
        end = f"wanda-{draw}-{pattern.replace(':', '-')}"
        ours, theirs = (jc.load_params(folder / f"{side}{end}") for side in ("", "their "))
        for a, b in zip(*(kernels(tree) for tree in (ours, theirs)), strict=True):
            same += int(((a == 0) == (b == 0)).sum())
            total += a.size
    return f"{same / total:.5%}"


def kernels(tree, path=""):
    """Projections of a state dict, in the order of their names."""
    if not isinstance(tree, dict):
        return [np.asarray(tree)] if "_proj" in path else []
    return [x for key in sorted(tree) for x in kernels(tree[key], f"{path}/{key}")]


if __name__ == "__main__":
    main()
