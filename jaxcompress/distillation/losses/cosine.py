"""One minus the cosine of the angle between two outputs."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def cosine(student: Array, teacher: Array) -> Array:
    """1 - cos(student, teacher): only the directions are compared, as of embeddings.

    The mean over all rows is `torch.nn.functional.cosine_embedding_loss` of like pairs; each is
    half the squared difference of both scaled to unit length.

    Source: Sanh et al., "DistilBERT", arXiv:1910.01108, section 3 (of hidden states); of sentence
    embeddings: Reimers and Gurevych, arXiv:2004.09813, section 2, whose squared difference this
    is for embeddings of unit length.

    Args:
      student: embeddings `[..., d]`.
      teacher: embeddings `[..., d]`.

    Returns:
      `[...]` from 0 to 2, in float32 or wider.
    """
    dtype = jnp.promote_types(student.dtype, jnp.float32)
    ours, theirs = (_unit(x.astype(dtype)) for x in (student, teacher))
    return jnp.square(ours - theirs).sum(-1) / 2


def _unit(x: Array) -> Array:
    # Under the root: the norm itself has no gradient at 0.
    square = jnp.square(x).sum(-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, jnp.finfo(x.dtype).tiny))
