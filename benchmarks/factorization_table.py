"""Low rank, shared values and shared layers: size against quality.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/factorization_table.py [--model builtin:py4m]

Every method compresses the linear weights of the model with the same calibration windows; size is
that of these weights (and of the whole model for shared layers), quality the perplexity on held-out
text. Beside the table a figure, `factorization_table.png`, is drawn.
"""

import os
from pathlib import Path

from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.models import linear_paths

CTX, TOKENS, SAMPLES = 256, 32_768, 64
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
        axis.set(title=table.title, xlabel="size of the weights, share of dense", yscale="log")
        axis.legend(fontsize="small")
    axes[0].set_ylabel("perplexity (held out)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    """Prints and writes the tables and the figure."""
    assets = Path(os.environ.get("JAXCOMPRESS_ASSETS", "."))
    args = arguments(
        __doc__,
        model=str(assets / "tinystories-656k"),
        text=str(assets / "text" / "tinystories-valid.txt"),
        calibration=str(assets / "text" / "tinystories-train-head.txt"),
    )
    model, text = jc.load(args.model), Path(args.text)
    data = {"calibration": args.calibration, "calibration_samples": SAMPLES, "ctx": CTX}

    def quality(other):
        found = jc.evaluate(other, text=text, ctx=CTX, tokens=TOKENS, against=model)
        return found["perplexity"], found["kl"]

    dense = quality(model)[0]
    tables = []
    for title, rows in GROUPS.items():
        table = Table(title, ["weights", "size", "perplexity", "KL"])
        for label, method, options in rows:
            needs = method in ("asvd", "svd_llm", "qera")
            small = jc.compress(model, method, **(data if needs else {}), **options)
            table.add(label, share_of_bytes(small, model), *quality(small))
        tables.append(table)
    shared = Table("Shared layers", ["layers", "size", "perplexity", "KL"])
    blocks = len(model.blocks.of(model.params))
    for layers in range(blocks - 1, 0, -1):
        small = jc.compress(model, "share", layers=layers, **data)
        size = jc.inspect(small)["total"]["bytes"] / jc.inspect(model)["total"]["bytes"]
        shared.add(f"{layers} of {blocks}", size, *quality(small))
    args.out.mkdir(parents=True, exist_ok=True)
    draw(tables, dense, args.out / "factorization_table.png")
    notes = [
        f"{args.model}: perplexity {dense:.4f} on {TOKENS:,} tokens of {text.name}; "
        f"{SAMPLES} x {CTX} tokens of {Path(args.calibration).name} for calibration. KL in nats a "
        "token against the dense model. Size: of the compressed matrices, scales and tables "
        "counted, as a share of what they were; for shared layers, of the whole model. Nothing is "
        "trained afterwards."
    ]
    write(args.out, "factorization_table", __doc__, [*tables, shared], notes)


if __name__ == "__main__":
    main()
