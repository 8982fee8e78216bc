"""Mixed precision against one format for all parameters, at the same bytes, rounded to nearest.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/mixed_precision.py

On `DIR/tinystories-656k`: sensitivities of every matrix in integers of 2 to 8 bits, groups of 64,
measured (KL) and estimated on 8 x 512 tokens of `tinystories-train-head.txt`; then, at the bytes
of each uniform format, the best assignment by each measure, rounded by `rtn`. Perplexity and KL
from the dense model on the first 60,000 tokens of `tinystories-valid.txt`. Writes the frontier of
the measured sensitivities and the reasons at the bytes of 4 bits beside the table.
"""

import os
import time
from pathlib import Path

import numpy as np
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.data.text import calibration_batch
from jaxcompress.quantization import frontier as records
from jaxcompress.quantization.allocation import allocate, frontier, uniform
from jaxcompress.quantization.sensitivity import sensitivities

CTX, GROUP, BITS = 512, 64, (2, 3, 4, 5, 6, 8)
MEASURES = ("kl", "fisher", "hessian_trace", "kronecker")
CANDIDATES = [{"bits": bits, "group_size": GROUP} for bits in BITS]


def quality(dense, text, tokens, allocation):
    """Perplexity and KL of the model rounded to nearest as the allocation says."""
    small = jc.compress(
        dense, "rtn", overrides=allocation.overrides(), exclude=allocation.dense() or None
    )
    found = jc.evaluate(small, text=text, ctx=CTX, tokens=tokens, against=dense)
    return found["perplexity"], found["kl"]


def main():
    """Prints and writes the tables."""
    args = arguments(__doc__, tokens=60_000, windows=8)
    if "JAXCOMPRESS_ASSETS" not in os.environ:
        raise SystemExit("set JAXCOMPRESS_ASSETS to the folder that holds tinystories-656k")
    assets = Path(os.environ["JAXCOMPRESS_ASSETS"])
    dense = jc.load(assets / "tinystories-656k")
    text = assets / "text" / "tinystories-valid.txt"
    given = calibration_batch(
        assets / "text" / "tinystories-train-head.txt",
        dense.tokenizer,
        samples=args.windows,
        ctx=CTX,
        seed=0,
    )
    ids = np.asarray(given)

    columns = ["formats", "bits", "bytes", "predicted", "KL", "perplexity", "chosen in s"]
    table = Table("TinyStories-656K, groups of 64", columns)
    start = jc.evaluate(dense, text=text, ctx=CTX, tokens=args.tokens)["perplexity"]
    table.add("dense", "32", None, None, None, f"{start:.2f}", None)
    tables, seconds = {}, {}
    for by in MEASURES:
        begin = time.perf_counter()
        tables[by] = sensitivities(dense, CANDIDATES, calibration=ids, by=by)
        seconds[by] = time.perf_counter() - begin

    def add(name, allocation, chosen_in=None):
        value, kl = quality(dense, text, args.tokens, allocation)
        bits, predicted = f"{allocation.bits:.2f}", f"{allocation.cost:.4f}"
        table.add(
            name, bits, allocation.bytes, predicted, f"{kl:.4f}", f"{value:.2f}",
            None if chosen_in is None else f"{chosen_in:.0f}",
        )  # fmt: skip

    for candidate in tables["kl"].candidates[1:5]:
        same = uniform(tables["kl"], candidate.name)
        add(f"{candidate.name} for all", same)
        for by in MEASURES:
            best = allocate(tables[by], budget_bytes=same.bytes)
            add(f"mixed by {by}", best, seconds[by])
        free = allocate(tables["kl"], budget_bytes=same.bytes, tied=False)
        add("mixed by kl, free of its neighbours", free, seconds["kl"])

    folder = args.out / "mixed_precision"
    records.write(folder, frontier(tables["kl"], points=24))
    four = allocate(tables["kl"], budget_bytes=uniform(tables["kl"], "int4 g64").bytes)
    (folder / "reasons.md").write_text(records.reasons(four))
    notes = [
        "Bytes and bits of the 14 matrices, with their float32 scales. Predicted: the sum of the "
        "costs, nats per prediction, each measured or estimated with one matrix rounded alone. "
        "Matrices that read the same values share a format, but in the last row of each block.",
        f"Seconds of the sensitivities alone, {len(BITS)} formats, compilation counted; the "
        "programme itself takes milliseconds.",
    ]
    write(args.out, "mixed_precision", __doc__, [table], notes)


if __name__ == "__main__":
    main()
