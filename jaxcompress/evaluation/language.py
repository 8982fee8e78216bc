"""Perplexity of a language model, and its fidelity to a dense one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.evaluation.running import Placement, lifted
from jaxcompress.evaluation.slices import over_slices
from jaxcompress.progress import progress

LOGIT_BYTES = 256 * 2**20  # of the float32 logits of a batch, on one device


def perplexity(
    model: Model,
    ids: np.ndarray,
    *,
    ctx: int = 512,
    tokens: int | None = None,
    stride: int | None = None,
    against: Model | None = None,
    slices: int = 0,
) -> dict[str, Any]:
    """Token-weighted perplexity over windows of a text.

    Protocol: the first `tokens` ids, no special tokens added, windows of `ctx` every `stride`
    tokens (default `ctx`: non-overlapping), an incomplete last window dropped. A window predicts
    its tokens but the first; with a stride below `ctx` each token counts once, with the longest
    context it gets.

    Parameters on a mesh: the batch is split over its axes "data" and "fsdp"; with several
    processes each gives the same ids and gets the same numbers.

    Args:
      model: ids `[batch, ctx]` to logits `[batch, ctx, vocab]`.
      ids: int `[tokens]`.
      ctx: tokens in a window.
      tokens: use only so many of the ids.
      stride: tokens from window to window.
      against: the dense model; adds `kl` (mean KL(dense || model) per token, nats) and
        `agreement` (share of tokens with the same most likely prediction).
      slices: adds the perplexities of so many contiguous runs of windows, from the same pass.

    Returns:
      `perplexity`, `tokens` (predicted), `ctx`, with `against` `kl` and `agreement`, with `slices`
      `slices` (a list) and `spread` (their standard deviation).

    Raises:
      InputError: fewer ids than one window, ids outside of the vocabulary, or a dense model with
        another vocabulary.
    """
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens {tokens}: must be 1 or more")
    ids = np.asarray(ids)[:tokens]
    starts, first_scored = _windows(len(ids), ctx, ctx if stride is None else stride)
    vocab = _common_vocabulary(model, against, ids, ctx)
    place = Placement.of([one.params for one in (model, against) if one is not None])
    most = min(16, -(-len(starts) // place.shards))
    batch = place.shards * int(np.clip(LOGIT_BYTES // (ctx * vocab * 4), 1, most))
    apply, params = lifted(model.apply), place.put(model.params)
    dense_apply = None if against is None else lifted(against.apply)
    dense_params = None if against is None else place.put(against.params)

    sums = np.zeros(4, np.float64)
    by_window = np.zeros((len(starts), 2), np.float64)
    for at in progress(range(0, len(starts), batch), "evaluate", unit="batch"):
        chosen = starts[at : at + batch]
        windows = ids[chosen[:, None] + np.arange(ctx)]
        weights = np.arange(ctx)[None] >= first_scored[at : at + batch, None]
        missing = batch - len(chosen)  # one shape, so that one program serves every batch
        windows = place.batch(np.pad(windows, ((0, missing), (0, 0))))
        weights = place.batch(np.pad(weights, ((0, missing), (0, 0))))
        found, per_window = _program(place.everywhere)(
            apply, dense_apply, params, dense_params, windows, weights
        )
        sums += np.asarray(found, np.float64)
        by_window[at : at + batch] = np.asarray(per_window)[: len(chosen)]
    count, loss, kl, agreed = sums
    out: dict[str, Any] = {
        "perplexity": _perplexity(count, loss),
        "tokens": int(count),
        "ctx": ctx,
    }
    if against is not None:
        out |= {"kl": float(kl / count), "agreement": float(agreed / count)}
    return out | over_slices(by_window, slices, lambda windows: _perplexity(*windows.sum(axis=0)))


def _windows(length: int, ctx: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each window starts, and which of its tokens is the first that counts."""
    if not 0 < stride <= ctx:
        raise InputError(f"stride {stride}: must be between 1 and ctx ({ctx})")
    if ctx < 2 or length < ctx:
        raise InputError(f"text of {length} tokens: at least one window of ctx {ctx} is needed")
    starts = np.arange(0, length - ctx + 1, stride)
    return starts, np.where(starts == 0, 1, ctx - stride if stride < ctx else 1)


def _common_vocabulary(model: Model, against: Model | None, ids: np.ndarray, ctx: int) -> int:
    """Entries of the vocabulary, after a look whether the ids and the dense model fit it."""
    vocab = _vocabulary(model, ctx)
    for one in (ids.min(), ids.max()):
        if not 0 <= one < vocab:
            raise InputError(f"token id {one}: the model's vocabulary has {vocab} entries")
    if against is not None and (size := _vocabulary(against, ctx)) != vocab:
        raise InputError(f"against: a vocabulary of {size} entries, that of the model has {vocab}")
    return vocab


def _perplexity(count: float, loss: float) -> float:
    """Infinite where it is beyond float64."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss / count))


def _vocabulary(model: Model, ctx: int) -> int:
    probe = jax.ShapeDtypeStruct((1, ctx), jnp.int32)
    return int(jax.eval_shape(lifted(model.apply), model.params, probe).shape[-1])


@functools.cache
def _program(everywhere: Any) -> Any:
    return jax.jit(_batch_sums, static_argnums=(0, 1), out_shardings=everywhere)


def _batch_sums(
    apply: Any, dense_apply: Any, params: Any, dense_params: Any, windows: Any, weights: Any
) -> tuple[jax.Array, jax.Array]:
    """Sums over the scored tokens of a batch, and `[batch, 2]` the first two by window.

    The sums are [count, -log p, KL, agreements].
    """
    scored = weights[:, 1:].astype(jnp.float32)
    targets = windows[:, 1:]
    logp = jax.nn.log_softmax(apply(params, windows)[:, :-1].astype(jnp.float32))
    loss = -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    kl = agreed = jnp.zeros_like(loss)
    if dense_apply is not None:
        dense_logits = dense_apply(dense_params, windows)[:, :-1].astype(jnp.float32)
        dense_logp = jax.nn.log_softmax(dense_logits)
        kl = (jnp.exp(dense_logp) * (dense_logp - logp)).sum(-1)
        agreed = (dense_logp.argmax(-1) == logp.argmax(-1)).astype(jnp.float32)
    counted = [x * scored for x in (jnp.ones_like(loss), loss, kl, agreed)]
    sums = jnp.stack([x.sum() for x in counted])
    return sums, jnp.stack([x.sum(-1) for x in counted[:2]], axis=-1)
