"""AutoRound against the auto-round package: quality on the same tokens.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/autoround_peer.py --peer VENV/bin/python \\
        [--models tinystories] [--draws 5] [--formats 4:64:1,3:64:1]

The peer runs in an environment of its own (`pip install auto-round torch`), with its defaults (200
steps of 8 samples), in float32; without `--peer` its column stays empty. Both sides are given the
same checkpoint and the same calibration tokens (`--draws` draws of 32 x 512 from the training
text); all results are measured here on the same held-out tokens. Formats are bits:group:symmetric.
Won back: the share of what rounding to nearest loses in log perplexity. What is done is kept in
`--workdir`, and a second run of this script goes on from there.
"""

import math
import shutil
import statistics
from pathlib import Path

from pruning_peers import Comparison, Kept, models, of, peer
from tables import Table, arguments, write

import jaxcompress as jc

PEER = """
import sys
import numpy, torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
path, tokens, out, bits, group, symmetric = sys.argv[1].split("|")
ids = torch.from_numpy(numpy.load(tokens)).long()
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
rounding = AutoRound(model, AutoTokenizer.from_pretrained(path), bits=int(bits),
                     group_size=int(group), sym=symmetric == "1", iters=200, nsamples=len(ids),
                     seqlen=ids.shape[1], batch_size=8, dataset=[row[None] for row in ids],
                     amp=False, device_map="cpu", enable_torch_compile=False)
rounding.quantize_and_save(out, format="fake")
"""


class Rounding(Comparison):
    """One model rounded by both sides."""

    def options(self, spec):
        """Of our methods."""
        bits, group, symmetric = map(int, spec.split(":"))
        return {"bits": bits, "group_size": group, "symmetric": bool(symmetric)}

    def rounded(self, method, spec, draw):
        """Perplexity behind one of our methods."""

        def compute():
            given = {"calibration": self.tokens[draw], **self.options(spec)}
            return self.perplexity(jc.compress(self.model, method, **given))

        return self.kept(f"{self.name} {spec} {draw} {method}", compute)

    def theirs(self, spec, draw):
        """Perplexity behind the package."""

        def compute():
            out = self.folder / "theirs"
            shutil.rmtree(out, ignore_errors=True)
            job = (self.source, self.folder / f"tokens-{draw}.npy", out, *spec.split(":"))
            peer(self.args.peer, PEER, "|".join(map(str, job)))
            return self.perplexity(jc.load(next(out.rglob("config.json")).parent))

        return self.kept(f"{self.name} {spec} {draw} theirs", compute)

    def row(self, spec):
        """The table's row."""
        dense = self.kept(f"{self.name} dense", lambda: self.perplexity(self.model))
        plain = self.rounded("rtn", spec, 0)
        draws = range(self.args.draws)
        sides = [[self.rounded("autoround", spec, draw) for draw in draws]]
        if self.args.peer:
            sides.append([self.theirs(spec, draw) for draw in draws])
        lost = math.log(plain / dense)
        back = [1 - math.log(statistics.mean(side) / dense) / lost for side in sides]
        cells = [cell for side, share in zip(sides, back) for cell in (of(side), f"{share:.1%}")]
        bits, group, symmetric = spec.split(":")
        kind = "symmetric" if symmetric == "1" else "asymmetric"
        name = f"W{bits} g{group} {kind}"
        return [self.name, name, f"{dense:.3f}", f"{plain:.3f}", *cells, *[""] * (4 - len(cells))]


def main():
    """Prints and writes the table."""
    args = arguments(
        __doc__,
        peer="",
        models="tinystories",
        formats="4:64:1,3:64:1",
        draws=5,
        tokens=60000,
        workdir="autoround_peer.partial",
    )
    work = Path(args.workdir)
    work.mkdir(parents=True, exist_ok=True)
    kept = Kept(work / "figures.json")
    columns = ["model", "format", "dense", "rtn", "ours", "won back", "theirs", "won back"]
    table = Table("Perplexity", columns)
    for name, (path, calibration, heldout) in models(args.models).items():
        compared = Rounding(name, path, calibration, heldout, kept, args)
        for spec in args.formats.split(","):
            table.add(*compared.row(spec))
    write(args.out, "autoround_peer", __doc__, [table])


if __name__ == "__main__":
    main()
