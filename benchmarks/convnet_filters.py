"""Filters of convolutional networks pruned step by step with fine-tuning: accuracy against size.

    jaxcompress run --config configs/vgg11.py --workdir vgg11 ...
    JAXCOMPRESS_ASSETS=DIR python benchmarks/convnet_filters.py --vgg vgg11/model [--work FOLDER]

VGG-11 until 80 % of its filters are gone, ResNet-20 until half of its operations are. Every row is
fine-tuned alike, the whole network too, so that what a cut costs is not hidden by what more
training gives. What is done stays in the working folder, and a second call goes on there. Where
torch_pruning is installed it cuts the same networks by the same scores, channels are compared; in
any case PyTorch loads the smallest networks and its logits are compared.
"""

import importlib.util
import itertools
import json
import math
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from tables import Table, arguments, relative_difference, write

import jaxcompress as jc
from jaxcompress.checkpoints.native import native_bytes
from jaxcompress.core.flops import flops
from jaxcompress.data.batches import Batches
from jaxcompress.data.images import Prepare, image_dataset, normalize, read_images
from jaxcompress.evaluation.images import accuracy
from jaxcompress.models import name_map_of
from jaxcompress.pruning.structured import write_torch_module
from jaxcompress.training import classification, fit, make_optimizer
from jaxcompress.training.batch_norm import recalibrate, training_apply

BATCH, RATE, AS_CUT = 128, 1e-3, 2000
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "convnet_filters.svg"


def courses(score):
    """By name: title, options of each step of `filters`, whether (whole, now) is the end."""
    common = {"allocation": "global", "score": score}
    return {
        "vgg11": (
            "VGG-11",
            {"sparsity": 0.28, "minimum": 4, **common},
            lambda whole, now: now["filters"] <= 0.2 * whole["filters"],
        ),
        "resnet20": (
            "ResNet-20",
            {"sparsity": 0.2, "minimum": 2, **common},
            lambda whole, now: now["flops"] <= 0.5 * whole["flops"],
        ),
    }


class Images:
    """Images to train on and to measure on."""

    def __init__(self, folder, limit):
        self.rows = image_dataset(str(folder / "train.parquet"))
        self.test = read_images(folder / "test.parquet", limit)

    def accuracy(self, model, limit=None):
        """On the test images, or the first of them."""
        return accuracy(model, self.test[0][:limit], self.test[1][:limit])["accuracy"]

    def calibration(self, count):
        """Normalized training images with their labels."""
        found = self.rows[np.arange(count)]
        return normalize(found["images"]), found["labels"]

    def tuned(self, model, steps, folder):
        """Trained by the statistics of batches, which are measured afterwards."""
        optimizer = make_optimizer(
            steps=steps, learning_rate=RATE, warmup=steps // 10, weight_decay=0.05
        )
        objective = classification(model.replace(apply=training_apply(model)))
        batches = Batches(self.rows, BATCH, seed=1, transform=Prepare(augment=True))
        made = fit(
            model, objective, batches, optimizer, steps=steps, workdir=folder, checkpoint_every=25
        )
        pixels = self.calibration(1024)[0]
        return recalibrate(made, [{"images": part} for part in np.split(pixels, 8)])


def size(model):
    """Filters, parameters, operations of one image, bytes of a file."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    convolutions = [x for x in jax.tree.leaves(model.params) if x.ndim == 4]
    return {
        "filters": sum(x.shape[-1] for x in convolutions),
        "parameters": sum(x.size for x in jax.tree.leaves(model.params["params"])),
        "flops": flops(model.apply, model.params, image).total,
        "bytes": native_bytes(model.params),
    }


def step(model, options, images, steps, folder):
    """One row: cut, measured, fine-tuned, measured."""
    if options is not None:
        calibration = images.calibration(256) if options["score"] != "magnitude" else None
        model = jc.compress(model, "filters", calibration=calibration, **options)
    found = size(model) | {"as cut": images.accuracy(model, AS_CUT if options else None)}
    model = images.tuned(model, steps, folder / "tuning")
    found["tuned"] = images.accuracy(model)
    jc.save(model, folder / "model", overwrite=True)
    (folder / "row.json").write_text(json.dumps(found))


def curve(model, options, is_end, images, steps, work):
    """The rows of a network, each from where the one before ended: (row, model)."""
    whole = None
    for number in itertools.count():
        folder = work / f"{number:02d}"
        if not (folder / "row.json").is_file():
            step(model, options if number else None, images, steps, folder)
        row, model = json.loads((folder / "row.json").read_text()), jc.load(folder / "model")
        whole = whole or row
        yield row, model
        if is_end(whole, row):
            return


def in_pytorch(model, images, folder):
    """Largest difference of logits, of their largest: PyTorch loads what was written for it."""
    import torch

    network = torch_network(model, folder)
    pixels = normalize(images.test[0][:64])
    with torch.no_grad():
        theirs = network(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).numpy()
    return relative_difference(theirs, np.asarray(jax.jit(model.apply)(model.params, pixels)))


def torch_network(model, folder):
    """The network that PyTorch loads from the files written for it."""
    _, module = write_torch_module(model, folder)
    spec = importlib.util.spec_from_file_location("network", module)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made.load()


def against_torch_pruning(model, sparsity, allocation, folder):
    """(tensors equal bit for bit, tensors): one cut by each library, the same scores."""
    import torch
    import torch_pruning

    small = jc.compress(model, "filters", sparsity=sparsity, allocation=allocation)
    network = torch_network(model, folder)
    shapes = {
        name: tensor.shape for name, tensor in name_map_of(small.config).tensors(small.params)
    }
    # What `filters` leaves alone here: filters tied by residual additions, and the classes.
    whole = [
        module
        for name, module in network.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
        and shapes[f"{name}.weight"][0] == module.weight.shape[0]
    ]
    torch_pruning.pruner.MetaPruner(
        network,
        torch.zeros(1, 3, 32, 32),
        importance=torch_pruning.importance.GroupMagnitudeImportance(
            p=1,
            group_reduction="sum",
            normalizer="mean" if allocation == "global" else None,
            target_types=[torch.nn.Conv2d, torch.nn.Linear],
        ),
        pruning_ratio=sparsity,
        global_pruning=allocation == "global",
        ignored_layers=whole,
    ).step()
    theirs = network.state_dict()
    equal = [
        theirs[name].shape == ours.shape and np.array_equal(theirs[name].numpy(), np.asarray(ours))
        for name, ours in name_map_of(small.config).tensors(small.params)
    ]
    return sum(equal), len(equal)


def draw(curves, path):
    """Accuracy over the parameters that are left, a line for each network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    for label, rows in curves.items():
        left = [100 * row["parameters"] / rows[0]["parameters"] for row in rows]
        color = axis.plot(left, [100 * row["tuned"] for row in rows], "o-", label=label)[0]
        cut = [100 * row["as cut"] for row in rows]
        axis.plot(left[1:], cut[1:], ".:", color=color.get_color())
    axis.set(xlabel="parameters left (%)", ylabel="accuracy, 10,000 test images (%)")
    axis.set_title("Filters pruned step by step: dotted as cut, solid fine-tuned", fontsize=9)
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def peers(table, model, name, work):
    """Rows of what Torch-Pruning cuts of the same weights."""
    work.mkdir(parents=True, exist_ok=True)
    for allocation in ("uniform", "global"):
        kept = work / f"torch_pruning-{allocation}.json"
        if not kept.is_file():
            if importlib.util.find_spec("torch_pruning") is None:
                return
            found = against_torch_pruning(model, 0.5, allocation, work / "peer")
            kept.write_text(json.dumps(found))
        equal, total = json.loads(kept.read_text())
        table.add(name, allocation, "50 % of the filters", f"{equal} of {total}")


def main():
    """Prints and writes tables and figure, again after each row."""
    args = arguments(
        __doc__, vgg="vgg11/model", networks="vgg11,resnet20", score="magnitude", tune=40,
        images=10_000, work="", figure=str(FIGURE),
        assets=os.environ.get("JAXCOMPRESS_ASSETS", "."),
    )  # fmt: skip
    assets = Path(args.assets)
    work = Path(args.work or Path(tempfile.gettempdir()) / f"convnet_filters-{args.tune}")
    images = Images(assets / "cifar10", args.images)
    resnet = assets / "cifar-resnet20" / "resnet20-12fca82f.th"
    starts = {
        "vgg11": lambda: jc.load(args.vgg),
        "resnet20": lambda: jc.load(resnet, arch="resnet20"),
    }
    columns = ["step", "filters", "parameters", "MFLOPs an image", "bytes", "accuracy as cut",
               "fine-tuned", "standard error", "PyTorch's logits"]  # fmt: skip
    compared = Table("The same cut by Torch-Pruning", ["network", "allocation", "cut", "equal"])
    tables, curves = [compared], {}
    for name in args.networks.split(","):
        (title, options, is_end), start = courses(args.score)[name], starts[name]()
        peers(compared, start, title, work / name)
        table, rows = Table(title, columns), []
        tables.insert(len(tables) - 1, table)
        course = curve(start, options, is_end, images, args.tune, work / name)
        for number, (row, model) in enumerate(course):
            rows.append(row)
            error = math.sqrt(row["tuned"] * (1 - row["tuned"]) / len(images.test[1]))
            table.add(
                number, row["filters"], f"{row['parameters']:,}", f"{row['flops'] / 1e6:.2f}",
                f"{row['bytes']:,}", f"{row['as cut']:.2%}", f"{row['tuned']:.2%}", f"{error:.2%}",
                f"{in_pytorch(model, images, work / name / 'pytorch'):.0e}",
            )  # fmt: skip
            draw(curves | {title: rows}, Path(args.figure))
            write(args.out, "convnet_filters", __doc__, tables, [notes(args, images)])
        curves[title] = rows


def notes(args, images):
    """What the tables mean."""
    return (
        f"Each step: the filters of the lowest score ({args.score}, of all layers together, those "
        f"of a layer divided by their mean) go, then {args.tune} steps of {BATCH} images. The "
        f"first row is the network it begins with, fine-tuned alike. {len(images.rows):,} training "
        f"images; accuracy on {len(images.test[1]):,} test images; as cut: on the first {AS_CUT:,} "
        "of them (of the first row: on all). Parameters: without running statistics; bytes: of the "
        "file, with them; FLOPs: multiply and add count 2. PyTorch: the largest difference of "
        "logits of 64 images, of the largest logit. Equal: tensors that are the same bit for bit."
    )


if __name__ == "__main__":
    main()
