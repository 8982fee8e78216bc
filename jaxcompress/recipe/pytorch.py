"""An exported language model, opened by transformers in PyTorch and compared with ours."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress import api
from jaxcompress.core.errors import InputError
from jaxcompress.core.readers.lift import lift
from jaxcompress.evaluation.language import perplexity

BATCH = 8


def require() -> None:
    """Raise `InputError` unless PyTorch and transformers are installed."""
    for name in ("torch", "transformers"):  # imported, they would take seconds
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"compare: needs {name}; pip install 'jaxcompress[torch]', or leave it out"
            )


def compare(directory: Path, ids: np.ndarray, ctx: int) -> dict[str, Any]:
    """Logits and perplexity of a directory, in JAX and in PyTorch, both in float32.

    Args:
      directory: what `save` wrote.
      ids: int `[tokens]`.
      ctx: tokens in a window.

    Returns:
      `perplexity` and `perplexity_pytorch`, over the same tokens; `logits_difference`: the largest
      over the first window, as a share of the spread of PyTorch's logits.

    Raises:
      InputError: transformers cannot open it, or misses weights.
    """
    import jax
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of compressed-tensors
            opened: Any = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, output_loading_info=True
            )
            opened[0](torch.zeros((1, 1), dtype=torch.int64))  # decompresses it
    except Exception as error:  # transformers raises many classes
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{directory}: transformers cannot open it ({reason})") from None
    theirs, said = opened
    lacking = {name: found for name, found in said.items() if found}
    if lacking:
        raise InputError(f"{directory}: transformers did not take all weights: {lacking}")
    theirs = theirs.eval()
    ours = api.load(directory, dtype="float32")
    windows = ids[: len(ids) // ctx * ctx].reshape(-1, ctx).astype(np.int64)
    loss, count = 0.0, 0
    first = None
    with torch.no_grad():
        for some in torch.from_numpy(windows).split(BATCH):
            logits = theirs(some).logits
            first = logits[:1].numpy() if first is None else first
            flat = logits[:, :-1].flatten(0, 1)
            labels = some[:, 1:].flatten()
            loss += float(torch.nn.functional.cross_entropy(flat, labels, reduction="sum"))
            count += labels.numel()
    mine = np.asarray(jax.jit(lift(ours.apply))(ours.params, windows[:1].astype(np.int32)))
    assert first is not None
    return {
        "perplexity": perplexity(ours, ids, ctx=ctx)["perplexity"],
        "perplexity_pytorch": math.exp(loss / count),
        "logits_difference": float(np.abs(mine - first).max() / np.ptp(first)),
        "tokens": count,
    }
