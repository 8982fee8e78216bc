"""The figure of the README: size against quality after each stage of the demo's recorded run.

    python benchmarks/demo_figure.py

Draws the newest `results/*/demo.json` (a copy of the `report.json` that `make demo` writes) as
`docs/figures/demo.svg`, light or dark as the reader's screen is.
"""

import argparse
import hashlib
import json
from pathlib import Path

from jaxcompress.evaluation.drawing import standalone
from jaxcompress.evaluation.report_plots import size_against_quality

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "figures" / "demo.svg"


def newest():
    """The record of the newest run."""
    return max((ROOT / "benchmarks" / "results").glob("*/demo.json"))


def drawn(record):
    """The plot as a file of its own; it says what it was drawn from."""
    data = record.read_bytes()
    plot = size_against_quality(json.loads(data))
    digest = hashlib.sha256(data).hexdigest()
    about = f"From {record.relative_to(ROOT).as_posix()}, SHA-256 {digest}"
    return standalone(plot, "Size against perplexity, stage by stage", about)


def main():
    """Writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FIGURE)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(drawn(newest()), encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
