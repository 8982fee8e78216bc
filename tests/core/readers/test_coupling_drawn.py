"""Drawn small networks: masking a group is removing it, and every derived symmetry holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jax import lax
from zoo import layer_norm, rms_norm

from jaxcompress.core.readers.coupling import coupling, verify

SIZES = (8, 12, 16)


class Builder:
    """Draws instructions on a pool of `[batch, n]` values, and their parameters."""

    def __init__(self, draw: Any):
        self.draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 2**20)))
        self.params: dict[str, Any] = {}
        self.program: list[tuple[Any, ...]] = []
        self.sizes = [6]

    def parameter(self, *shape: int) -> str:
        name = f"p{len(self.params)}"
        scale = np.sqrt(shape[-2]) if len(shape) > 1 else 1
        self.params[name] = jnp.asarray(self.rng.standard_normal(shape) / scale, jnp.float32)
        return name

    def add(self, op: str, size: int, *arguments: Any) -> int:
        self.program.append((op, *arguments))
        self.sizes.append(size)
        return len(self.sizes) - 1

    def dense(self, i: int, size: int, bias: bool) -> int:
        kernel = self.parameter(self.sizes[i], size)
        return self.add("dense", size, i, kernel, self.parameter(size) if bias else None)

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def instruction(self) -> None:
        i = self.draw(st.integers(1, len(self.sizes) - 1))
        n = self.sizes[i]
        same = [j for j in range(1, len(self.sizes)) if self.sizes[j] == n]
        op = self.pick(*OPS.split())
        if op == "dense":
            self.dense(i, self.pick(*SIZES), self.pick(False, True))
        elif op in ("add", "mul"):
            self.add(op, n, i, self.pick(*same))
        elif op == "cat":
            j = self.draw(st.integers(1, len(self.sizes) - 1))
            self.add(op, n + self.sizes[j], i, j)
        elif op in ("rms", "gain"):
            self.add(op, n, i, self.parameter(n))
        elif op == "ln":
            self.add(op, n, i, self.parameter(n), self.parameter(n))
        elif op in ("relu", "gelu", "softmax", "square", "row_max", "row_pad"):
            self.add(op, n, i)
        elif op == "scan":
            self.add(op, n, i, self.parameter(3, n, 8), self.parameter(3, 8, n))
        elif op == "residual":
            hidden = self.add("relu", 8, self.dense(i, 8, True))
            self.add("add", n, i, self.dense(hidden, n, False))
        elif op == "glu":
            gate = self.add("gelu", 12, self.dense(i, 12, False))
            both = self.add("mul", 12, gate, self.dense(i, 12, False))
            self.dense(both, n, True)
        elif op == "slice" and n >= 8:
            self.add(op, n - 4, i, 2, n - 2)
        elif n <= 12 and op == "tile":
            self.add(op, 2 * n, i)
        elif n <= 12 and op == "outer":
            self.add(op, n, i, self.pick(*same))
        elif op == "tie":
            fitting = [k for k, v in self.params.items() if v.ndim == 2 and v.shape[0] == n]
            if fitting:
                kernel = self.pick(*fitting)
                self.add("dense", self.params[kernel].shape[1], i, kernel, None)
        elif n % 4 == 0:
            self.blocks(op, i, n, same)

    def blocks(self, op: str, i: int, n: int, same: list[int]) -> None:
        """Instructions on an axis that is a multiple of 4."""
        if op in ("split", "stride"):
            self.add(op, n // 2, i)
        elif op == "swap":
            self.add(op, n, i)
        elif op == "heads":
            self.add(op, n // 4 * 6, i, n // 4, 4, self.parameter(n // 4, 4, 6))
        elif op == "attention":
            self.add(op, n, i, self.pick(*same), 4)


OPS = """
dense dense relu gelu add mul cat split swap rms ln heads residual softmax gain slice scan stride
glu attention tile tie square outer row_max row_pad
"""


def apply(op: str, v: list[Any], p: dict[str, Any], i: int, *a: Any) -> Any:
    """One instruction."""
    y = v[i]
    if op == "dense":
        return y @ p[a[0]] + (p[a[1]] if a[1] else 0)
    if op in ("rms", "gain"):
        return rms_norm(y, p[a[0]]) if op == "rms" else y * p[a[0]]
    if op == "ln":
        return layer_norm(y, {"g": p[a[0]], "b": p[a[1]]})
    if op == "heads":
        blocks = jnp.einsum("bhi,hio->bho", y.reshape(y.shape[0], a[0], a[1]), p[a[2]])
        return blocks.reshape(y.shape[0], -1)
    if op == "attention":
        q, k = (t.reshape(t.shape[0], -1, a[1]) for t in (y, v[a[0]]))
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->qhk", q, k))
        return jnp.einsum("qhk,khd->qhd", weights, q).reshape(y.shape)
    if op == "scan":

        def step(c, w):
            return c + jnp.tanh(c @ w[0]) @ w[1], None

        return lax.scan(step, y, (p[a[0]], p[a[1]]))[0]
    if op in ("split", "swap"):
        left, right = jnp.split(y, 2, -1)
        if op == "split":
            return left * jax.nn.sigmoid(right)
        return y + jnp.concatenate([-right, left], -1)
    simple = {
        "relu": lambda: jax.nn.relu(y),
        "gelu": lambda: jax.nn.gelu(y),
        "square": lambda: y * y * 0.3,
        "softmax": lambda: jax.nn.softmax(y) * 3,
        "add": lambda: y + v[a[0]],
        "mul": lambda: y * v[a[0]],
        "cat": lambda: jnp.concatenate([y, v[a[0]]], -1),
        "slice": lambda: y[:, a[0] : a[1]],
        "stride": lambda: y[:, ::2] - y[:, 1::2],
        "tile": lambda: jnp.repeat(y[:, None], 2, 1).reshape(y.shape[0], -1),
        "outer": lambda: jnp.einsum("bi,bj,bj->bi", y, v[a[0]], y),
        "row_max": lambda: y - y.max(0, keepdims=True),
        "row_pad": lambda: jnp.pad(y, ((0, 1), (0, 0)), constant_values=0.5)[:3],
    }
    return simple[op]()


@st.composite
def networks(draw: Any) -> Any:
    """(function, parameters, input, instructions)"""
    builder = Builder(draw)
    builder.dense(0, draw(st.sampled_from(SIZES[:2])), True)
    for _ in range(draw(st.integers(2, 6))):
        builder.instruction()
    last = len(builder.sizes) - 1
    outs = sorted({last, draw(st.integers(1, last))})
    heads = [(o, builder.parameter(builder.sizes[o], 2)) for o in outs]

    def fn(p, x):
        values = [x]
        for op, *arguments in builder.program:
            values.append(apply(op, values, p, *arguments))
        return sum(values[o] @ p[k] for o, k in heads)

    x = jnp.asarray(builder.rng.standard_normal((3, 6)), jnp.float32)
    return fn, builder.params, x, builder.program


def check(network):
    fn, params, x, _ = network
    y = np.asarray(jax.jit(fn)(params, x))
    assume(np.isfinite(y).all() and np.abs(y).max() <= 1e4)
    verify(coupling(fn)(params, x), params, x, tolerance=5e-3)


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=10, **QUIET)
@given(networks())
def test_drawn_networks(network):
    check(network)


@pytest.mark.slow
@settings(max_examples=300, **QUIET)
@given(networks())
def test_many_drawn_networks(network):
    check(network)
