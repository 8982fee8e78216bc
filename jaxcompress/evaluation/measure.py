"""What a recipe measures after each stage: quality on held-out and training data, and size."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.flops import flops
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.evaluation.footprint import footprint, nonzero
from jaxcompress.evaluation.images import accuracy
from jaxcompress.evaluation.language import perplexity
from jaxcompress.evaluation.running import Placement, lifted

# Token ids [tokens], or images [images, height, width, channels] with labels [images].
Data = np.ndarray | tuple[np.ndarray, np.ndarray]


def measure(
    model: Model,
    *,
    heldout: Data,
    train: Data | None = None,
    against: Model | None = None,
    ctx: int = 512,
    slices: int = 5,
    bytes_disk: int | None = None,
    speed: bool = False,
) -> dict[str, Any]:
    """Quality and size of a model, as a stage of `report.json` holds them.

    Args:
      model: what is measured; parameters may be compressed and lie on a mesh.
      heldout: token ids, or (images, labels), that no stage saw.
      train: the same of what the stages were trained or calibrated on; as much as `heldout` is
        enough to tell the gap.
      against: the dense model; adds KL and agreement.
      ctx: tokens in a window; FLOPs are per token of such a window.
      slices: parts of the data whose spread is told.
      bytes_disk: of the stage's result on disk, where there is one.
      speed: whether the forward pass is timed.

    Returns:
      `quality`: `heldout` and, where given, `train`, each what `perplexity` or `accuracy` returns;
      `size`: see `size_of`; with `speed` also `per_second`.

    Raises:
      InputError: data that do not fit the model.
    """
    data = {"heldout": heldout, "train": train}
    quality = {
        role: _quality(model, found, against, ctx, slices)
        for role, found in data.items()
        if found is not None
    }
    if isinstance(heldout, tuple):
        one = jax.ShapeDtypeStruct((1, *heldout[0].shape[1:]), jnp.float32)
        size = size_of(model, one)
    else:
        size = size_of(model, jax.ShapeDtypeStruct((1, ctx), jnp.int32), per=ctx)
    if bytes_disk is not None:
        size["bytes_disk"] = int(bytes_disk)
    if speed:
        size["per_second"] = per_second(model, heldout, ctx)
    return {"quality": quality, "size": size}


def per_second(
    model: Model, data: Data, ctx: int = 512, *, most: int = 8, repeats: int = 5
) -> float:
    """Tokens or images per second of the compiled forward pass, on the devices of the parameters.

    Args:
      model: parameters may be compressed.
      data: token ids or (images, labels).
      ctx: tokens in a window.
      most: windows, or 32 times as many images, that run at once.
      repeats: timed passes behind one that is not; the median counts.
    """
    if isinstance(data, tuple):
        batch = np.asarray(data[0][: 32 * most], np.float32)
        items = len(batch)
    else:
        batch = data[: min(most, len(data) // ctx) * ctx].reshape(-1, ctx).astype(np.int32)
        items = batch.size
    place = Placement.of(model.params)
    padded = place.batch(
        np.resize(batch, (-(-len(batch) // place.shards) * place.shards, *batch.shape[1:]))
    )
    run = jax.jit(lifted(model.apply))
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(model.params, padded))
        times.append(time.perf_counter() - start)
    return items / float(np.median(times[1:]))


def _quality(
    model: Model, data: Data, against: Model | None, ctx: int, slices: int
) -> dict[str, Any]:
    if isinstance(data, tuple):
        return accuracy(model, *data, against=against, slices=slices)
    return perplexity(model, data, ctx=ctx, against=against, slices=slices)


def size_of(model: Model, *inputs: Any, per: int = 1) -> dict[str, Any]:
    """Size of a model.

    Args:
      model: any model.
      inputs: arrays or `jax.ShapeDtypeStruct`s, for the operations.
      per: tokens or images in them.

    Returns:
      `bytes_memory`, `parameters`, `bits_per_weight`, `nonzero` (entries that are not zero),
      `flops` and `flops_nonzero` (operations of the forward pass by token or image, see
      `core.flops`).
    """
    found, kept = footprint(model.params), nonzero(model.params)
    leaves = leaves_with_paths(model.params)
    shares = {path: kept[path] / max(leaf.size, 1) for path, leaf in leaves if path in kept}
    operations = flops(model.apply, model.params, *inputs, shares=shares)
    return {
        "bytes_memory": found["bytes"],
        "bits_per_weight": found["bits_per_weight"],
        "parameters": found["parameters"],
        "nonzero": sum(kept.values()),
        "flops": round(operations.total / per),
        "flops_nonzero": round(operations.nonzero / per),
    }
