"""Training under quantization: QAT against PTQ, and low rank factors beside frozen codes.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/qat.py [--models tinystories,py4m] [--bits 3,2]
        [--steps 60] [--tokens 16384]

In groups of 64: rounded; its steps trained; QAT, alone and against the whole model as the teacher;
low rank factors trained beside frozen codes, begun as nothing and at the quantization error. The
published `tinystories-656k` is trained on the text first, so that what is won back is not what it
learns of the text; then all rows see the same batches, the whole model too. What is done is kept in
`--workdir`, and a second call goes on from there.
"""

import math
import tempfile
from functools import cache
from pathlib import Path

import jax
from peers import Kept, models
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.data.batches import Batches
from jaxcompress.data.language import text_dataset
from jaxcompress.data.text import token_ids
from jaxcompress.distillation import distill
from jaxcompress.quantization.lora import add_lora, merge_lora
from jaxcompress.quantization.qat import convert, prepare_qat
from jaxcompress.training.mesh import make_mesh
from jaxcompress.training.objective import next_token
from jaxcompress.training.settings import Training, train

CTX, BATCH, RANK, GROUP = 256, 8, 4, 64
RATES = {"all": 5e-4, "scales": 2e-3, "factors": 2e-3}


class Language:
    """A language model, text to train on and text to measure on."""

    def __init__(self, name, args):
        path, text, heldout = models(name)[name]
        self.dense = jc.load(path, dtype="float32")
        self.rows = text_dataset(token_ids(text, self.dense.tokenizer), ctx=CTX)
        self.heldout = token_ids(heldout, self.dense.tokenizer)[: args.tokens]
        self.steps = args.steps
        self.folder = args.workdir / f"{name}-{args.steps}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.kept = Kept(self.folder / f"{args.tokens}.json")

    def measured(self, name, make):
        """Perplexity of held-out text and bits per weight of a model, which `make` makes."""

        def measure():
            model = make()
            found = jc.evaluate(model, text=self.heldout, ctx=CTX)
            return [found["perplexity"], bits_per_weight(model)]

        return self.kept(name, measure)

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

    def train_dense(self):
        """The whole model trained on the text, once."""
        folder = self.folder / "dense"
        if not folder.exists():
            jc.save(self.trained(self.dense), folder, "dense")
        self.dense = jc.load(folder, dtype="float32")

    def rows_of(self, bits):
        """Names, and what makes the models, one after the other."""
        dense, options = self.dense, {"bits": bits, "group_size": GROUP, "symmetric": False}
        small = jc.compress(dense, "rtn", **options)
        found = jc.compress(dense, "rtn", range="mse", **options)
        ready, begun = prepare_qat(found, dense), add_lora(found, dense, rank=RANK)
        factors = cache(lambda: self.trained(begun, "factors"))
        yield "rounded (`rtn`)", lambda: small
        yield 'rounded, `range="mse"`', lambda: found
        yield "its scales trained", lambda: self.trained(found, "scales")
        yield "QAT", lambda: convert(self.trained(ready))
        yield "QAT against the teacher", lambda: convert(self.trained(ready, teacher=dense))
        yield f"QLoRA, rank {RANK}", lambda: self.trained(add_lora(found, rank=RANK), "factors")
        yield f"error as rank {RANK} (LoftQ), not trained", lambda: begun
        yield f"LoftQ, rank {RANK}, trained", factors
        yield (
            "the same, `merge_lora(requantize=True)`",
            lambda: merge_lora(factors(), requantize=True),
        )
        yield (
            'the same, merged and rounded, `range="mse"`',
            lambda: jc.compress(merge_lora(factors()), "rtn", range="mse", **options),
        )


def table_of(name, args):
    """The table of a language model."""
    job = Language(name, args)
    columns = ["bits", "", "bits per weight", "perplexity", "log-perplexity lost", "won back"]
    table = Table(f"{name}, groups of {GROUP}, {args.steps} steps", columns)
    dense, _ = job.measured("as published", lambda: job.dense)
    if name == "tinystories":
        table.add("", "as published", "", f"{dense:.4f}", "", "")
        job.train_dense()
        dense, _ = job.measured("trained", lambda: job.dense)
        table.add("", "trained on this text: the whole model", "", f"{dense:.4f}", "0", "")
    else:
        table.add("", "the whole model", "", f"{dense:.4f}", "0", "")
    more, _ = job.measured("trained again", lambda: job.trained(job.dense))
    loss = f"{math.log(more / dense):.4f}"
    table.add("", "the whole model trained once more", "", f"{more:.4f}", loss, "")
    for bits in map(int, args.bits.split(",")):
        lost = None
        for row, make in job.rows_of(bits):
            now, size = job.measured(f"{bits} bits, {row}", make)
            loss = math.log(now / dense)
            lost = loss if lost is None else lost
            won = f"{1 - loss / lost:.0%}"
            table.add(bits, row, f"{size:.2f}", f"{now:.4f}", f"{loss:.4f}", won)
    return table


def bits_per_weight(model):
    """Of the compressed matrices: codes, scales, zeros, factors."""
    leaves = jax.tree.leaves(model.params, is_leaf=jc.is_compressed)
    small = [x for x in leaves if jc.is_compressed(x)]
    return 8 * sum(x.nbytes for x in small) / max(sum(x.size for x in small), 1)


def main():
    """Prints and writes the tables."""
    args = arguments(
        __doc__, models="tinystories", bits="3,2", steps=60, tokens=16384, workdir=Path("qat-work")
    )
    tables = [table_of(name, args) for name in args.models.split(",")]
    notes = [
        f"A step is {BATCH} x {CTX} tokens; AdamW, rates {RATES}, cosine. Won back: of the "
        "log-perplexity that `rtn` loses at so many bits; above 100 % where training gives more "
        'than rounding takes. Training starts from what is rounded with `range="mse"`.'
    ]
    write(args.out, "qat", __doc__, tables, notes)


if __name__ == "__main__":
    main()
