"""`jax.custom_jvp` and `jax.custom_vjp` meeting a compressed operand: the user's rules hold.

For custom_vjp the user's own forward and backward rules are lifted, so that `g @ w.T` in a
backward rule stays packed and nothing is computed twice. Where their layout is unknown, or a
closed-over constant is differentiated, the gradient is that of the equation on dense arrays.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.extend.core import JaxprEqn

from jaxcompress.core.arrays.base import dense, is_compressed
from jaxcompress.core.readers import unofficial
from jaxcompress.core.readers.observations import Observations
from jaxcompress.core.readers.origins import Origins
from jaxcompress.core.readers.tracing import Static, dense_aval
from jaxcompress.core.readers.unofficial import Body
from jaxcompress.core.readers.walk import Frame


def custom_jvp(
    frame: Frame, eqn: JaxprEqn, operands: list[Any], origins: list[Origins]
) -> list[Any]:
    """The body is lifted; the user's tangent rule runs on dense arrays, recomputed when needed."""
    inner = frame.inner(origins)

    @jax.custom_jvp
    def lifted(*args: Any) -> tuple[list[Any], Observations]:
        outputs, seen = frame.run(Body.of(eqn.params["call_jaxpr"]), args, inner, defer=True)
        return _dense_outputs(frame, eqn, outputs), seen

    @lifted.defjvp
    def tangent(primals: Any, tangents: Any) -> Any:
        out = lifted(*primals)
        rule = jax.checkpoint(lambda *args: unofficial.bind_as_traced(eqn, list(map(dense, args))))
        _, tangent_out = jax.jvp(rule, primals, tangents)
        return out, (tangent_out, jax.tree.map(_zero_tangent, out[1]))

    outputs, seen = lifted(*operands)
    frame.absorb_call(seen, operands, origins)
    return outputs


def custom_vjp(
    frame: Frame, eqn: JaxprEqn, operands: list[Any], origins: list[Origins]
) -> list[Any]:
    """The user's forward and backward rules, lifted."""
    inner = frame.inner(origins)
    consts = eqn.params["num_consts"]
    # Observations of the forward rule could differ in structure from those of the body.
    own_rules = frame.recorder is None and unofficial.has_custom_vjp_rules(eqn)

    def body(*args: Any) -> tuple[list[Any], Observations]:
        outputs, seen = frame.run(Body.of(eqn.params["call_jaxpr"]), args, inner, defer=True)
        return _dense_outputs(frame, eqn, outputs), seen

    lifted = jax.custom_vjp(body)

    def forward(*primals: Any) -> Any:
        values = [_unwrapped(p) for p in primals]
        live = [[bool(leaf.perturbed) for leaf in _primal_leaves(p)] for p in primals]
        if not own_rules or any(map(any, live[:consts])):
            return body(*values), (None, values, Static(live))
        rule = unofficial.custom_vjp_forward(eqn, [any(flags) for flags in live[consts:]])
        outputs, seen = frame.run(rule.body, values[consts:], None)
        own = iter(outputs[: rule.residuals])
        residuals = [next(own) if i is None else values[i] for i in rule.forwarded]
        outputs = _dense_outputs(frame, eqn, outputs[rule.residuals :])
        return (outputs, seen), (residuals, values, Static(live))

    def backward(saved: Any, cotangents: Any) -> Any:
        residuals, values, live = saved[0], saved[1], saved[2].value
        given = [_instantiated(c) for c in cotangents[0]]
        if residuals is None:
            return _dense_gradient(eqn, values, live, given)
        gradients = _lifted_backward(frame, eqn, residuals, given)
        return tuple(
            _pulled_back(value, gradient, flags)
            for value, gradient, flags in zip(
                values, [None] * consts + gradients, live, strict=True
            )
        )

    lifted.defvjp(forward, backward, symbolic_zeros=True)
    outputs, seen = lifted(*operands)
    frame.absorb_call(seen, operands, origins)
    return outputs


def _lifted_backward(
    frame: Frame, eqn: JaxprEqn, residuals: list[Any], cotangents: list[Any]
) -> list[Any]:
    """The user's backward rule, traced on dense shapes and walked: one gradient per operand."""
    given: list[bool] = []  # whether a gradient is an array, and not a symbolic zero

    def rule(*args: Any) -> list[Any]:
        out = unofficial.custom_vjp_backward(eqn, args[: len(residuals)], args[len(residuals) :])
        given[:] = [g is not None for g in out]
        return [g for g, is_given in zip(out, given, strict=True) if is_given]

    args = [*residuals, *cotangents]
    closed = jax.make_jaxpr(rule)(*map(dense_aval, args))
    outputs, _ = frame.walk.run(Body.of(closed), args, None, None)
    it = iter(outputs)
    return [next(it) if is_given else None for is_given in given]


def _pulled_back(value: Any, gradient: Any, live: list[bool]) -> Any:
    """Gradient for each buffer of `value`, given the dense one; None: no gradient."""
    if gradient is None or not any(live):
        leaves, tree = jax.tree.flatten(value)
        return jax.tree.unflatten(tree, [None] * len(leaves))
    if not is_compressed(value):
        return dense(gradient)
    return jax.vjp(dense, value)[1](dense(gradient))[0]


def _dense_gradient(
    eqn: JaxprEqn, values: list[Any], live: list[list[bool]], cotangents: list[Any]
) -> Any:
    """Gradient of the equation as it was traced, with respect to the perturbed buffers only."""
    leaves, tree = jax.tree.flatten(values)
    flags = [flag for group in live for flag in group]
    perturbed = [i for i, flag in enumerate(flags) if flag]

    def equation(moved: list[Any]) -> list[Any]:
        full = list(leaves)
        for i, x in zip(perturbed, moved, strict=True):
            full[i] = x
        return unofficial.bind_as_traced(eqn, list(map(dense, jax.tree.unflatten(tree, full))))

    (gradients,) = jax.vjp(equation, [leaves[i] for i in perturbed])[1](cotangents)
    out: list[Any] = [None] * len(leaves)
    for i, gradient in zip(perturbed, gradients, strict=True):
        out[i] = gradient
    return tuple(jax.tree.unflatten(tree, out))


def _dense_outputs(frame: Frame, eqn: JaxprEqn, outputs: list[Any]) -> list[Any]:
    return [frame.walk.densify(out, eqn, "an output of a custom rule") for out in outputs]


def _primal_leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))


def _unwrapped(tree: Any) -> Any:
    return jax.tree.map(lambda p: p.value, tree, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))


def _instantiated(cotangent: Any) -> Any:
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    if cotangent.dtype == jax.dtypes.float0:
        return np.zeros(cotangent.shape, jax.dtypes.float0)
    return jnp.zeros(cotangent.shape, cotangent.dtype)


def _zero_tangent(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)
