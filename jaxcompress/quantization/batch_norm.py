"""Batch norms folded into the convolutions before them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array, is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.models import ConvNetConfig, name_map_of

NORM = ("params/{}/scale", "params/{}/bias", "batch_stats/{}/mean", "batch_stats/{}/var")


def fold_batch_norm(model: Model) -> Model:
    """A convolutional network whose batch norms only add a bias; it computes the same.

    With its running statistics a norm is y = (x - mean) * c + bias, c = scale / sqrt(var + eps):
    the kernel before it takes c, per output channel, and the norm becomes y = x + bias', so that
    what is rounded is what an integer convolution multiplies. Source: Jacob et al.,
    arXiv:1712.05877, section 3.2. A network that trains on keeps its running statistics
    (`batch_norm="running"` of a stage); statistics of batches would undo the folding.

    Args:
      model: a convolutional reference model (ResNet, VGG, MobileNet), not compressed yet.

    Raises:
      InputError: another model, or a kernel that is compressed.
    """
    if not isinstance(model.config, ConvNetConfig):
        raise InputError("fold_batch_norm: only a convolutional reference model has these norms")
    leaves = dict(leaves_with_paths(model.params))
    epsilon = model.config.batch_norm_epsilon
    changed: dict[str, Array] = {}
    for conv, norm in _pairs(model.config):
        kernel, bias = f"{conv}/kernel", f"{conv}/bias"
        if is_compressed(leaves[kernel]):
            name = type(leaves[kernel]).__name__
            raise InputError(f"{kernel}: is stored as {name}; fold batch norms before")
        names = [name.format(norm) for name in NORM]
        before = leaves.get(bias)
        made = _folded(leaves[kernel], before, [leaves[name] for name in names], epsilon)
        changed |= dict(zip([kernel, *names], made, strict=True))
        if before is not None:
            changed[bias] = jnp.zeros_like(before)
    params = map_with_paths(lambda path, leaf: changed.get(path, leaf), model.params)
    return model.replace(params=params)


def _pairs(config: Any) -> list[tuple[str, str]]:
    """Paths of each convolution and of the norm that follows it: neighbours in the name map."""
    pairs, conv = [], None
    for row in name_map_of(config).of_kind("conv", "norm"):
        if row.kind == "conv":
            conv = row.path.removesuffix("/kernel")
        elif conv is not None and row.path.endswith("/scale"):
            pairs.append((conv, row.path.removeprefix("params/").removesuffix("/scale")))
            conv = None
    return pairs


@jax.jit
def _folded(kernel: Array, bias: Array | None, norm: list[Array], epsilon: float) -> list[Array]:
    """The kernel `[h, w, in, out]`, and scale, bias, mean and variance of its norm."""
    scale, shift, mean, var = (x.astype(jnp.float32) for x in norm)
    factor = scale * jax.lax.rsqrt(var + epsilon)
    start = 0 if bias is None else bias.astype(jnp.float32)
    made = [
        kernel.astype(jnp.float32) * factor,
        jnp.ones_like(scale),
        shift + (start - mean) * factor,
        jnp.zeros_like(mean),
        jnp.full_like(var, 1 - epsilon),
    ]
    return [x.astype(like.dtype) for x, like in zip(made, [kernel, *norm], strict=True)]
