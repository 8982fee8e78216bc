"""2:4 and int4 at once, against SparseGPT and then GPTQ, and llm-compressor's chain of both.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/joint_sparse_int4.py --peer VENV/bin/python \\
        [--models tinystories,py4m] [--format 4:128] [--draws 3]

The peer runs in an environment of its own (`pip install llmcompressor torch`); without `--peer` its
rows are left out. Both sides are given the same checkpoint in float32 and the same calibration
tokens (`--draws` draws of 32 x 512 from the training text); the format is bits:group, symmetric
integers; embeddings stay as they are. All results are measured here, in float32: perplexity and KL
to the dense model on the same held-out tokens; the layer error is the mean over the matrices of
|X (Q - W)'|^2 / |X W'|^2 with the dense model's inputs X. After +- stands the standard error over
the draws; KL against the chain is a row's minus that of `sparsegpt+gptq`, draw for draw.

llm-compressor's GPTQ knows of no mask. Its chain is shown as its recipe of both modifiers gives it
(the column 2:4 says how many runs of four still have two zeros), and in two steps, SparseGPT, then
GPTQ of that checkpoint, then the zeros of the first step put back. What is done is kept in
`--workdir`, and a second run of this script goes on from there.
"""

import shutil
from pathlib import Path

import jax
import numpy as np
from peers import Kept, models, of, peer
from quantization_peers import Rounding
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.core.arrays.base import dense
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.models import linear_paths

PEER = """
import sys
import datasets, numpy, torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
targets = ["re:.*_proj$"]
for job in sys.argv[1:]:
    model, tokens, out, steps, bits, group = job.split("|")
    ids = numpy.load(tokens)
    rows = {"input_ids": ids.tolist(), "attention_mask": numpy.ones_like(ids).tolist()}
    weights = {"num_bits": int(bits), "type": "int", "symmetric": True, "strategy": "channel"}
    if int(group) > 0:
        weights |= {"strategy": "group", "group_size": int(group)}
    recipe = []
    if "sparsegpt" in steps:
        recipe.append(SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=targets))
    if "gptq" in steps:
        groups = {"group_0": {"targets": targets, "weights": weights}}
        recipe.append(GPTQModifier(config_groups=groups))
    oneshot(model=model, dataset=datasets.Dataset.from_dict(rows), recipe=recipe, output_dir=out,
            max_seq_length=ids.shape[1], num_calibration_samples=len(ids), precision="float32",
            shuffle_calibration_samples=False)
"""
CHAIN = "sparsegpt+gptq"
OURS = {  # name -> method, its options beside pattern and format
    "sparsegpt alone, not rounded": ("sparsegpt", None),
    CHAIN: (CHAIN, {"act_order": None}),
    "sparsegpt+gptq, both in falling order": (CHAIN, {"act_order": True}),
    "sparsegpt, joint": ("sparsegpt", {}),
    "kronecker+coordinate": ("kronecker+coordinate", {}),
    "kronecker, joint": ("kronecker", {}),
    "kronecker, joint, +tune": ("kronecker+tune", {}),
}
RECIPE, PUT_BACK = "their recipe", "theirs in two steps, zeros put back"


class Joint(Rounding):
    """One model pruned and rounded by both sides."""

    def __init__(self, *given):
        super().__init__(*given)
        self.paths = linear_paths(self.model)
        self.moments = {}

    def matrices(self, model):
        """The linear weights by path, float32 `[K, N]`."""
        leaves = dict(leaves_with_paths(model.params))
        return {path: np.asarray(dense(leaves[path]), np.float32) for path in self.paths}

    def layer_error(self, model, draw):
        """Mean over the matrices of the squared error of the outputs, relative."""
        if draw not in self.moments:
            see = jax.jit(jc.capture(self.model.apply, "second_moment", include=self.paths))
            found = dict.fromkeys(self.paths, 0.0)
            for ids in np.split(self.tokens[draw], 8):
                seen = see(self.model.params, ids)
                for path in self.paths:
                    found[path] += np.asarray(seen[path, 0]["second_moment"], np.float64)
            self.moments[draw] = found
        wanted, given = self.matrices(self.model), self.matrices(model)
        shares = []
        for path, moment in self.moments[draw].items():
            change = given[path].astype(np.float64) - wanted[path]
            error, whole = (np.sum(x * (moment @ x)) for x in (change, wanted[path]))
            shares.append(error / whole)
        return float(np.mean(shares))

    def figures(self, model, draw):
        """What is kept of a model."""
        runs = [(w != 0).T.reshape(-1, 4).sum(-1) <= 2 for w in self.matrices(model).values()]
        share = float(np.mean(np.concatenate(runs)))
        return {**self.quality(model), "layers": self.layer_error(model, draw), "2:4": share}

    def run_ours(self, name, spec, draw):
        """Figures of one of `OURS`."""
        method, more = OURS[name]
        bits, group = map(int, spec.split(":"))
        numbers = {} if more is None else {"bits": bits, "group_size": group, **more}

        def compute():
            given = {"calibration": self.tokens[draw], "pattern": "2:4", **numbers}
            return self.figures(jc.compress(self.model, method, **given), draw)

        return self.kept(f"{spec} {draw} {name}", compute)

    def run_theirs(self, spec, draws):
        """Both chains of the peer for all draws, what is missing in one process."""
        jobs, missing = [], []
        for draw in draws:
            if all(f"{spec} {draw} {name}" in self.kept.known for name in (RECIPE, PUT_BACK)):
                continue
            missing.append(draw)
            tokens, numbers = self.tokens_file(draw), spec.split(":")
            for steps, source in (
                ("sparsegpt+gptq", self.source),
                ("sparsegpt", self.source),
                ("gptq", self.their_folder(draw, "sparsegpt")),
            ):
                out = self.their_folder(draw, steps)
                shutil.rmtree(out, ignore_errors=True)
                jobs.append("|".join(map(str, (source, tokens, out, steps, *numbers))))
        if jobs:
            peer(self.args.peer, PEER, *jobs)
        for draw in missing:
            recipe, sparse, rounded = (
                jc.load(self.their_folder(draw, steps), dtype="float32")
                for steps in ("sparsegpt+gptq", "sparsegpt", "gptq")
            )
            zeros = self.matrices(sparse)
            params = map_with_paths(
                lambda path, leaf: dense(leaf) * (zeros[path] != 0) if path in zeros else leaf,  # noqa: B023
                rounded.params,
            )
            put_back = rounded.replace(params=params)
            for name, model in ((RECIPE, recipe), (PUT_BACK, put_back)):
                self.kept(
                    f"{spec} {draw} {name}",
                    lambda model=model, draw=draw: self.figures(model, draw),
                )

    def their_folder(self, draw, steps):
        """Where the peer writes."""
        return self.folder / f"theirs-{draw}-{steps.replace('+', '-')}"


def rows(compared, spec, table):
    """A row of the table for each way."""
    draws = range(compared.args.draws)
    found = {name: [compared.run_ours(name, spec, draw) for draw in draws] for name in OURS}
    if compared.args.peer:
        compared.run_theirs(spec, draws)
    for name in (RECIPE, PUT_BACK):
        keys = [f"{spec} {draw} {name}" for draw in draws]
        if all(key in compared.kept.known for key in keys):
            found[name] = [compared.kept.known[key] for key in keys]
    perplexity = compared.kept("dense", lambda: compared.quality(compared.model)["perplexity"])
    table.add(compared.name, "dense", "", f"{perplexity:.3f}", "", "", "")
    for name, each in found.items():
        against = [one["kl"] - chain["kl"] for one, chain in zip(each, found[CHAIN], strict=True)]
        table.add(
            compared.name,
            name,
            f"{np.mean([one['2:4'] for one in each]):.1%}",
            of([one["perplexity"] for one in each]),
            of([one["kl"] for one in each], ".4f"),
            of([one["layers"] for one in each], ".5f"),
            "" if name == CHAIN else of(against, "+.4f"),
        )


def main():
    """Computes what is missing; prints and writes the table."""
    args = arguments(
        __doc__,
        peer="",
        models="tinystories,py4m",
        format="4:128",
        draws=3,
        tokens=60000,
        workdir="joint_sparse_int4.partial",
    )
    work = Path(args.workdir)
    work.mkdir(parents=True, exist_ok=True)
    bits, group = args.format.split(":")
    title = f"2:4 with {bits} bits in groups of {group}"
    columns = ["model", "way", "2:4", "perplexity", "KL to dense", "layer error", "KL - chain's"]
    table = Table(title, columns)
    for name, given in models(args.models).items():
        rows(Joint(name, *given, Kept(work / f"{name}.json"), args), args.format, table)
    write(args.out, "joint_sparse_int4", __doc__, [table])


if __name__ == "__main__":
    main()
