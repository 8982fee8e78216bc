"""How far a model's outputs go where one parameter alone is replaced: measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.losses import sum_over_chunks
from jaxcompress.core.model import Blocks, Model
from jaxcompress.core.readers.lift import lift
from jaxcompress.layerwise.pieces import with_leaves
from jaxcompress.progress import progress
from jaxcompress.quantization.candidates import Trials

TOKENS_TOGETHER = 2048  # that pass through a block at a time

# (sum, what it is divided by) of outputs [..., n] and the dense model's
Measure = Callable[[Any, Any], tuple[jax.Array, jax.Array]]


def divergences(
    trials: Trials, inputs: Sequence[np.ndarray], measure: Measure
) -> Iterator[tuple[str, int, float]]:
    """(path, index of the candidate, divergence from the dense model), of every candidate.

    The dense model's hidden state goes from block to block; what is replaced in a block is
    measured from there on, so that half of all passes is saved.

    Args:
      trials: the parameters and their candidates.
      inputs: of the model, `[samples, ...]` each.
      measure: `kl` or `output_error`.

    Raises:
      InputError: outputs that are no logits, where the measure asks for such.
    """
    passes = _Passes(trials.model, inputs, measure)
    by_start: dict[int, list[str]] = {}
    for path in trials.matrices:
        by_start.setdefault(passes.start_of(path), []).append(path)
    order = [(start, path) for start in sorted(by_start) for path in by_start[start]]
    for start, path in progress(order, "sensitivity", unit="matrix"):
        for index, leaf in trials.leaves(path):
            yield path, index, passes.divergence(start, path, leaf)


def kl(outputs: jax.Array, dense: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL(dense || other) over the last axis of logits in nats, summed, and their number."""
    ours, theirs = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (outputs, dense))
    divergence = (jnp.exp(theirs) * (theirs - ours)).sum()
    return divergence, jnp.float32(dense.size // dense.shape[-1])


def output_error(outputs: Any, dense: Any) -> tuple[jax.Array, jax.Array]:
    """Squared error of floating outputs, summed, and the sum of the dense model's squares."""
    error, size = jnp.float32(0), jnp.float32(0)
    for ours, theirs in zip(jax.tree.leaves(outputs), jax.tree.leaves(dense), strict=True):
        if jnp.issubdtype(theirs.dtype, jnp.floating):
            ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
            error += jnp.square(ours - theirs).sum()
            size += jnp.square(theirs).sum()
    return error, size


class _Passes:
    """Passes of calibration data through a model of which one leaf is replaced."""

    def __init__(self, model: Model, inputs: Sequence[np.ndarray], measure: Measure) -> None:
        self.params, self.measure = model.params, measure
        self.walk = model.blocks or _as_head(model)
        self.layers = self.walk.of(model.params) if model.blocks else []
        self.inputs = _chunks(inputs)
        embed = self.walk.embed
        self.embed = lift(lambda params, given: embed(params, *given))
        self.block, self.head = lift(self.walk.block), lift(self.walk.head)
        self.at, self.hidden = 0, _mapped(self.embed, self.params, self.inputs)
        self.last = self._through(self.layers, self.hidden)
        if measure is kl:
            self._check_logits(model)

    def start_of(self, path: str) -> int:
        """The block from which on a replaced leaf counts; -1: from the inputs on."""
        below = path.removeprefix(self.walk.where + "/").split("/")[0]
        is_one = path.startswith(self.walk.where + "/") and below.isdigit()
        return int(below) if self.layers and is_one else -1

    def divergence(self, start: int, path: str, leaf: jax.Array) -> float:
        """By how far the outputs go; ask for the starts in ascending order."""
        params = with_leaves(self.params, {path: leaf})
        if start < 0:
            hidden = _mapped(self.embed, params, self.inputs)
        else:
            self.hidden = self._through(self.layers[self.at : start], self.hidden)
            self.at, hidden = start, self.hidden
        layers = self.walk.of(params) if self.layers else []
        last = self._through(layers[max(start, 0) :], hidden)
        total, size = _compared(self.head, self.measure, params, last, self.params, self.last)
        return float(total / size)

    def _through(self, layers: Sequence[Any], hidden: Any) -> Any:
        for layer in layers:
            hidden = _mapped(self.block, layer, hidden)
        return hidden

    def _check_logits(self, model: Model) -> None:
        one = jax.tree.map(lambda x: x[0], self.last)
        outputs = jax.eval_shape(self.head, self.params, one)
        is_array = hasattr(outputs, "ndim") and jnp.issubdtype(outputs.dtype, jnp.floating)
        if not is_array or not getattr(model.config, "gives_logits", True):
            raise InputError("by kl: the model gives no logits; use by='output_error'")


def _as_head(model: Model) -> Blocks:
    """A walk without blocks: all of the model is the head, its hidden state the inputs."""
    return Blocks(
        embed=lambda params, *inputs: inputs,
        block=lambda params, hidden: hidden,
        head=lambda params, inputs: model.apply(params, *inputs),
    )


@partial(jax.jit, static_argnums=0)
def _mapped(function: Any, params: Any, hidden: Any) -> Any:
    """The function of every chunk of `[chunks, ...]`."""
    return jax.lax.map(lambda chunk: function(params, chunk), hidden)


@partial(jax.jit, static_argnums=(0, 1))
def _compared(
    head: Any, measure: Measure, params: Any, hidden: Any, dense_params: Any, dense_hidden: Any
) -> tuple[jax.Array, jax.Array]:
    """The measure over all chunks; of sequences, with logits of some positions at a time."""

    def of_positions(both: Any, ours: Any, theirs: Any) -> tuple[jax.Array, jax.Array]:
        return measure(head(both[0], ours), head(both[1], theirs))

    def of_chunk(pair: Any) -> tuple[jax.Array, jax.Array]:
        both = params, dense_params
        if hasattr(pair[1], "ndim") and pair[1].ndim == 3:
            return sum_over_chunks(of_positions, both, pair)
        return of_positions(both, *pair)

    return jax.tree.map(jnp.sum, jax.lax.map(of_chunk, (hidden, dense_hidden)))


def _chunks(inputs: Sequence[np.ndarray]) -> tuple[jax.Array, ...]:
    """Inputs `[samples, ...]` as `[chunks, together, ...]`."""
    samples, tokens = len(inputs[0]), inputs[0].shape[1] if inputs[0].ndim == 2 else 1
    most = max(1, min(samples, TOKENS_TOGETHER // max(tokens, 1)))
    together = max(n for n in range(1, most + 1) if samples % n == 0)
    return tuple(jnp.asarray(x.reshape(-1, together, *x.shape[1:])) for x in inputs)
