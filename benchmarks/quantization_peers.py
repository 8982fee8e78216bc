"""GPTQ, AWQ, AutoRound and our best against llm-compressor and auto-round: quality on equal tokens.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/quantization_peers.py --peer VENV/bin/python \\
        [--models tinystories,py4m] [--formats 4:128,3:128,4:-1,4:64,3:64] [--draws 5] \\
        [--methods rtn,gptq,auto,awq,autoround]

The peers run in an environment of their own (`pip install llmcompressor auto-round torch`), with
their defaults: GPTQ with static groups and activation order, AWQ with its scales and rounding to
nearest, AutoRound with 200 steps of 8 samples; without `--peer` their columns stay empty. Our
"auto" is `coordinate+tune`, and "auto, text" the same with `next_token=0.03`. Both sides are given
the same checkpoint in float32 and the same calibration tokens (`--draws` draws of 32 x 512 from the
training text); formats are bits:group, symmetric integers, -1: a scale per row; embeddings stay as
they are. All results are measured here on the same held-out tokens, in float32.

Won back: 1 - ln(found / dense) / ln(rtn / dense), of perplexity. Bits are those of the compressed
matrices, scales counted. After +- stands the standard error over the draws, in brackets the number
of draws where it is not `--draws`; one draw has no error. What is done is kept in `--workdir`, and
a second run of this script goes on from there; the tables show all that is known, `--methods` says
what is computed.
"""

import itertools
import math
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from peers import Comparison, Kept, models, of, peer
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.core.arrays.base import dense
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.core.readers.lift import lift
from jaxcompress.evaluation.footprint import footprint
from jaxcompress.models import linear_paths

COMPRESSOR = """
import sys
import datasets, numpy, torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
if not torch.accelerator.is_available():  # without one AWQ fails in pinning memory for it
    IntermediatesCache.pin_memory = lambda self, index: None
for job in sys.argv[1:]:
    model, tokens, out, method, bits, group = job.split("|")
    ids = numpy.load(tokens)
    rows = {"input_ids": ids.tolist(), "attention_mask": numpy.ones_like(ids).tolist()}
    weights = {"num_bits": int(bits), "type": "int", "symmetric": True, "strategy": "channel"}
    if int(group) > 0:
        weights |= {"strategy": "group", "group_size": int(group)}
    groups = {"group_0": {"targets": ["re:.*_proj$"], "weights": weights}}
    if method == "gptq":
        recipe = [GPTQModifier(config_groups=groups)]
    else:
        recipe = [AWQModifier(), QuantizationModifier(config_groups=groups)]
    oneshot(model=model, dataset=datasets.Dataset.from_dict(rows), recipe=recipe, output_dir=out,
            max_seq_length=ids.shape[1], num_calibration_samples=len(ids), precision="float32",
            shuffle_calibration_samples=False)
"""
AUTOROUND = """
import sys
import numpy, torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
for job in sys.argv[1:]:
    path, tokens, out, _, bits, group = job.split("|")
    ids = torch.from_numpy(numpy.load(tokens)).long()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rounding = AutoRound(model, AutoTokenizer.from_pretrained(path), bits=int(bits),
                         group_size=int(group), sym=True, iters=200, nsamples=len(ids),
                         seqlen=ids.shape[1], batch_size=8, dataset=[row[None] for row in ids],
                         amp=False, device_map="cpu", enable_torch_compile=False)
    rounding.quantize_and_save(out, format="fake")
"""
THEIRS = {"gptq": COMPRESSOR, "awq": COMPRESSOR, "autoround": AUTOROUND}
CTX = 512  # tokens in a window
BATCH = 13  # windows at a time
TUNED = {"auto": 0.0, "auto, text": 0.03}  # share of the text's own next tokens in the loss
METHODS = [
    *[(side, method) for method in THEIRS for side in ("ours", "theirs")],
    *[("ours", name) for name in TUNED],
]


class Rounding(Comparison):
    """One model rounded by both sides."""

    def __init__(self, *given):
        super().__init__(*given, dtype="float32")
        windows = self.heldout[: len(self.heldout) // CTX * CTX].reshape(-1, CTX)
        self.batches = [windows[at : at + BATCH] for at in range(0, len(windows), BATCH)]
        self.wanted = []

    def quality(self, model):
        """Perplexity, and KL to the dense model, whose predictions are computed once."""
        if not self.wanted:
            start = self.model
            self.wanted = [_predict(start.apply, start.params, ids) for ids in self.batches]
        params = map_with_paths(lambda path, leaf: dense(leaf), model.params)  # one program for all
        found = [
            _sums(_predict(model.apply, params, ids), wanted, ids[:, 1:])
            for ids, wanted in zip(self.batches, self.wanted)
        ]
        count = sum(ids[:, 1:].size for ids in self.batches)
        loss, divergence = np.sum(np.asarray(found, np.float64), axis=0) / count
        return {"perplexity": math.exp(loss), "kl": float(divergence)}

    def measured(self, model):
        """What is kept of a model: quality, and bits per weight of its matrices."""
        leaves = dict(leaves_with_paths(model.params))
        bits = footprint({path: leaves[path] for path in linear_paths(model)})["bits_per_weight"]
        return {**self.quality(model), "bits": bits}

    def key(self, side, method, spec, draw):
        """The name of a figure."""
        return f"{spec} {draw} {side} {method}"

    def ours(self, method, spec, draw):
        """Rounded by one of our methods."""
        bits, group = map(int, spec.split(":"))

        def compute():
            given = {} if method == "rtn" else {"calibration": self.tokens[draw]}
            small = jc.compress(self.model, method, bits=bits, group_size=group, **given)
            return self.measured(small)

        self.kept(self.key("ours", method, spec, draw), compute)

    def tuned(self, spec, draw):
        """Both of `TUNED`, from one `coordinate`, which is what "auto" begins with."""
        keys = {name: self.key("ours", name, spec, draw) for name in TUNED}
        if set(keys.values()) <= set(self.kept.known):
            return
        bits, group = map(int, spec.split(":"))
        given = {"calibration": self.tokens[draw]}
        small = jc.compress(self.model, "coordinate", bits=bits, group_size=group, **given)
        for name, share in TUNED.items():

            def compute(share=share):
                return self.measured(
                    jc.compress(small, "tune", dense=self.model, next_token=share, **given)
                )

            self.kept(keys[name], compute)

    def theirs(self, method, specs):
        """Rounded by the peer, all that is missing in one process."""
        jobs = {}
        for spec, draw in itertools.product(specs, range(self.args.draws)):
            key = self.key("theirs", method, spec, draw)
            if key not in self.kept.known:
                out = self.folder / "theirs" / key.replace(" ", "-")
                shutil.rmtree(out, ignore_errors=True)
                given = (self.source, self.tokens_file(draw), out, method, *spec.split(":"))
                jobs[key] = (out, "|".join(map(str, given)))
        if jobs:
            peer(self.args.peer, THEIRS[method], *(job for _, job in jobs.values()))
        for key, (out, _) in jobs.items():
            small = jc.load(next(out.rglob("config.json")).parent, dtype="float32")
            self.kept(key, lambda small=small: self.measured(small))

    def compute(self, method, specs):
        """Both sides of a column."""
        for spec, draw in itertools.product(specs, range(self.args.draws)):
            if method == "auto":
                self.tuned(spec, draw)
            elif draw == 0 or method != "rtn":
                self.ours(method, spec, draw)
        if self.args.peer and method in THEIRS:
            self.theirs(method, specs)

    def known(self, side, method, spec):
        """draw -> figures, of the draws that are done."""
        keys = {draw: self.key(side, method, spec, draw) for draw in range(self.args.draws)}
        return {draw: self.kept.known[key] for draw, key in keys.items() if key in self.kept.known}


@partial(jax.jit, static_argnums=0)
def _predict(apply, params, ids):
    """Log probabilities of every next token; of the model itself, as rotations untie heads."""
    return jax.nn.log_softmax(lift(apply)(params, ids)[:, :-1])


@jax.jit
def _sums(logp, wanted, targets):
    """[-log p of the targets, KL(dense || found)], summed over the tokens."""
    loss = -jnp.take_along_axis(logp, targets[..., None], axis=-1)
    return jnp.stack([loss.sum(), (jnp.exp(wanted) * (wanted - logp)).sum()])


class Row:
    """A model and a format in the tables."""

    def __init__(self, compared, spec):
        self.compared, self.spec = compared, spec
        self.dense = compared.kept("dense", lambda: compared.quality(compared.model)["perplexity"])
        self.plain = compared.known("ours", "rtn", spec).get(0)
        bits, group = spec.split(":")
        name = "per channel" if group == "-1" else f"g{group}"
        self.name = [compared.name, f"W{bits} {name}"]

    def cell(self, values, form):
        """Mean, standard error and number of the draws."""
        if not values:
            return ""
        short = f" ({len(values)})" if len(values) < self.compared.args.draws else ""
        return (of(values, form) if len(values) > 1 else f"{values[0]:{form}}") + short

    def over_draws(self, figure, form):
        """A cell for each of `METHODS`; `figure` is a function of what is kept."""
        found = [self.compared.known(*column, self.spec).values() for column in METHODS]
        return [self.cell([figure(one) for one in draws], form) for draws in found]

    def won_back(self, found):
        """The share of what rounding to nearest loses."""
        lost = math.log(self.plain["perplexity"] / self.dense)
        return 1 - math.log(found["perplexity"] / self.dense) / lost

    def bits(self, method):
        """Of our matrices."""
        found = self.compared.known("ours", method, self.spec).values()
        return next((f"{one['bits']:.3f}" for one in found), "")

    def differences(self):
        """Ours minus theirs, draw for draw: perplexity and KL of each pair."""
        cells = []
        for method in THEIRS:
            ours, theirs = (self.compared.known(s, method, self.spec) for s in ("ours", "theirs"))
            both = [(ours[draw], theirs[draw]) for draw in ours if draw in theirs]
            for name, form in (("perplexity", "+.3f"), ("kl", "+.5f")):
                cells.append(self.cell([a[name] - b[name] for a, b in both], form))
        return cells


def main():
    """Computes what is missing; prints and writes the tables."""
    args = arguments(
        __doc__,
        peer="",
        models="tinystories,py4m",
        formats="4:128,3:128,4:-1,4:64,3:64",
        methods="rtn,gptq,auto,awq,autoround",
        draws=5,
        tokens=60000,
        workdir="quantization_peers.partial",
    )
    work = Path(args.workdir)
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, given in models(args.models).items():
        compared = Rounding(name, *given, Kept(work / f"{name}.json"), args)
        specs = args.formats.split(",")
        for method in filter(None, args.methods.split(",")):
            compared.compute(method, specs)
        rows += [Row(compared, spec) for spec in specs]
    write(args.out, "quantization_peers", __doc__, tables(rows))


def tables(rows):
    """Perplexity, KL to the dense model, what is won back, and differences."""
    names = [f"their {method}" if side == "theirs" else method for side, method in METHODS]
    pairs = [f"{method} {what}" for method in THEIRS for what in ("perplexity", "KL")]
    perplexity = Table("Perplexity", ["model", "format", "dense", "rtn", *names])
    divergence = Table("KL to the dense model, nats per token", ["model", "format", "rtn", *names])
    back = Table("Won back, and bits per weight", ["model", "format", *names, "bits", "bits auto"])
    differences = Table("Ours minus theirs, draw for draw", ["model", "format", *pairs])
    for row in rows:
        plain = row.plain
        perplexity.add(
            *row.name,
            f"{row.dense:.3f}",
            f"{plain['perplexity']:.3f}" if plain else "",
            *row.over_draws(lambda found: found["perplexity"], ".3f"),
        )
        kl = row.over_draws(lambda found: found["kl"], ".5f")
        divergence.add(*row.name, f"{plain['kl']:.5f}" if plain else "", *kl)
        if plain:
            won = row.over_draws(row.won_back, ".1%")
            back.add(*row.name, *won, row.bits("rtn"), row.bits("auto"))
        differences.add(*row.name, *row.differences())
    return [perplexity, divergence, back, differences]


if __name__ == "__main__":
    main()
