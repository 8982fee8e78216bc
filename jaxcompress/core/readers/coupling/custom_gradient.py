"""`jax.custom_vjp` in a cut function: the user's own gradient, at smaller shapes.

Both rules are traced at full shapes. Where no size is written into them (a rounding, a product)
they run on smaller arrays as they stand. Otherwise there is no gradient, which is said when one is
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxcompress.core.errors import InputError
from jaxcompress.core.readers import unofficial

from .rules import ELEMENTWISE, REDUCTIONS
from .trace import CALLS, body_of

# Primitives whose parameters hold no size.
_SIZELESS = ELEMENTWISE | REDUCTIONS | {"concatenate", "dot_general", "squeeze", "transpose"}
_REFUSED = (
    "a rule of a jax.custom_vjp has sizes written into it, so the gradient of the cut "
    "function is not known; pass make=, the function of the smaller network"
)


def with_own_gradient(
    equation: jex.JaxprEqn, body: Callable[..., list[Any]]
) -> Callable[..., list[Any]]:
    """`body`, the cut evaluation of a custom_vjp call, with the gradient that the user gave it.

    Raises:
        InputError: when differentiated, if a rule cannot run at other shapes.
    """

    def forward(*primals: Any) -> Any:
        if equation.params["num_consts"] or not unofficial.has_custom_vjp_rules(equation):
            raise InputError(_REFUSED)
        rule = _forward_rule(equation)
        out = _run(rule.body.jaxpr, rule.body.consts, primals)
        own = iter(out[: rule.residuals])
        residuals = [next(own) if i is None else primals[i] for i in rule.forwarded]
        return tuple(out[rule.residuals :]), (residuals, primals)

    def backward(saved: Any, cotangents: Any) -> Any:
        residuals, primals = saved
        closed, given = _backward_rule(equation)
        out = iter(_run(closed.jaxpr, closed.consts, [*residuals, *cotangents]))
        gradients = [next(out) if there else None for there in given]
        return tuple(_cotangent(g, primal) for g, primal in zip(gradients, primals, strict=True))

    function = jax.custom_vjp(lambda *args: tuple(body(*args)))
    function.defvjp(forward, backward)
    return lambda *args: list(function(*args))


def _forward_rule(equation: jex.JaxprEqn) -> unofficial.ForwardRule:
    return unofficial.custom_vjp_forward(equation, [True] * len(equation.invars))


def _backward_rule(equation: jex.JaxprEqn) -> tuple[jex.ClosedJaxpr, list[bool]]:
    """The backward rule at full shapes, and which operands it gives a gradient."""
    rule = _forward_rule(equation)
    own = iter(rule.body.jaxpr.outvars)
    residuals = [next(own) if i is None else equation.invars[i] for i in rule.forwarded]
    given: list[bool] = []

    def backward(*args: Any) -> list[Any]:
        split = len(residuals)
        out = unofficial.custom_vjp_backward(equation, args[:split], args[split:])
        given[:] = [hasattr(g, "dtype") for g in out]
        return [g for g, there in zip(out, given) if there]

    avals: list[Any] = [atom.aval for atom in (*residuals, *equation.outvars)]
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    return jax.make_jaxpr(backward)(*shapes), given


def _cotangent(gradient: Any, primal: Any) -> Any:
    if not jnp.issubdtype(primal.dtype, np.inexact):
        return np.zeros(primal.shape, jax.dtypes.float0)
    return jnp.zeros_like(primal) if gradient is None else gradient


def _run(jaxpr: jex.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr without sizes in it on arrays of other shapes."""
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments]))
    if any(np.ndim(const) for const in consts):
        raise InputError(_REFUSED)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else known[atom]

    for equation in jaxpr.eqns:
        operands = list(map(read, equation.invars))
        name = equation.primitive.name
        if name in CALLS:
            results = _run(*body_of(equation.params[CALLS[name]]), operands)
        elif name in _SIZELESS:
            results = unofficial.bind_as_traced(equation, operands)
        else:
            raise InputError(_REFUSED)
        known.update(zip(equation.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))
