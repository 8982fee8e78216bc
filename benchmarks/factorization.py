"""Low rank, shared values and shared layers: size against quality.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/factorization.py [--models tinystories,py4m]

Every method compresses the linear weights of the model with the same calibration windows; size is
that of these weights (and of the whole model for shared layers), quality the perplexity on held-out
text. Beside the tables a figure, `factorization-MODEL.png`, is drawn for each model. What is
measured stands in `--work`, so that a run that was broken off goes on.
"""

import json
import os
import tempfile
from functools import partial
from pathlib import Path

from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.methods import METHODS
from jaxcompress.models import linear_paths

CTX, TOKENS, SAMPLES = 256, 16_384, 32
SHARED = "Shared layers"
GROUPS = {  # title: [(label, method, options)]
    "Low rank": [
        (f"{method}{' global' if shared else ''}", method, {"ratio": ratio} | shared)
        for method in ("svd", "asvd", "svd_llm")
        for shared in ({}, {"allocate": "global"})
        for ratio in (0.8, 0.6, 0.4)
    ],
    "Integers and low rank": [
        (f"{label} {bits} bits", method, {"bits": bits, "group_size": 32} | more)
        for bits in (4, 3, 2)
        for label, method, more in (
            ("rtn", "rtn", {}),
            ("loftq", "loftq", {"rank": 8}),
            ("qera", "qera", {"rank": 8}),
        )
    ],
    "Shared values": [
        (f"kmeans {unit} {bits} bits", "kmeans", {"bits": bits, "granularity": unit} | more)
        for bits in (4, 3, 2)
        for unit, more in (("tensor", {}), ("channel", {}), ("group", {"group_size": 32}))
    ],
}


def share_of_bytes(small, dense):
    """Bytes of the linear weights, as a share of what they were."""
    held, was = (
        {row["name"]: row["bytes"] for row in jc.inspect(model)["tensors"]}
        for model in (small, dense)
    )
    linear = linear_paths(dense)
    return sum(held[path] for path in linear) / sum(was[path] for path in linear)


def share_of_all(small, dense):
    """Bytes of the whole model, as a share of what they were."""
    small, dense = (jc.inspect(model)["total"]["bytes"] for model in (small, dense))
    return small / dense


def draw(tables, dense, path):
    """Perplexity over size, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tables), figsize=(4.5 * len(tables), 3.6), sharey=True)
    for axis, table in zip(axes, tables):
        lines = {}
        for label, size, perplexity, _ in table.rows:
            words = [w for w in label.split() if not w.isdigit() and w != "bits"]
            lines.setdefault(" ".join(words), []).append((size, perplexity))
        for label, points in lines.items():
            axis.plot(*zip(*points), marker="o", label=label)
        axis.axhline(dense, color="0.6", linewidth=1)
        axis.set(
            title=table.title.split(": ")[1],
            xlabel="size of the weights, share of dense",
            yscale="log",
        )
        axis.legend(fontsize="small")
    axes[0].set_ylabel("perplexity (held out)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def rows_of(model, data):
    """(title, label, options, what makes the compressed model) of every row."""
    for title, rows in GROUPS.items():
        for label, method, options in rows:
            needs = METHODS[method].needs == "calibration"
            more = data if needs else {}
            yield title, label, options, partial(jc.compress, model, method, **more, **options)
    blocks = len(model.blocks.of(model.params))
    for layers in range(blocks - 1, 0, -1):
        label = f"{layers} of {blocks}"
        yield SHARED, label, {}, partial(jc.compress, model, "share", layers=layers, **data)


def main():
    """Prints and writes the tables and the figures."""
    args = arguments(
        __doc__,
        assets=os.environ.get("JAXCOMPRESS_ASSETS", "."),
        models="tinystories,py4m",
        work=str(Path(tempfile.gettempdir()) / "factorization"),
    )
    assets = Path(args.assets)
    known = {
        "tinystories": (
            str(assets / "tinystories-656k"),
            str(assets / "text" / "tinystories-train-head.txt"),
            str(assets / "text" / "tinystories-valid.txt"),
        ),
        "py4m": ("builtin:py4m", "python-stdlib", "python-stdlib:heldout"),
    }
    kept = Path(args.work) / f"rows-{jc.__version__}-{TOKENS}-{SAMPLES}.json"
    done = json.loads(kept.read_text()) if kept.exists() else {}

    def once(key, measure):
        if key not in done:
            done[key] = measure()
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(done))
        return done[key]

    tables, notes = [], []
    for name in args.models.split(","):
        path, calibration, text = known[name]
        model = jc.load(path)
        data = {"calibration": calibration, "calibration_samples": SAMPLES, "ctx": CTX}

        def quality(other, model=model, text=text):
            # A model by itself has no KL, nor the rounding of one.
            against = None if other is model else model
            found = jc.evaluate(other, text=text, ctx=CTX, tokens=TOKENS, against=against)
            return found["perplexity"], found.get("kl")

        def measured(title, make, model=model, quality=quality):
            small = make()
            size = share_of_bytes(small, model) if title != SHARED else share_of_all(small, model)
            return size, *quality(small)

        dense = once(f"{name}/dense", partial(quality, model))[0]
        of_model = {}
        for title, label, options, make in rows_of(model, data):
            if title not in of_model:
                of_model[title] = Table(f"{name}: {title}", ["weights", "size", "perplexity", "KL"])
            key = f"{name}/{title}/{label}/{json.dumps(options)}"
            of_model[title].add(label, *once(key, partial(measured, title, make)))
        args.out.mkdir(parents=True, exist_ok=True)
        draw(list(of_model.values())[:-1], dense, args.out / f"factorization-{name}.png")
        tables += of_model.values()
        notes.append(
            f"{name}: perplexity {dense:.4f} of the dense model on {TOKENS:,} tokens of "
            f"{Path(text).name}; {SAMPLES} x {CTX} tokens of {Path(calibration).name} for "
            "calibration."
        )
    notes.append(
        "KL in nats a token against the dense model. Size: of the compressed matrices, scales and "
        "tables counted, as a share of what they were; of shared layers, of the whole model. "
        "Nothing is trained afterwards."
    )
    write(args.out, "factorization", __doc__, tables, notes)


if __name__ == "__main__":
    main()
