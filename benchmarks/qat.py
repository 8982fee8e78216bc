"""Training under quantization: QAT against PTQ, and low rank factors beside frozen codes.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/qat.py [--steps 80] [--tokens 32768]

`tinystories-656k` at 3 and 2 bits in groups of 64: rounded; its steps trained; QAT, alone and
against the whole model as the teacher; low rank factors trained beside frozen codes, begun as
nothing and at the quantization error. The published model is trained on the text first, so that
what is won back is not what it learns of the text; then all rows see the same batches, the whole
model too.
"""

import math
import os
import tempfile
from pathlib import Path

import jax
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.data.batches import Batches
from jaxcompress.data.language import text_dataset
from jaxcompress.distillation import distill
from jaxcompress.quantization.lora import add_lora, merge_lora
from jaxcompress.quantization.qat import convert, prepare_qat
from jaxcompress.training.mesh import make_mesh
from jaxcompress.training.objective import next_token
from jaxcompress.training.settings import Training, train

ASSETS = Path(os.environ.get("JAXCOMPRESS_ASSETS", "assets"))
CTX, BATCH, RANK, GROUP = 256, 8, 4, 64
RATES = {"all": 5e-4, "scales": 2e-3, "factors": 2e-3}


class Language:
    """A language model, text to train on and text to measure on."""

    def __init__(self, steps, tokens):
        self.dense = jc.load(ASSETS / "tinystories-656k", dtype="float32")
        text = ASSETS / "text"
        self.rows = text_dataset(
            str(text / "tinystories-train-head.txt"), self.dense.tokenizer, CTX
        )
        self.heldout = text / "tinystories-valid.txt"
        self.steps, self.tokens = steps, tokens

    def perplexity(self, model):
        """Of held-out text."""
        return jc.evaluate(model, text=self.heldout, ctx=CTX, tokens=self.tokens)["perplexity"]

    def trained(self, model, what="all", teacher=None):
        """On the same batches each time."""
        settings = Training(
            steps=self.steps, batch_size=BATCH, learning_rate=RATES[what], train=what,
            warmup=self.steps // 10,
        )  # fmt: skip
        objective = next_token(model) if teacher is None else distill(model, teacher, alpha=1.0)
        with tempfile.TemporaryDirectory() as folder:
            return train(
                model, objective, Batches(self.rows, BATCH, seed=1), settings,
                workdir=Path(folder), mesh=make_mesh(),
            )  # fmt: skip

    def rows_of(self, bits):
        """Names and models, one after the other."""
        dense = self.dense
        small = jc.compress(dense, "rtn", bits=bits, group_size=GROUP, symmetric=False)
        yield "rounded (`rtn`)", small
        found = jc.compress(dense, "rtn", bits=bits, group_size=GROUP, symmetric=False, range="mse")
        yield 'rounded, `range="mse"`', found
        yield "scales trained", self.trained(small, "scales")
        ready = prepare_qat(found, dense)
        yield "QAT", convert(self.trained(ready))
        yield "QAT against the teacher", convert(self.trained(ready, teacher=dense))
        made = self.trained(add_lora(small, rank=RANK), "factors")
        yield f"QLoRA, rank {RANK}", made
        begun = add_lora(small, dense, rank=RANK)
        yield f"error as rank {RANK} (LoftQ), not trained", begun
        made = self.trained(begun, "factors")
        yield f"LoftQ, rank {RANK}, trained", made
        yield "the same, merged and rounded again", merge_lora(made, requantize=True)


def language(args):
    """The table of the language model."""
    job = Language(args.steps, args.tokens)
    columns = ["bits", "", "bits per weight", "perplexity", "log-perplexity lost", "won back"]
    table = Table(f"tinystories-656k, groups of {GROUP}, {args.steps} steps", columns)
    table.add("", "as published", "", f"{job.perplexity(job.dense):.4f}", "", "")
    job.dense = job.trained(job.dense)
    dense = job.perplexity(job.dense)
    table.add("", "trained on this text: the whole model", "", f"{dense:.4f}", "0", "")
    more = job.perplexity(job.trained(job.dense))
    loss = f"{math.log(more / dense):.4f}"
    table.add("", "the whole model trained again", "", f"{more:.4f}", loss, "")
    for bits in (3, 2):
        lost = None
        for name, model in job.rows_of(bits):
            now = job.perplexity(model)
            loss = math.log(now / dense)
            lost = loss if lost is None else lost
            table.add(
                bits, name, f"{bits_per_weight(model):.2f}", f"{now:.4f}", f"{loss:.4f}",
                f"{1 - loss / lost:.0%}",
            )  # fmt: skip
    return table


def bits_per_weight(model):
    """Of the compressed matrices: codes, scales, zeros, factors."""
    leaves = jax.tree.leaves(model.params, is_leaf=jc.is_compressed)
    small = [x for x in leaves if jc.is_compressed(x)]
    return 8 * sum(x.nbytes for x in small) / sum(x.size for x in small)


def main():
    """Prints and writes the tables."""
    args = arguments(__doc__, steps=80, tokens=32768)
    table = language(args)
    notes = [
        f"A step is {BATCH} x {CTX} tokens; AdamW, rates {RATES}, cosine. Won back: of the "
        "log-perplexity that `rtn` loses at so many bits; above 100 % where training gives more "
        "than rounding takes."
    ]
    write(args.out, "qat", __doc__, [table], notes)


if __name__ == "__main__":
    main()
