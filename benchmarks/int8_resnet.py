"""INT8 of a ResNet-20 with folded batch norms: accuracy against float32.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/int8_resnet.py [--images 2000]

Published weights, the test images of CIFAR-10. Weights have one scale per output channel; static
activations one per convolution, from training images.
"""

import os
from pathlib import Path

import numpy as np
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.data.images import image_dataset, normalize, read_images
from jaxcompress.evaluation.images import accuracy
from jaxcompress.quantization.activations import activations
from jaxcompress.quantization.batch_norm import fold_batch_norm

ASSETS = Path(os.environ.get("JAXCOMPRESS_ASSETS", "assets"))


def main():
    """Prints and writes the table."""
    args = arguments(__doc__, images=2000)
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
    notes = ["Static ranges from 256 training images."]
    write(args.out, "int8_resnet", __doc__, [table], notes)


if __name__ == "__main__":
    main()
