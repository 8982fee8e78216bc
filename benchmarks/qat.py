"""Training under quantization: QAT against PTQ, QLoRA, and INT8 of a ResNet-20.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/qat.py --steps 150 [--parts language,images]

`tinystories-656k` at 3 and 2 bits in groups of 64: rounded; its steps trained; QAT, alone and
against the whole model as the teacher; low rank factors trained beside frozen codes, begun as
nothing and at the quantization error. All rows see the same batches, and the whole model is trained
on them too, so that what quantization costs is not hidden by what more training gives. ResNet-20 of
CIFAR-10: batch norms folded, INT8 weights per channel and static INT8 activations.
"""

import math
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.data.batches import Batches
from jaxcompress.data.images import image_dataset, normalize, read_images
from jaxcompress.data.language import text_dataset
from jaxcompress.distillation import distill
from jaxcompress.evaluation.images import accuracy
from jaxcompress.quantization.activations import activations
from jaxcompress.quantization.batch_norm import fold_batch_norm
from jaxcompress.quantization.lora import add_lora, merge_lora
from jaxcompress.quantization.qat import convert, prepare_qat
from jaxcompress.training.mesh import make_mesh
from jaxcompress.training.objective import next_token
from jaxcompress.training.settings import Training, train

ASSETS = Path(os.environ.get("JAXCOMPRESS_ASSETS", "assets"))
CTX, BATCH, RANK, GROUP = 256, 16, 8, 64
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
    dense = job.perplexity(job.dense)
    table.add("", "whole model", "", f"{dense:.4f}", "", "")
    tuned = job.perplexity(job.trained(job.dense))
    table.add(
        "", "whole model, trained too", "", f"{tuned:.4f}", f"{math.log(tuned / dense):.4f}", ""
    )
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


def images(args):
    """The table of the convolutional network."""
    model = jc.load(ASSETS / "cifar-resnet20" / "resnet20-12fca82f.th", arch="resnet20")
    pixels, labels = read_images(ASSETS / "cifar10" / "test.parquet", args.images)
    rows = image_dataset(str(ASSETS / "cifar10" / "train.parquet"))
    calibration = normalize(rows[np.arange(256)]["images"])
    folded = fold_batch_norm(model)
    axes = jc.contractions(model.apply)(model.params, calibration[:1])
    paths = [path for path in axes if path.endswith("kernel")]

    def rounded(model, bits=8):
        return jc.compress(model, "rtn", bits=bits, granularity="channel", include=paths, axes=axes)

    def w8a8(model, **options):
        return activations(rounded(model), paths, calibration=calibration, **options)

    static = {"activation_scaling": "static"}
    table = Table(f"ResNet-20, {len(labels)} test images", ["", "accuracy"])
    for name, made in (
        ("float32", model),
        ("batch norms folded", folded),
        ("folded, INT8 weights per channel", rounded(folded)),
        ("folded, INT8 weights, INT8 activations, static min-max", w8a8(folded, **static)),
        ("the same, static MSE", w8a8(folded, activation_range="mse", **static)),
        ("the same, static entropy", w8a8(folded, activation_range="entropy", **static)),
        ("the same, dynamic per image", w8a8(folded)),
        ("not folded, INT8 weights, static min-max", w8a8(model, **static)),
    ):
        table.add(name, f"{accuracy(made, pixels, labels)['accuracy']:.4f}")
    return table


def main():
    """Prints and writes the tables."""
    args = arguments(__doc__, steps=150, tokens=65536, images=10000, parts="language,images")
    chosen = {"language": language, "images": images}
    tables = [chosen[part](args) for part in args.parts.split(",")]
    notes = [
        f"A step is {BATCH} x {CTX} tokens; AdamW, rates {RATES}, cosine. Won back: of the "
        "log-perplexity that `rtn` loses at so many bits; above 100 % where training gives more "
        "than rounding takes."
    ]
    write(args.out, "qat", __doc__, tables, notes)


if __name__ == "__main__":
    main()
