"""Rotary position embeddings with the context extensions that checkpoints name.

RoFormer, Su et al. 2021 (arXiv:2104.09864), in the half-split layout of Llama; frequencies follow
`rope_parameters` of transformers: default, linear, dynamic (NTK), llama3, yarn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.errors import InputError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """The entries of `rope_parameters`; those that a type does not use stay None."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> RopeConfig:
        """Reads `rope_parameters`, or the older `rope_scaling` and `rope_theta`.

        Raises:
          InputError: a type or an option that is not supported.
        """
        given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        rope_type = given.get("rope_type") or given.get("type") or "default"
        if rope_type not in ROPE_TYPES:
            raise InputError(
                f"config: rope_type {rope_type!r} is not supported; use {', '.join(ROPE_TYPES)}"
            )
        partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise InputError(f"config: partial_rotary_factor {partial} is not supported; use 1.0")
        known = {f.name for f in fields(cls)} - {"rope_type", "rope_theta"}
        values = {key: given[key] for key in known if given.get(key) is not None}
        if rope_type in ("llama3", "yarn"):
            pretrained = config.get("original_max_position_embeddings")
            if pretrained is not None:
                values["original_max_position_embeddings"] = pretrained
            values.setdefault(
                "original_max_position_embeddings", config.get("max_position_embeddings", 2048)
            )
        needed = {"llama3": ("factor", "low_freq_factor", "high_freq_factor"), "default": ()}
        for key in needed.get(rope_type, ("factor",)):
            if key not in values:
                raise InputError(f"config: rope_type {rope_type!r} needs {key!r}")
        theta = given.get("rope_theta") or config.get("rope_theta") or 10000.0
        return cls(rope_type=rope_type, rope_theta=float(theta), **values)

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` entry."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}


def rotary_tables(
    rope: RopeConfig, head_dim: int, positions: Array, max_positions: int
) -> tuple[Array, Array]:
    """Cosine and sine, `[seq, head_dim / 2]` float32, at `positions` `[seq]`.

    `max_positions` is the context length that the config names; "dynamic" stretches the base
    once the last position exceeds it.
    """
    powers = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    if rope.rope_type == "dynamic":
        frequencies, attention_factor = _dynamic(rope, head_dim, powers, positions, max_positions)
    else:
        inverse = 1.0 / (np.float32(rope.rope_theta) ** powers)
        attention_factor = 1.0
        if rope.rope_type == "linear":
            inverse = inverse / np.float32(rope.factor)
        elif rope.rope_type == "llama3":
            inverse = _llama3(rope, inverse)
        elif rope.rope_type == "yarn":
            inverse, attention_factor = _yarn(rope, head_dim, inverse)
        frequencies = jnp.asarray(inverse, jnp.float32)
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates `x` `[batch, seq, heads, head_dim]`; the pairs are (i, i + head_dim / 2)."""
    first, second = jnp.split(x, 2, axis=-1)
    cos = cos[:, None, :].astype(x.dtype)
    sin = sin[:, None, :].astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _dynamic(
    rope: RopeConfig, head_dim: int, powers: np.ndarray, positions: Array, max_positions: int
) -> tuple[Array, float]:
    """NTK-aware base that grows with the sequence, as transformers computes it."""
    assert rope.factor is not None
    length = jnp.maximum(positions[-1] + 1, max_positions).astype(jnp.float32)
    stretch = rope.factor * length / max_positions - (rope.factor - 1)
    base = rope.rope_theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / base**powers, 1.0


def _llama3(rope: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    """Long wavelengths divided by `factor`, short ones kept, smooth between (Llama 3.1)."""
    assert rope.original_max_position_embeddings is not None
    assert rope.low_freq_factor is not None
    assert rope.high_freq_factor is not None
    assert rope.factor is not None
    context = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inverse
    smooth = (context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * inverse / rope.factor + smooth * inverse
    long = wavelength > context / rope.low_freq_factor
    short = wavelength < context / rope.high_freq_factor
    return np.where(long, inverse / rope.factor, np.where(short, inverse, between))


def _yarn(rope: RopeConfig, head_dim: int, inverse: np.ndarray) -> tuple[np.ndarray, float]:
    """YaRN, Peng et al. 2023 (arXiv:2309.00071), section 3.2, and its temperature 3.4."""
    assert rope.original_max_position_embeddings is not None
    assert rope.factor is not None
    context = rope.original_max_position_embeddings

    def correction_dim(rotations: float) -> float:
        turns = context / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.rope_theta))

    def temperature(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    low, high = correction_dim(rope.beta_fast or 32), correction_dim(rope.beta_slow or 1)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    blended = inverse / rope.factor * ramp + inverse * (1 - ramp)
    factor = rope.attention_factor
    if factor is None and rope.mscale and rope.mscale_all_dim:
        factor = temperature(rope.factor, rope.mscale) / temperature(
            rope.factor, rope.mscale_all_dim
        )
    return blended, temperature(rope.factor) if factor is None else factor
