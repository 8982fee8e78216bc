"""State dicts of `torch.nn.utils.prune`: `weight_orig` and `weight_mask` in place of `weight`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcompress.core.arrays.base import dense, from_matrix, is_compressed
from jaxcompress.core.arrays.training import Masked
from jaxcompress.core.errors import InputError

ORIGINAL, MASK = "_orig", "_mask"


def fold_pruned(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Multiply masks in, as `torch.nn.utils.prune.remove` does.

    Args:
      state: flat state dict; `X_orig` and `X_mask` (0 or 1, of X's shape) stand for `X`.

    Returns:
      The state dict with `X = X_orig * X_mask` at the place of `X_orig`, and the masks
      `{"X": bool, True = kept}`.

    Raises:
      InputError: a mask without its weight, of another shape, or with values besides 0 and 1.
    """
    folded: dict[str, Any] = {}
    masks: dict[str, np.ndarray] = {}
    for name, value in state.items():
        if name.endswith(MASK) and name[: -len(MASK)] + ORIGINAL in state:
            continue
        base = name.removesuffix(ORIGINAL)
        if base == name or base + MASK not in state:
            folded[name] = value
            continue
        mask = np.asarray(state[base + MASK])
        if mask.shape != value.shape or not np.isin(mask, (0, 1)).all():
            raise InputError(f"{base}{MASK}: a mask of 0 and 1 of shape {value.shape} was expected")
        masks[base] = mask.astype(bool)
        folded[base] = value * mask.astype(value.dtype)
    return folded, masks


def unfold_pruned(state: Mapping[str, Any], masks: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: `X_orig` and a float `X_mask` for every mask, for `prune`'s own modules.

    Args:
      state: flat state dict.
      masks: `{"X": bool, True = kept}`, names of `state`.

    Raises:
      InputError: a mask of a weight that is not there, or of another shape.
    """
    for name, mask in masks.items():
        if name not in state or np.shape(mask) != np.shape(state[name]):
            raise InputError(f"mask {name}: no weight of that name and shape in the state dict")
    out: dict[str, Any] = {}
    for name, value in state.items():
        out[name + ORIGINAL if name in masks else name] = value
    for name, mask in masks.items():
        out[name + MASK] = np.asarray(mask).astype(np.asarray(state[name]).dtype)
    return out


def pruned_state(tensors: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], int]:
    """The state dict of modules under `torch.nn.utils.prune`, and how many weights are pruned.

    Args:
      tensors: by their names in PyTorch; leaves may be compressed. Of a `Masked` leaf all weights
        stand in `X.weight_orig`; of any other with zeros, what is not zero is kept.
    """
    state: dict[str, np.ndarray] = {}
    masks: dict[str, np.ndarray] = {}
    for name, leaf in tensors.items():
        if isinstance(leaf, Masked):
            state[name] = np.asarray(from_matrix(leaf.weight, leaf.dims).astype(leaf.dtype))
            masks[name] = np.asarray(from_matrix(leaf.mask, leaf.dims))
            continue
        array = state[name] = np.asarray(dense(leaf))
        sparse = is_compressed(leaf) or array.ndim > 1
        if name.endswith("weight") and sparse and not (array != 0).all():
            masks[name] = array != 0
    return unfold_pruned(state, masks), len(masks)
