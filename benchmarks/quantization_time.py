"""Time of GPTQ against llm-compressor: from the start of the process to the files written.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/quantization_time.py --peer VENV/bin/python [--runs 3]

Both sides: W4 in groups of 128, static scales, activation order, calibration on 32 x 512 tokens,
float32; a Llama of 6 layers, d 512, random weights, and tinystories-656k and `builtin:py4m`. Ours
walks block after block, as theirs does, and matrix after matrix, which runs each block once.
`--runs` alternating runs: ours with the compiled programs of an earlier run at hand (warm) and
without (cold), theirs in an environment of its own (`pip install llmcompressor torch==2.13.0`).
Ratios are medians over the runs of theirs / ours. What is done is kept in `--workdir`.
"""

from pathlib import Path

from peers import SECONDS, Comparison, Kept, Timed, models, random_llama
from quantization_peers import COMPRESSOR
from tables import Table, arguments, write

OURS = """
import sys
import numpy
import jaxcompress as jc
model, tokens, out, method, bits, group = sys.argv[1].split("|")
options = {"bits": int(bits), "group_size": int(group)}
options["sequential"] = SEQUENTIAL
small = jc.compress(jc.load(model), method, calibration=numpy.load(tokens), **options)
jc.save(small, out, "compressed-tensors", verify_memory=0)
"""
HOW = "gptq|4|128"


def main():
    """Prints and writes the table."""
    args = arguments(
        __doc__,
        peer="",
        models="tinystories,py4m",
        draws=1,
        tokens=600,
        runs=3,
        workdir="quantization_time.partial",
    )
    work = Path(args.workdir)
    work.mkdir(parents=True, exist_ok=True)
    kept = Kept(work / "figures.json")
    clock = Table("Seconds", SECONDS)
    six = random_llama(work)
    sources = {"6 layers, d 512": (six, f"{six}/tokens-0.npy")}
    for name, given in models(args.models).items():
        compared = Comparison(name, *given, kept, args)
        sources[name] = (compared.source, compared.tokens_file(0))
    for name, given in sources.items():
        for sequential in ("block", "matrix"):
            timed = Timed(f"SEQUENTIAL = {sequential!r}" + OURS, COMPRESSOR, kept, args, clock)
            timed(f"{name}, {sequential}", *given, HOW)
    write(args.out, "quantization_time", __doc__, [clock])


if __name__ == "__main__":
    main()
