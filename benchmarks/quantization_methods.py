"""Every way to find the numbers x {8, 4, 3, 2} bits, and every number format of 4 bits.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/quantization_methods.py [--models tinystories,py4m] \\
        [--bits 8,4,3,2] [--group 128] [--methods rtn,hqq,...]

The methods with their defaults; groups of `--group` where a method has groups, symmetric integers;
embeddings and heads stay as they are. Calibration: 32 x 512 tokens of the training text, one draw;
perplexity and KL to the dense model in nats per token on the first 60,000 held-out tokens, in
float32. Bits are those of the compressed matrices, scales, tables and factors counted. Seconds are
of one run with compilation, and tell orders of magnitude. What is done is kept in `--workdir`; a
second run goes on from there.
"""

import time
from pathlib import Path

from peers import Kept, models
from quantization_peers import Rounding
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.methods import method_named

WITHOUT_DATA = ("rtn", "hqq", "kmeans")
CALIBRATED = (
    "clip", "awq", "quarot", "spinquant", "squeezellm", "gptq", "gptaq", "eora", "svdquant",
    "autoround", "coordinate", "mixed+gptq", "quarot+coordinate+tune", "auto",
)  # fmt: skip
FORMATS = ("int4", "nf4", "fp4", "mxfp4", "nvfp4", "mxfp6", "mxfp8", "fp8")
ROUNDINGS = ("rtn", "gptq", "coordinate")  # of the formats


class Measured(Rounding):
    """One model, compressed in every way."""

    def figures(self, method, **asked):
        """Quality, bits and seconds; of `asked`, what the method knows."""
        name = "coordinate+tune" if method == "auto" else method
        known = method_named(name).options
        options = {option: value for option, value in asked.items() if option in known}
        if method.startswith("mixed"):  # 32 bits of scale for each group, as the uniform format
            options["average_bits"] = options.pop("bits") + 32 / asked["group_size"]

        def compute():
            start = time.perf_counter()
            given = {} if method in WITHOUT_DATA else {"calibration": self.tokens[0]}
            small = jc.compress(self.model, method, **given, **options)
            return {"seconds": time.perf_counter() - start, **self.measured(small)}

        said = [f"{option}={value}" for option, value in sorted(options.items())]
        return self.kept(" ".join([method, *said]), compute)


def main():
    """Computes what is missing; prints and writes the tables."""
    args = arguments(
        __doc__,
        models="tinystories",
        bits="8,4,3,2",
        group=128,
        methods=",".join(WITHOUT_DATA + CALIBRATED),
        formats=",".join(FORMATS),
        draws=1,
        tokens=60000,
        workdir="quantization_methods.partial",
    )
    work = Path(args.workdir)
    work.mkdir(parents=True, exist_ok=True)
    written = []
    for name, given in models(args.models).items():
        measured = Measured(name, *given, Kept(work / f"{name}.json"), args)
        written += tables(measured, args)
    write(args.out, "quantization_methods", __doc__, written)


def tables(measured, args):
    """Perplexity, KL, bits and seconds of methods x bits; perplexity and KL of the formats."""
    dense = measured.kept("dense", lambda: measured.quality(measured.model)["perplexity"])
    bits = [int(count) for count in args.bits.split(",")]
    where = f"{measured.name}, dense {dense:.3f}"
    columns = ["method", *(f"{count} bits" for count in bits)]
    perplexity = Table(f"Perplexity: {where}", columns)
    divergence = Table(f"KL to the dense model: {measured.name}", columns)
    stored = Table(
        f"Bits per weight, and seconds at {bits[0]} bits: {measured.name}", [*columns, "s"]
    )
    for method in filter(None, args.methods.split(",")):
        found = [measured.figures(method, bits=count, group_size=args.group) for count in bits]
        perplexity.add(method, *(f"{one['perplexity']:.3f}" for one in found))
        divergence.add(method, *(f"{one['kl']:.5f}" for one in found))
        sizes = (f"{one['bits']:.2f}" for one in found)
        stored.add(method, *sizes, f"{found[0]['seconds']:.0f}")
    kinds = [f"{method} {what}" for method in ROUNDINGS for what in ("perplexity", "KL")]
    formats = Table(f"Formats: {where}", ["dtype", "bits", *kinds])
    for dtype in filter(None, args.formats.split(",")):
        found = [measured.figures(method, dtype=dtype) for method in ROUNDINGS]
        cells = [(f"{one['perplexity']:.3f}", f"{one['kl']:.5f}") for one in found]
        formats.add(dtype, f"{found[0]['bits']:.2f}", *(cell for pair in cells for cell in pair))
    return [perplexity, divergence, stored, formats]


if __name__ == "__main__":
    main()
