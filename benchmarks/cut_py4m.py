"""A quarter of the depth or of the width of `builtin:py4m` cut, and distilled back.

    python benchmarks/cut_py4m.py [--steps 60] [--batch 16] [--cuts 0,1,2,3] [--work FOLDER]

Every cut is a recipe: cut, export, distil from the whole model, export. Each export is opened by
stock transformers, and its perplexity measured there (by this program, without jaxcompress) and
here on the same tokens. What is done stays in the working folder, and a second call goes on there.
"""

import math
import tempfile
from pathlib import Path

from perplexity_table import torch_model, torch_perplexity
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.data.text import token_ids

CTX = 256
HELDOUT = "python-stdlib:heldout"
CUTS = {
    "depth: 1 of 5 layers": ({"method": "depth", "drop": 1, "score": "perplexity"},),
    "depth: 2 of 5 layers": ({"method": "depth", "drop": 2, "score": "perplexity"},),
    "width: 256 -> 192, 384 -> 288": (
        {"method": "width", "sparsity": 0.25, "multiple": 64},
        {
            "method": "neurons",
            "sparsity": 0.25,
            "multiple": 32,
            "score": "activation_l2",
            "compensate": "refit",
        },
    ),
    "both: a quarter of the parameters": (
        {"method": "shrink", "budget": 0.75, "kinds": "depth,width,neurons", "multiple": 32},
    ),
}


def config(name, cut, steps, batch, tokens):
    """The recipe of one cut."""
    recovery = {"method": "distill", "steps": steps, "batch_size": batch, "learning_rate": 1e-3}
    return {
        "name": name,
        "model": {"path": "builtin:py4m"},
        "data": {"train": "python-stdlib", "heldout": HELDOUT, "ctx": CTX, "tokens": tokens},
        "stages": (
            *cut,
            {"method": "export", "path": "cut"},
            {**recovery, "warmup": 5, "temperature": 1.0, "checkpoint_every": 20},
            {"method": "export", "path": "distilled"},
        ),
    }


def main():
    """Prints and writes the table, again after each cut."""
    args = arguments(__doc__, steps=60, batch=16, tokens=40_960, cuts="0,1,2,3", work="")
    work = Path(args.work or Path(tempfile.gettempdir()) / f"cut_py4m-{args.steps}-{args.batch}")
    dense = jc.load("builtin:py4m")
    ids = token_ids(HELDOUT, dense.tokenizer)[: args.tokens]
    columns = ["cut", "parameters", "MFLOPs a token", "perplexity", "in PyTorch", "apart",
               "KL", "won back"]  # fmt: skip
    table = Table("py4m, a quarter less", columns)
    for number in map(int, args.cuts.split(",")):
        name = list(CUTS)[number]
        folder = work / str(number)
        recipe = config(name, CUTS[name], args.steps, args.batch, args.tokens)
        report = jc.run(recipe, folder)
        stages = {stage["name"]: stage for stage in report["stages"]}
        start = stages["00-start"]
        if not table.rows:
            add(table, "none", start, 0.0)
        exports = [stage for stage in report["stages"] if stage["method"] == "export"]
        before = start["quality"]["heldout"]["perplexity"]
        cut = exports[0]["quality"]["heldout"]["perplexity"]
        for what, stage in zip(("cut", "distilled"), exports, strict=True):
            now = stage["quality"]["heldout"]["perplexity"]
            back = math.log(cut / now) / math.log(cut / before)
            theirs, count = torch_perplexity(torch_model(folder / what), ids, CTX)
            assert count == stage["quality"]["heldout"]["tokens"]
            add(table, f"{name}, {what}", stage, back, theirs)
        notes = [
            f"Held-out Python sources, {count:,} predicted tokens in windows of {CTX}; exports in "
            f"bfloat16, as the model came. Distilled from the whole model: {args.steps} steps of "
            f"{args.batch} x {CTX} tokens, KL at temperature 1 and cross entropy half and half. "
            "KL in nats a token against the whole model. Apart: PyTorch's perplexity over ours, "
            "less 1. Won back: of the log-perplexity that the cut cost. 5 layers have no quarter: "
            "one is a fifth, two are two fifths."
        ]
        write(args.out, "cut_py4m", __doc__, [table], notes)


def add(table, name, stage, back, theirs=None):
    """A row of the table."""
    quality, size = stage["quality"]["heldout"], stage["size"]
    ours = quality["perplexity"]
    table.add(
        name, f"{size['parameters']:,}", f"{size['flops'] / 1e6:.3f}", f"{ours:.4f}",
        None if theirs is None else f"{theirs:.4f}",
        None if theirs is None else f"{theirs / ours - 1:.1e}",
        f"{quality.get('kl', 0.0):.4f}", f"{back:.1%}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
