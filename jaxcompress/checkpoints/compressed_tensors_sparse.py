"""compressed-tensors `sparse-bitmask` and `sparse-24-bitmask`: archives of pruned weights.

A pruned module `X` of `[out, in]` is stored as

* `X.compressed`: what is kept, row by row: `[kept]`, of 2:4 `[out, in / 2]`;
* `X.bitmask` uint8 `[out, ceil(in / 8)]`: bit j of byte b says whether column 8 b + j is kept;
* `X.shape` int64 `[2]`, of 2:4 `[2, 1]`: (out, in);
* not of 2:4, `X.row_offsets` int64 `[out]`: where a row's values begin;

and described in config.json under `quantization_config.sparsity_config`. compressed-tensors wrote
and read them up to 0.14; nothing serves them. `compressed_tensors_reader.py` is the way back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxcompress.core.arrays.base import densify
from jaxcompress.core.errors import InputError

BITMASK, BITMASK_24 = FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
VERSION = "0.14.0"  # the last of compressed-tensors that knows them

WARNING = (
    "is an archive: jaxcompress and compressed-tensors up to 0.14 read it, no server loads it; "
    "use --format dense for those"
)


def encode_sparse_module(name: str, leaf: Any, container: str) -> dict[str, np.ndarray]:
    """The tensors of one module.

    Args:
      name: of the module, `model.layers.0.mlp.up_proj`.
      leaf: its weight `[out, in]`, dense or compressed.
      container: one of `FORMATS`.

    Raises:
      InputError: no matrix, or not 2:4 where that is asked for.
    """
    weight = np.asarray(densify(leaf))
    if weight.ndim != 2:
        raise InputError(f"{name}: {container} holds matrices, not an array of {weight.shape}")
    kept = weight != 0
    shape = np.array(weight.shape, np.int64)
    if container == BITMASK_24:
        kept = _two_of_four(name, kept)
        return {
            f"{name}.shape": shape[:, None],
            f"{name}.compressed": weight[kept].reshape(len(weight), -1),
            f"{name}.bitmask": np.packbits(kept, axis=1, bitorder="little"),
        }
    counts = kept.sum(-1, dtype=np.int64)
    return {
        f"{name}.shape": shape,
        f"{name}.compressed": weight[kept],
        f"{name}.bitmask": np.packbits(kept, axis=1, bitorder="little"),
        f"{name}.row_offsets": np.cumsum(counts) - counts,
    }


def decode_bitmask(parts: dict[str, np.ndarray]) -> np.ndarray:
    """The dense matrix [out, in] of a module's tensors, by their names without the module's.

    Raises:
      ValueError: they contradict each other.
    """
    rows, columns = (int(n) for n in parts["shape"].reshape(-1))
    values = parts["compressed"].reshape(-1)
    bitmask = parts["bitmask"]
    if bitmask.shape != (rows, -(-columns // 8)):
        raise ValueError(f"bitmask {bitmask.shape} for a weight of {(rows, columns)}")
    kept = np.unpackbits(bitmask, axis=1, count=columns, bitorder="little").astype(bool)
    if kept.sum() != values.size:
        raise ValueError(f"{values.size} values for {kept.sum()} set bits")
    dense = np.zeros((rows, columns), values.dtype)
    dense[kept] = values
    return dense


def names_of_sparse_module(name: str, container: str) -> list[str]:
    """Names of the tensors of `encode_sparse_module`."""
    parts = ["shape", "compressed", "bitmask"]
    return [f"{name}.{p}" for p in parts + ([] if container == BITMASK_24 else ["row_offsets"])]


def pays(leaf: Any, container: str) -> bool:
    """Whether a weight `[out, in]` is smaller this way (and 2:4, where that is asked for)."""
    weight = np.asarray(densify(leaf))
    if weight.ndim != 2:
        return False
    kept = weight != 0
    if container == BITMASK_24:
        runs = weight.shape[1] % 4 == 0 and kept.reshape(-1, 4).sum(-1).max(initial=0) <= 2
        return bool(runs)
    bits = 8 * weight.dtype.itemsize
    return int(kept.sum()) * bits + weight.size + 64 * len(weight) < weight.size * bits


def sparsity_config(modules: Iterable[str], container: str, sparsity: float = 0.0) -> Any:
    """The `quantization_config` entry of config.json.

    Args:
      modules: names of those that are stored this way.
      container: one of `FORMATS`.
      sparsity: share of zeros in them, where known.

    Raises:
      InputError: no module is.
    """
    targets = sorted(modules)
    if not targets:
        raise InputError(f"{container}: no linear weight is sparse enough for it; save as dense")
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "sparsity_config": {
            "format": container,
            "targets": targets,
            "ignore": [],
            "global_sparsity": sparsity,
            "sparsity_structure": "2:4" if container == BITMASK_24 else "unstructured",
        },
    }


def _two_of_four(name: str, kept: np.ndarray) -> np.ndarray:
    """Exactly two of every four columns: those that are kept, and the first zeros besides."""
    if kept.shape[1] % 4:
        raise InputError(f"{name}: {kept.shape[1]} columns are not a multiple of 4, as 2:4 needs")
    runs = kept.reshape(-1, 4)
    if runs.sum(-1).max(initial=0) > 2:
        raise InputError(f"{name}: not 2:4; use --format {BITMASK}, or prune with --pattern 2:4")
    first_two = np.argsort(~runs, axis=-1, kind="stable")[:, :2]
    both = np.zeros_like(runs)
    np.put_along_axis(both, first_two, True, axis=-1)
    return both.reshape(kept.shape)
