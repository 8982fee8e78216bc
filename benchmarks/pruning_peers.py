"""Wanda, SparseGPT and our best against llm-compressor: quality on the same tokens, and time.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/pruning_peers.py --peer VENV/bin/python \\
        [--models tinystories,py4m] [--draws 5] [--runs 3]

The peer runs in an environment of its own (`pip install llmcompressor torch==2.13.0`); without
`--peer` its columns stay empty. Both sides are given the same checkpoint and the same calibration
tokens (`--draws` draws of 32 x 512 from the training text), all results are measured here on the
same held-out tokens; masks are compared with ours of a forward pass in float32, as the peer's is.
Nearer: 1 - ln(ours / dense) / ln(theirs / dense), theirs the better of the
peer's two; ours the best one-shot method here, `--method auto`.

Time: SparseGPT 2:4, `--runs` alternating runs, the clock from the start of the process to the files
written on both sides; ours with the compiled programs of an earlier run at hand, and without; on
the given models and on a Llama of 6 layers, d 512, random weights. Then the solver alone on a
4096 x 4096 matrix, without loading, the second moment given. What is done is kept in `--workdir`,
and a second run of this script goes on from there.
"""

import math
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
from peers import SECONDS, Comparison, Kept, Timed, models, of, peer, random_llama
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.models import linear_paths

PATTERNS = {"50 %": ("unstructured", "0:0"), "2:4": ("2:4", "2:4")}
OURS = ("wanda", "sparsegpt", "auto")
THEIRS = ("wanda", "sparsegpt")

PEER = """
import sys
import datasets, numpy, torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM
kinds = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
for job in sys.argv[1:]:
    model, tokens, out, method, structure = job.split("|")
    ids = numpy.load(tokens)
    rows = {"input_ids": ids.tolist(), "attention_mask": numpy.ones_like(ids).tolist()}
    recipe = kinds[method](sparsity=0.5, mask_structure=structure, targets=["re:.*_proj$"])
    oneshot(model=model, dataset=datasets.Dataset.from_dict(rows), recipe=[recipe], output_dir=out,
            max_seq_length=ids.shape[1], num_calibration_samples=len(ids), precision="float32",
            shuffle_calibration_samples=False)
"""
COMMAND = """
import sys
import numpy
import jaxcompress as jc
model, tokens, out, method, pattern = sys.argv[1].split("|")
small = jc.compress(jc.load(model), method, calibration=numpy.load(tokens), pattern=pattern)
jc.save(small, out, "dense", verify_memory=0)
"""
SOLVER = """
import sys, time
import torch
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight
n, runs = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
module = torch.nn.Linear(n, n, bias=False)
x = torch.randn(2 * n, n)
hessian = x.T @ x / len(x)
for _ in range(runs):
    start = time.perf_counter()
    sparsify_weight(module, {module: hessian.clone()}, 0.5, 2, 4, 128, 0.01, False)
    print("seconds", time.perf_counter() - start)
"""


class Pruning(Comparison):
    """One model pruned by both sides."""

    def ours(self, method, pattern, draw):
        def compute():
            small = jc.compress(
                self.model, method, calibration=self.tokens[draw], pattern=PATTERNS[pattern][0]
            )
            return self.perplexity(small)

        return self.kept(f"{self.name} {pattern} {draw} {method}", compute)

    def theirs(self, method, pattern, draw):
        def compute():
            out = self.folder / f"their-{method}"
            shutil.rmtree(out, ignore_errors=True)
            job = (self.source, self.tokens_file(draw), out, method)
            peer(self.args.peer, PEER, "|".join(map(str, (*job, PATTERNS[pattern][1]))))
            small = jc.load(out)
            if method == "wanda":
                found, own = masks(small), self._masks(pattern, draw)
                same = sum((found[path] == own[path]).sum() for path in found)
                share = float(same / sum(mask.size for mask in found.values()))
                self.kept(f"{self.name} {pattern} {draw} equal", lambda: share)
            return self.perplexity(small)

        return self.kept(f"{self.name} {pattern} {draw} their {method}", compute)

    def _masks(self, pattern, draw):
        """Ours of Wanda, of a forward pass in float32 as the peer's is."""
        model = jc.load(self.source, dtype="float32")
        given = {"calibration": self.tokens[draw], "pattern": PATTERNS[pattern][0]}
        return masks(jc.compress(model, "wanda", **given))

    def row(self, pattern):
        """The table's row."""
        dense = self.kept(f"{self.name} dense", lambda: self.perplexity(self.model))
        draws = range(self.args.draws)
        ours = {m: [self.ours(m, pattern, draw) for draw in draws] for m in OURS}
        row = [self.name, pattern, f"{dense:.3f}", *map(of, ours.values())]
        if not self.args.peer:
            return [*row, "", "", "", ""]
        theirs = {m: [self.theirs(m, pattern, draw) for draw in draws] for m in THEIRS}
        equal = [self.kept(f"{self.name} {pattern} {draw} equal", None) for draw in draws]
        best = min(map(statistics.mean, theirs.values()))
        nearer = 1 - math.log(statistics.mean(ours["auto"]) / dense) / math.log(best / dense)
        return [*row, *map(of, theirs.values()), f"{nearer:.1%}", f"{min(equal):.4%}"]


def masks(model):
    """Where the linear weights are zero, by path."""
    leaves = dict(leaves_with_paths(model.params))
    return {path: np.asarray(leaves[path]) == 0 for path in linear_paths(model)}


def solver(kept, args, clock):
    """The solver alone, 2:4, on both sides."""
    import jax
    import jax.numpy as jnp

    from jaxcompress.layerwise import solve

    n = 4096

    def ours():
        x = jax.random.normal(jax.random.key(0), (2 * n, n))
        moment, weight = x.T @ x / len(x), jax.random.normal(jax.random.key(1), (n, n)) / 64
        seconds = []
        for _ in range(args.runs + 1):
            start = time.perf_counter()
            jax.block_until_ready(solve(jnp.copy(weight), moment, n_m=(2, 4)))
            seconds.append(time.perf_counter() - start)
        return seconds[1:]

    def theirs():
        told = peer(args.peer, SOLVER, n, args.runs + 1).splitlines()
        return [float(line.split()[1]) for line in told if line.startswith("seconds")][1:]

    found = {}
    for number in range(args.runs):  # alternating, the median of each
        found.setdefault("warm", []).append(statistics.median(kept(f"solver {number} ours", ours)))
        if args.peer:
            found.setdefault("theirs", []).append(
                statistics.median(kept(f"solver {number} theirs", theirs))
            )
    row = [f"{statistics.median(found['warm']):.2f}", "", "", "", ""]
    if args.peer:
        ratio = statistics.median(b / a for a, b in zip(found["warm"], found["theirs"]))
        row[2:4] = f"{statistics.median(found['theirs']):.2f}", f"{ratio:.2f}"
    clock.add(f"solver alone, {n} x {n}", *row)


def main():
    """Prints and writes the tables."""
    args = arguments(
        __doc__,
        peer="",
        models="tinystories,py4m",
        draws=5,
        tokens=60000,
        runs=3,
        workdir="pruning_peers.partial",
    )
    work = Path(args.workdir)
    work.mkdir(parents=True, exist_ok=True)
    kept = Kept(work / "figures.json")
    columns = ["model", "pattern", "dense", *OURS, *(f"their {m}" for m in THEIRS)]
    table = Table("Perplexity", [*columns, "nearer", "masks of wanda equal"])
    clock = Table("Seconds", SECONDS)
    wanted = models(args.models)
    if args.draws:
        for name, (path, calibration, heldout) in wanted.items():
            compared = Pruning(name, path, calibration, heldout, kept, args)
            for pattern in PATTERNS:
                table.add(*compared.row(pattern))
    if args.runs:
        six = random_llama(work)
        spent = Timed(COMMAND, PEER, kept, args, clock)
        spent("6 layers, d 512", six, f"{six}/tokens-0.npy", "sparsegpt|2:4")
        if "py4m" in wanted:
            own = Pruning("py4m", *wanted["py4m"], kept, args)
            spent("py4m", own.source, own.tokens_file(0), "sparsegpt|2:4")
        solver(kept, args, clock)
    write(args.out, "pruning_peers", __doc__, [table, clock])


if __name__ == "__main__":
    main()
