"""What a stage did to each parameter: error, sparsity, bits, bytes; leaf by leaf."""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.checkpoints.describe import format_of
from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.evaluation.footprint import bytes_of, matrices, nonzero_of, taken
from jaxcompress.evaluation.running import Placement

Row = dict[str, Any]


def layer_errors(
    before: Any,
    after: Any,
    *,
    what: str = "",
    told: Mapping[str, Mapping[str, float]] | None = None,
    stored: Any = None,
) -> list[Row]:
    """A row for each parameter that differs between two parameter trees.

    Where blocks were taken out (`layers/0`, `layers/1`, ... are fewer), the ones that stayed are
    found by their values and compared with what they were; the rows say "was layers/3/...", and
    the others "removed", under the path that they had. Blocks that were cut and trained in one
    stage have "no counterpart before".

    Args:
      before: parameters; leaves of both may be compressed, and lie on a mesh.
      after: parameters.
      what: what was done, such as "magnitude 2:4".
      told: figures of single matrices by path, such as `seconds`; see `layerwise.figures`.
      stored: where `after` are float32 master weights, what will be stored of them, or its shapes:
        `bits` and `bytes` are of these.

    Returns:
      Rows of `path`, `shape`, `what` (and how the leaf is stored, where not dense), `bits` (stored
      per entry), `bytes`, `sparsity` (share of zeros), `sqnr_db` (10 log10(sum w^2 /
      sum (w - w')^2), None where that is no number; `what` says why) and
      `seconds` (None where not given), with the other figures that were told.
    """
    old, new = (
        {path: leaf for path, leaf in leaves_with_paths(tree) if hasattr(leaf, "shape")}
        for tree in (before, after)
    )
    was = _paths_before(old, new)
    lasting = dict(leaves_with_paths(after if stored is None else stored))
    rows = []
    for path, leaf in new.items():
        row = _row(path, leaf, was.get(path), old, what)
        if row is not None:
            size = bytes_of(lasting[path])
            bits = 8 * size / max(math.prod(leaf.shape), 1)
            own = _told(path, told or {})
            rows.append({**row, "bits": bits, "bytes": size, "seconds": None, **own})
    known = set(was.values())
    for path in old:
        if path in known or (path in new and path not in was):  # its row says "no counterpart"
            continue
        shape = list(map(int, old[path].shape))
        gone = {"bits": 0.0, "bytes": 0, "sparsity": None, "sqnr_db": None, "seconds": None}
        rows.append({"path": path, "shape": shape, "what": _words(what, "removed"), **gone})
    return rows


def _row(path: str, leaf: Any, was: str | None, old: Mapping[str, Any], what: str) -> Row | None:
    """The row of a parameter; None where nothing changed."""
    shape = tuple(map(int, leaf.shape))
    entries = math.prod(shape)
    form = format_of(leaf) if is_compressed(leaf) else ""
    notes, sqnr = [what, form], None
    if was is None:
        notes.append("no counterpart before")
        kept = nonzero_of(leaf)
    elif tuple(old[was].shape) != shape:
        notes.append(f"shape was {'x'.join(map(str, old[was].shape)) or 'scalar'}")
        kept = nonzero_of(leaf)
    elif old[was] is leaf and was == path:
        return None
    else:
        signal, error, kept = _compare(old[was], leaf)
        if error == 0 and was == path and _same_form(old[was], leaf):
            return None
        if error == 0:
            notes.append("values unchanged")
        elif signal == 0:
            notes.append("all zeros before")
        elif not math.isfinite(error):
            notes.append("not finite")
        else:
            sqnr = 10 * math.log10(signal / error)
        notes += [f"was {was}"] if was != path else []
    return {
        "path": path,
        "shape": list(shape),
        "what": _words(*notes),
        "sparsity": 1 - kept / entries if entries else None,
        "sqnr_db": sqnr,
    }


def _told(path: str, told: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Figures of a leaf; of a stack whose matrices were done one by one, sums or the largest."""
    found = told.get(path)
    if found is not None:
        return dict(found)
    slices = [figures for where, figures in told.items() if where.startswith(f"{path}[")]
    names = {name for figures in slices for name in figures}
    total = {"seconds": sum, "dead_inputs": sum, "bad_scales": sum}
    return {
        name: total.get(name, max)(figures[name] for figures in slices if name in figures)
        for name in sorted(names)
    }


def _words(*notes: str) -> str:
    return ", ".join(note for note in notes if note)


def _same_form(a: Any, b: Any) -> bool:
    """Whether two leaves are stored alike."""
    forms: list[Any] = [
        (jax.tree.structure(x), [(b.shape, b.dtype) for b in jax.tree.leaves(x)]) for x in (a, b)
    ]
    return bool(forms[0] == forms[1])


def _compare(old: Any, new: Any) -> tuple[float, float, int]:
    """Sum w^2, sum (w - w')^2 and non-zeros of w'; one matrix at a time."""
    place = Placement.of(new, old)
    old, new = place.put(old), place.put(new)
    signal = error = 0.0
    kept = 0
    for index in matrices(old, new):
        squares, errors, counts = map(np.asarray, _program(place.everywhere)(old, new, index))
        # Rows in float32, their sums in float64: the error of a large matrix is small beside it.
        signal += float(squares.sum(dtype=np.float64))
        error += float(errors.sum(dtype=np.float64))
        kept += int(counts.sum(dtype=np.int64))
    return signal, error, kept


@functools.cache
def _program(everywhere: Any) -> Any:
    def sums(old: Any, new: Any, index: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        w, changed = (taken(leaf, index) for leaf in (old, new))
        kept = jnp.count_nonzero(changed, axis=-1)
        w, changed = w.astype(jnp.float32), changed.astype(jnp.float32)
        return jnp.square(w).sum(-1), jnp.square(w - changed).sum(-1), kept

    return jax.jit(sums, out_shardings=everywhere)


# ------------------------------------------------------------------------- blocks that moved up


def _paths_before(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Where each path of `new` was in `old`, as far as that is known."""
    was = {path: path for path in new if path in old}
    blocks_old, blocks_new = _blocks(old), _blocks(new)
    for where in blocks_old.keys() & blocks_new.keys():
        stored, left = blocks_old[where], blocks_new[where]
        if len(stored) <= len(left):
            continue
        numbers = iter(sorted(stored))
        for number in sorted(left):
            block = left[number]
            for path in block.values():
                was.pop(path, None)
            # Blocks keep their order, so each is looked for behind the one before.
            found = next((n for n in numbers if _equal(stored[n], block, old, new)), None)
            if found is not None:
                was |= {path: stored[found][rest] for rest, path in block.items()}
    return was


def _blocks(leaves: Mapping[str, Any]) -> dict[str, dict[int, dict[str, str]]]:
    """Paths by where the blocks stand, number of the block, and rest of the path."""
    found: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for path in leaves:
        match = re.match(r"(.*?)(?:^|/)(\d+)/(.*)", path)
        if match:
            found[match[1]][int(match[2])][match[3]] = path
    return found


def _equal(
    a: Mapping[str, str], b: Mapping[str, str], old: Mapping[str, Any], new: Mapping[str, Any]
) -> bool:
    """Whether two blocks hold the same values; stops at the first that differs."""
    if a.keys() != b.keys():
        return False
    pairs = [(old[a[rest]], new[b[rest]]) for rest in a]
    return all(x.shape == y.shape for x, y in pairs) and all(
        x is y or _compare(x, y)[1] == 0 for x, y in pairs
    )
