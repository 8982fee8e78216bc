"""Distil, cut, fine-tune, 4 bits: size, quality and speed behind each stage.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/distil_prune_quantize.py [--kinds language,images]

Runs `configs/distil_prune_quantize.py` in `--workdir`, and goes on there where it was stopped.
"""

import os
from pathlib import Path

from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.recipe.files import read_file

ASSETS = Path(os.environ.get("JAXCOMPRESS_ASSETS", "assets"))
CONFIG = Path(__file__).parents[1] / "configs" / "distil_prune_quantize.py"
IMAGES = {
    "stages[0].teacher": ASSETS / "cifar-resnet20" / "resnet20-12fca82f.th",
    "data.train": ASSETS / "cifar10" / "train.parquet",
    "data.heldout": ASSETS / "cifar10" / "test.parquet",
}
COLUMNS = ["stage", "quality", "KL", "bytes", "bits", "MFLOPs", "per second", "seconds"]


def table_of(kind, report):
    """A row for each stage."""
    measure, items = ("accuracy", "image") if kind == "images" else ("perplexity", "token")
    data = next(one for one in report["data"] if one["role"] == "heldout")
    title = f"{kind}: {measure}, FLOPs and speed by {items}, {Path(data['name']).name}"
    table = Table(title, COLUMNS)
    for stage in report["stages"]:
        quality, size = stage["quality"]["heldout"], stage["size"]
        table.add(
            stage["name"],
            f"{quality[measure]:.4g}",
            f"{quality['kl']:.3f}" if "kl" in quality else "",
            f"{size['bytes_disk']:,}",
            f"{size['bits_per_weight']:.2f}",
            f"{size['flops'] / 1e6:.2f}",
            f"{size['per_second']:,.0f}",
            f"{stage['seconds']:.0f}",
        )
    return table


def main():
    """Runs what is missing; prints and writes the tables."""
    args = arguments(
        __doc__, kinds="language,images", workdir=Path("distil_prune_quantize.partial")
    )
    tables = []
    for kind in args.kinds.split(","):
        given = IMAGES if kind == "images" else {}
        changes = [f"--config.{name}={path}" for name, path in given.items()]
        config = read_file(f"{CONFIG}:{kind}", changes)
        tables.append(table_of(kind, jc.run(config, args.workdir / kind)))
    write(args.out, "distil_prune_quantize", __doc__, tables)


if __name__ == "__main__":
    main()
