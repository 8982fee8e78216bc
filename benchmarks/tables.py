"""What the table programs of this folder share: comparisons, and where tables are written."""

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path

import jax
import numpy as np

import jaxcompress as jc

RESULTS = Path(__file__).parent / "results"


def largest_difference(a, b):
    """max |a - b| over two trees of arrays."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        (
            float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max())
            for x, y in pairs
            if x.size
        ),
        default=0.0,
    )


def relative_difference(a, b):
    """The largest over the leaves of max |a - b| / max |b|; 0 / 0 is 0."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        difference = largest_difference(x, y)
        size = float(np.abs(np.asarray(y, np.float64)).max())
        worst = max(worst, difference / size if difference else 0.0)
    return worst


def arguments(doc, **more):
    """Command line of a table program: `--out`, and `--name` for each of `more`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    default = RESULTS / f"{date.today()}-{jax.default_backend()}"
    parser.add_argument("--out", type=Path, default=default, help="folder of the results")
    for name, value in more.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()


class Table:
    """A Markdown table printed row by row; `write` keeps it, and the rows as JSON."""

    def __init__(self, title, columns):
        self.title, self.columns, self.rows, self.start = title, columns, [], time.time()
        print(f"\n## {title}\n\n{_line(columns)}\n{_line(['---'] * len(columns))}", flush=True)

    def add(self, *cells):
        """One row; floats are shown with three digits unless given as text."""
        self.rows.append(cells)
        print(_line(map(_shown, cells)), flush=True)

    def markdown(self):
        """The table with its title."""
        body = [_line(map(_shown, row)) for row in self.rows]
        head = [_line(self.columns), _line(["---"] * len(self.columns))]
        return "\n".join([f"## {self.title}", "", *head, *body, ""])

    def record(self):
        """Title and rows, each a dictionary by column."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows}


def write(out, name, doc, tables, notes=()):
    """Tables to `out/name.md` and `out/name.json`, with what they were measured on."""
    out.mkdir(parents=True, exist_ok=True)
    versions = {
        "date": str(date.today()),
        "jaxcompress": jc.__version__,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "seconds": round(time.time() - min(table.start for table in tables)),
    }
    said = ", ".join(f"{key} {value}" for key, value in versions.items())
    parts = [f"# {doc.splitlines()[0]}", "", f"`python benchmarks/{name}.py`: {said}.", ""]
    parts += [table.markdown() for table in tables]
    parts += [f"{note}\n" for note in notes]
    (out / f"{name}.md").write_text("\n".join(parts).rstrip() + "\n")
    record = {**versions, "tables": [table.record() for table in tables], "notes": list(notes)}
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print("", *notes, f"{versions['seconds']} s; written to {out}/{name}.md, .json", sep="\n")


def _line(cells):
    return f"| {' | '.join(map(str, cells))} |"


def _shown(cell):
    if isinstance(cell, float):
        return f"{cell:.2e}" if cell and not 1e-2 <= abs(cell) < 1e4 else f"{cell:.3g}"
    return "" if cell is None else cell
