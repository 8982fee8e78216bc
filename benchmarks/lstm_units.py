"""An LSTM language model: its dense layer by threshold, its units cut, both fine-tuned.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/lstm_units.py [--work FOLDER]

Trains a small LSTM on TinyStories text by a recipe; then every row is a cut of it, fine-tuned. All
of them are fine-tuned alike, the whole network too, so that what a cut costs is not hidden by what
more training gives. What is done stays in the working folder, and a second call goes on there.
"""

import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.core.flops import flops
from jaxcompress.data.batches import Batches
from jaxcompress.data.language import text_dataset
from jaxcompress.data.text import calibration_batch, token_ids
from jaxcompress.training import fit, make_optimizer, next_token

DENSE = {"model_type": "lstm", "embedding_dim": 128, "hidden_size": 128, "num_hidden_layers": 2}
VOCABULARY, CTX, BATCH, TOKENS, SLICES = 1024, 64, 32, 8192, 4
DEVIATIONS = (0.5, 1.0, 1.5)
SPARSITIES = (0.1, 0.3, 0.5, 0.7)
SCORES = {
    "magnitude": {"score": "magnitude", "reduce": "l2"},
    "gate, refit": {"score": "gate", "compensate": "refit"},
}


def rows():
    """`(curve, what, method, options)` of every row."""
    yield "none", "none", None, {}
    for r in DEVIATIONS:
        options = {"deviations": r, "include": "head/kernel", "store": "masked"}
        yield "threshold on the dense layer", f"below {r} std", "threshold", options
    for label, options in SCORES.items():
        for sparsity in SPARSITIES:
            what = f"{sparsity:.0%} of the units"
            yield f"units, {label}", what, "units", {"sparsity": sparsity, **options}


def trained(folder, text, steps):
    """The dense model: a recipe, which goes on where it stopped."""
    config = {
        "name": "an LSTM on TinyStories",
        "model": {
            "architecture": {**DENSE, "vocab_size": VOCABULARY},
            "tokenizer": f"train:{VOCABULARY}",
        },
        "data": {**text, "ctx": CTX, "tokens": TOKENS // 4},
        "stages": (
            {
                "method": "finetune",
                "steps": steps,
                "batch_size": BATCH,
                "learning_rate": 4e-3,
                "warmup": 20,
            },
            {"method": "export", "path": "model"},
        ),
    }
    jc.run(config, folder)
    return jc.load(folder / "model")


class Data:
    """Windows to train and to calibrate on, and tokens to measure on."""

    def __init__(self, text, tokenizer):
        self.train = text_dataset(text["train"], tokenizer, CTX)
        self.measured = {
            role: token_ids(path, tokenizer)[:TOKENS].reshape(SLICES, -1)
            for role, path in text.items()
        }
        self.calibration = calibration_batch(text["train"], tokenizer, samples=64, ctx=CTX)

    def perplexity(self, model, role):
        """Of the slices, and of all together."""
        found = [jc.evaluate(model, text=ids, ctx=CTX)["perplexity"] for ids in self.measured[role]]
        return found, float(np.exp(np.log(found).mean()))


def row(dense, method, options, data, folder, steps):
    """One cut, measured, fine-tuned, and measured again."""
    small = dense
    if method is not None:
        needs = {"calibration": data.calibration} if options.get("score") == "gate" else {}
        small = jc.compress(dense, method, **options, **needs)
    cut = data.perplexity(small, "heldout")[1]
    optimizer = make_optimizer(steps=steps, learning_rate=1e-3, warmup=5)
    batches = Batches(data.train, BATCH, seed=1)
    small = fit(small, next_token(small), batches, optimizer, steps=steps, workdir=folder)
    small = small.replace(params=jc.densify(small.params))
    slices, tuned = data.perplexity(small, "heldout")
    kept = {
        path: int(np.count_nonzero(leaf)) / leaf.size
        for path, leaf in {"head/kernel": np.asarray(small.params["head"]["kernel"])}.items()
    }
    ids = jax.ShapeDtypeStruct((1, CTX), np.int32)
    leaves = jax.tree.leaves(small.params)
    return {
        "parameters": sum(leaf.size for leaf in leaves),
        "not zero": sum(int(np.count_nonzero(leaf)) for leaf in leaves),
        "flops": flops(small.apply, small.params, ids, shares=kept).nonzero / CTX,
        "cut": cut,
        "tuned": tuned,
        "spread": float(np.std(slices)),
        "train": data.perplexity(small, "train")[1],
    }


def draw(curves, dense, path):
    """Perplexity over the parameters that are not zero, a line for each curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for label, points in curves.items():
        sizes, cut, tuned = zip(*points)
        color = axis.plot(sizes, tuned, marker="o", label=label)[0].get_color()
        axis.plot(sizes, cut, linestyle=":", marker=".", color=color)
    axis.axhline(dense, color="0.6", linewidth=1)
    axis.set(xlabel="parameters that are not zero", ylabel="perplexity (held out)", yscale="log")
    axis.set_title("LSTM: dotted as cut, solid fine-tuned", fontsize="medium")
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    """Prints and writes the table and the figure, again after each row."""
    args = arguments(
        __doc__, steps=600, tune=20, work="", assets=os.environ.get("JAXCOMPRESS_ASSETS", ".")
    )
    work = Path(args.work or Path(tempfile.gettempdir()) / f"lstm_units-{args.steps}-{args.tune}")
    folder = Path(args.assets) / "text"
    text = {
        "train": str(folder / "tinystories-train-head.txt"),
        "heldout": str(folder / "tinystories-valid.txt"),
    }
    dense = trained(work / "dense", text, args.steps)
    data = Data(text, dense.tokenizer)
    columns = ["cut", "of", "parameters", "not zero", "kFLOPs a token", "perplexity, cut",
               "fine-tuned", "spread", "train text"]  # fmt: skip
    table = Table("An LSTM of two layers of 128 units", columns)
    args.out.mkdir(parents=True, exist_ok=True)
    curves, whole = {}, None
    for number, (curve, what, method, options) in enumerate(rows()):
        kept = work / f"{number:02d}.json"
        if not kept.is_file():
            found = row(dense, method, options, data, work / f"{number:02d}", args.tune)
            kept.write_text(json.dumps(found))
        found = json.loads(kept.read_text())
        table.add(
            what, curve, f"{found['parameters']:,}", f"{found['not zero']:,}",
            f"{found['flops'] / 1e3:.0f}", f"{found['cut']:.3f}", f"{found['tuned']:.3f}",
            f"{found['spread']:.3f}", f"{found['train']:.3f}",
        )  # fmt: skip
        if method is None:
            whole = found["tuned"]
            continue
        curves.setdefault(curve, []).append((found["not zero"], found["cut"], found["tuned"]))
        draw(curves, whole, args.out / "lstm_units.png")
        notes = [
            f"Trained here for {args.steps} steps of {BATCH} x {CTX} tokens of TinyStories with a "
            f"vocabulary of {VOCABULARY}; every row, the first too, then tuned for {args.tune} "
            f"steps of as many; zeros stay zeros. Perplexity on {TOKENS:,} tokens of the "
            f"validation text; spread: standard deviation over {SLICES} parts of it. FLOPs: "
            "without those of zeros. Gate, refit: the units of the least |dL/dg| go, and what "
            "reads the others is fitted anew by least squares. Below r std: of the weights of the "
            "dense layer."
        ]
        write(args.out, "lstm_units", __doc__, [table], notes)


if __name__ == "__main__":
    main()
