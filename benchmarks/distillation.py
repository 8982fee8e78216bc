"""What a teacher adds: recovery of a dropped layer with and without it, over several seeds.

    python benchmarks/distillation.py --steps 60 --seeds 3 [--recoveries 0,2]

Drops one layer of `builtin:py4m` (the same one each time) and trains the rest back, once against
the whole model and once on the text alone, with the same batches, steps and learning rate.
"""

import math
import statistics
import tempfile
from pathlib import Path

from tables import Table, arguments, write

import jaxcompress as jc


def config(seed, recovery, steps, tokens):
    """The recipe of one run; `recovery` is the stage that trains."""
    training = {"steps": steps, "batch_size": 16, "learning_rate": 1e-3, "warmup": 5}
    return {
        "name": f"{recovery['method']} {seed}",
        "seed": seed,
        "model": {"path": "builtin:py4m"},
        "data": {
            "train": "python-stdlib",
            "heldout": "python-stdlib:heldout",
            "ctx": 256,
            "tokens": tokens,
        },
        "stages": ({"method": "depth", "drop": 1}, {**recovery, **training}),
    }


def main():
    """Prints and writes the table."""
    args = arguments(__doc__, steps=60, seeds=3, tokens=40960, recoveries="0,1,2,3")
    recoveries = {
        "without a teacher": {"method": "finetune"},
        "alpha 0.5, temperature 1": {"method": "distill", "alpha": 0.5, "temperature": 1.0},
        "alpha 0.5, temperature 2": {"method": "distill", "alpha": 0.5, "temperature": 2.0},
        "alpha 1, temperature 1": {"method": "distill", "alpha": 1.0, "temperature": 1.0},
    }
    chosen = [list(recoveries)[int(i)] for i in args.recoveries.split(",")]
    columns = ["recovery", "seed", "perplexity", "train text", "KL", "agreement", "won back"]
    table = Table("A layer dropped and trained back", columns)
    means = Table("Over the seeds", ["recovery", "perplexity, mean", "standard deviation", "KL"])
    for name in chosen:
        found, recovery = [], recoveries[name]
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                report = jc.run(config(seed, recovery, args.steps, args.tokens), Path(folder) / "w")
            start, cut, now = (s["quality"]["heldout"] for s in report["stages"])
            train = report["stages"][-1]["quality"]["train"]["perplexity"]
            found.append(now)
            lost = cut["perplexity"] / start["perplexity"]
            share = share_won_back(start["perplexity"], cut["perplexity"], now["perplexity"])
            table.add(
                name, seed, f"{now['perplexity']:.4f}", f"{train:.4f}", f"{now['kl']:.4f}",
                f"{now['agreement']:.4f}", f"{share:.1%}",
            )  # fmt: skip
        values = [row["perplexity"] for row in found]
        means.add(
            name, f"{statistics.mean(values):.4f}", f"{statistics.stdev(values):.4f}",
            f"{statistics.mean(row['kl'] for row in found):.4f}",
        )  # fmt: skip
    notes = [
        f"Held-out perplexity {start['perplexity']:.4f} before the cut, {cut['perplexity']:.4f} "
        f"after it ({lost:.2f} times); {args.steps} steps of 4096 tokens. Won back: of the "
        "log-perplexity that the cut cost."
    ]
    write(args.out, "distillation", __doc__, [table, means], notes)


def share_won_back(before, cut, now):
    """Share of the lost log-perplexity."""
    return math.log(cut / now) / math.log(cut / before)


if __name__ == "__main__":
    main()
