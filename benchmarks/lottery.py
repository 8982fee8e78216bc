"""Lottery tickets: rewound winning tickets against their controls, over several seeds.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/lottery.py [--sparsities 0.8,0.95]

A perceptron (768-300-100-10) on CIFAR-10 images halved to 16 x 16. A ticket: `--rounds` times
trained, its smallest weights pruned, rewound to step `--rewind`, and trained to the end. Controls
with as many weights in each matrix: the ticket's early weights under a random mask, and its mask
over its early weights in random order. Rows that are done are kept in `--work`.
"""

import json
import os
import statistics
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tables import Table, arguments, write

from jaxcompress.core.model import Model
from jaxcompress.data.images import normalize, read_images
from jaxcompress.pruning import schedules
from jaxcompress.training.mesh import make_mesh
from jaxcompress.training.objective import classification
from jaxcompress.training.settings import Training, train
from jaxcompress.training.transform import Transform

SIZES = (768, 300, 100, 10)
KINDS = {"winning ticket": "none", "random mask": "random", "shuffled weights": "reinit"}


class Drawn:
    """Batches drawn anew from their number."""

    def __init__(self, images, labels, rows, seed):
        self.images, self.labels, self.rows, self.seed, self.given = images, labels, rows, seed, 0

    def __next__(self):
        rng = np.random.default_rng([self.seed, self.given])
        self.given += 1
        rows = rng.integers(0, len(self.images), self.rows)
        mirrored = np.where(rng.random((self.rows, 1, 1, 1)) < 0.5, self.images[rows],
                            self.images[rows][:, :, ::-1])  # fmt: skip
        return {"images": mirrored, "labels": self.labels[rows]}

    def state(self):
        return {"given": self.given}

    def restore(self, state):
        self.given = state["given"]


def perceptron(seed):
    """The network, drawn as LeNet-300-100 is in the paper (Glorot)."""
    rng = np.random.default_rng(seed)
    params = {}
    for i, (wide, narrow) in enumerate(pairwise(SIZES)):
        kernel = rng.normal(size=(wide, narrow)) * (2 / (wide + narrow)) ** 0.5
        params[str(i)] = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(narrow)}

    def apply(params, images):
        x = images.reshape(len(images), -1)
        for i in range(len(SIZES) - 1):
            x = x @ params[str(i)]["kernel"] + params[str(i)]["bias"]
            x = jax.nn.relu(x) if i < len(SIZES) - 2 else x
        return x

    return Model(apply, params)


def halved(path, limit):
    """Normalized images [n, 16, 16, 3] and labels."""
    images, labels = read_images(path, limit)
    n, h, w, c = images.shape
    small = np.asarray(normalize(images)).reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    return small.astype(np.float32), labels.astype(np.int32)


def accuracy(model, images, labels):
    """Share of held-out images that are told right."""
    return float((jax.jit(model.apply)(model.params, images).argmax(-1) == labels).mean())


def trained(seed, transform, data, args):
    """The network of a seed, trained to the end."""
    model = perceptron(seed)
    settings = Training(
        steps=args.steps, batch_size=args.batch, learning_rate=1.2e-3, schedule="constant",
        clip=None, log_every=args.steps, checkpoint_every=10**6,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return train(
            model, classification(model), Drawn(*data, args.batch, seed), settings,
            workdir=Path(folder), mesh=make_mesh(1, 1, 1, devices=jax.devices()[:1]), seed=seed,
            transform=transform,
        )  # fmt: skip


def ticket(kind, sparsity, seed, data, args):
    """A trained ticket, or one of its controls."""
    where = schedules.targets(perceptron(seed), data[0][:1])
    change = partial(
        schedules.lottery, where=where, sparsity=sparsity, rounds=args.rounds, steps=args.steps,
        rewind=args.rewind, control=KINDS[kind], seed=seed,
    )  # fmt: skip
    steps = schedules.training_steps(args.steps, args.rounds, args.rewind)
    return trained(seed, Transform(change, paths=tuple(where), steps=steps), data, args)


def main():
    """Prints and writes the tables."""
    args = arguments(
        __doc__, assets=os.environ.get("JAXCOMPRESS_ASSETS", "."), sparsities="0.8", seeds=5,
        steps=500, rewind=25, rounds=3, batch=64, images=10000,
        heldout=5000,
        work="lottery.partial",
    )  # fmt: skip
    cifar = Path(args.assets) / "cifar10"
    data = halved(cifar / "train.parquet", args.images)
    heldout = halved(cifar / "test.parquet", args.heldout)
    keys = [
        f"{getattr(args, name)}"
        for name in ("steps", "rewind", "rounds", "batch", "images", "heldout")
    ]
    kept = Path(args.work) / "rows.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(kept.read_text()) if kept.is_file() else {}

    def measured(kind, sparsity, seed):
        key = "/".join([kind, str(sparsity), str(seed), *keys])
        if key not in rows:
            made = (
                trained(seed, None, data, args)
                if kind == "dense"
                else ticket(kind, sparsity, seed, data, args)
            )
            zeros = np.mean([float((made.params[i]["kernel"] == 0).mean()) for i in made.params])
            rows[key] = {
                "heldout": accuracy(made, *heldout), "train": accuracy(made, *data),
                "zeros": float(zeros),
            }  # fmt: skip
            kept.write_text(json.dumps(rows, indent=1) + "\n")
        return rows[key]

    columns = ["network", "sparsity", "seed", "accuracy", "on its training images"]
    table = Table("Each seed", columns)
    cases = [("dense", 0.0)]
    cases += [(kind, float(s)) for s in args.sparsities.split(",") for kind in KINDS]
    found = {case: [] for case in cases}
    for seed in range(args.seeds):
        for kind, sparsity in cases:
            row = measured(kind, sparsity, seed)
            found[kind, sparsity].append(row["heldout"])
            table.add(kind, f"{sparsity:.0%}", seed, f"{row['heldout']:.4f}", f"{row['train']:.4f}")
    means = Table(
        "Over the seeds",
        ["network", "sparsity", "accuracy, mean", "standard deviation", "winning minus it, mean",
         "standard error", "seeds that win"],
    )  # fmt: skip
    for (kind, sparsity), values in found.items():
        pairs = [a - b for a, b in zip(found.get(("winning ticket", sparsity), []), values)]
        compared = kind not in ("dense", "winning ticket") and len(pairs) > 1
        means.add(
            kind, f"{sparsity:.0%}", f"{statistics.mean(values):.4f}",
            f"{statistics.stdev(values):.4f}" if len(values) > 1 else None,
            f"{statistics.mean(pairs):+.4f}" if compared else None,
            f"{statistics.stdev(pairs) / len(pairs) ** 0.5:.4f}" if compared else None,
            f"{sum(p > 0 for p in pairs)} of {len(pairs)}" if compared else None,
        )  # fmt: skip
    notes = [
        f"{len(data[0]):,} training images (mirrored at random), {len(heldout[0]):,} held out; "
        f"Adam at 1.2e-3, batches of {args.batch}; {args.steps} steps a training, {args.rounds} "
        f"rounds, rewound to step {args.rewind}. Differences are of the same seed: the same fresh "
        "weights and the same batches."
    ]
    write(args.out, "lottery", __doc__, [table, means], notes)


if __name__ == "__main__":
    main()
