"""INT8 of a ResNet-20 with folded batch norms: accuracy against float32.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/int8_resnet.py [--images 10000]

Published weights, the test images of CIFAR-10. Weights have one scale per output channel; static
activations one per convolution, from training images.
What is done is kept in `--workdir`, and a second call goes on from there.
"""

import os
from pathlib import Path

import numpy as np
from peers import Kept
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.data.images import image_dataset, normalize, read_images
from jaxcompress.evaluation.images import accuracy
from jaxcompress.quantization.activations import activations
from jaxcompress.quantization.batch_norm import fold_batch_norm

ASSETS = Path(os.environ.get("JAXCOMPRESS_ASSETS", "assets"))


def main():
    """Prints and writes the table."""
    args = arguments(__doc__, images=10_000, workdir=Path("int8-resnet-work"))
    args.workdir.mkdir(parents=True, exist_ok=True)
    kept = Kept(args.workdir / f"{args.images}.json")
    model = jc.load(ASSETS / "cifar-resnet20" / "resnet20-12fca82f.th", arch="resnet20")
    pixels, labels = read_images(ASSETS / "cifar10" / "test.parquet", args.images)
    rows = image_dataset(str(ASSETS / "cifar10" / "train.parquet"))
    calibration = normalize(rows[np.arange(256)]["images"])
    folded = fold_batch_norm(model)
    axes = jc.contractions(model.apply)(model.params, calibration[:1])
    paths = [path for path in axes if path.endswith("kernel")]

    def rounded(model):
        return jc.compress(model, "rtn", bits=8, granularity="channel", include=paths, axes=axes)

    def w8a8(model, **options):
        return activations(rounded(model), paths, calibration=calibration, **options)

    static = {"activation_scaling": "static"}
    columns = ["", "accuracy", "same class as float32", "KL"]
    table = Table(f"ResNet-20, {len(labels)} test images", columns)
    for name, make in (
        ("float32", lambda: model),
        ("batch norms folded", lambda: folded),
        ("folded, INT8 weights per channel", lambda: rounded(folded)),
        (
            "folded, INT8 weights, INT8 activations, static min-max",
            lambda: w8a8(folded, **static),
        ),
        ("the same, static MSE", lambda: w8a8(folded, activation_range="mse", **static)),
        ("the same, static entropy", lambda: w8a8(folded, activation_range="entropy", **static)),
        ("the same, dynamic per image", lambda: w8a8(folded)),
        ("not folded, INT8 weights, static min-max", lambda: w8a8(model, **static)),
    ):
        found = kept(name, lambda make=make: accuracy(make(), pixels, labels, against=model))
        share = f"{found['agreement']:.2%}"
        table.add(name, f"{found['accuracy']:.4f}", share, f"{found['kl']:.1e}")
    error = 100 * (0.82 * 0.18 / len(labels)) ** 0.5
    notes = [
        f"Static ranges from 256 training images. Standard error of an accuracy: {error:.2f} %; "
        "all rows see the same images, so that differences are known better."
    ]
    write(args.out, "int8_resnet", __doc__, [table], notes)


if __name__ == "__main__":
    main()
