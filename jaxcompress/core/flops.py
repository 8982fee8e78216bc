"""Floating point operations of a function, read off its jaxpr: matrix products and convolutions.

A multiplication and an addition count 2, as in `torch.utils.flop_counter`. Everything else
(norms, softmax, activations) is left out, as is usual: it is of lower order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
from jax.extend.core import Jaxpr, JaxprEqn

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers import unofficial
from jaxcompress.core.readers.origins import VIEWS
from jaxcompress.core.readers.tracing import Tracer, is_array

# Of a value made of parameters and constants alone, the share of entries that are not zero (an
# upper bound); None: it depends on the inputs.
Share = float | None

# Functions of one array that leave its zeros where they are.
KEEP_ZEROS = frozenset(VIEWS) | {
    "abs",
    "all_gather",
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "name",
    "neg",
    "optimization_barrier",
    "pcast",
    "pvary",
    "reduce_precision",
    "sharding_constraint",
    "stop_gradient",
}


class Flops(NamedTuple):
    """Operations of one call.

    Attributes:
      total: as a dense computation.
      nonzero: those of products with a parameter times its share of non-zeros: what hardware that
        skips zeros would do.
    """

    total: int
    nonzero: float


def flops(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    shares: Mapping[str, float] | None = None,
) -> Flops:
    """Operations of `fn(params, *inputs)`; nothing is computed.

    The bodies of scans count once a step, nested functions where they are called, those of a
    `shard_map` once a device. Of a `cond` the branch with the most operations counts; a `while`,
    whose steps no one knows beforehand, counts as one step; a Pallas kernel as its
    `cost_estimate` says, or nothing. Products with padding count, as the definition of a
    convolution has them.

    Args:
      fn: any JAX function whose first argument is a pytree of parameters.
      params: parameters; leaves may be compressed, or `jax.ShapeDtypeStruct`s.
      inputs: the other arguments, arrays or `jax.ShapeDtypeStruct`s.
      shares: by path, the share of a parameter's entries that are not zero; absent: 1. What is
        made of parameters keeps it through views and products with other weights (masks).
    """
    traced = Tracer(fn, Counter())((params, *inputs), {})
    paths = [path for path, leaf in leaves_with_paths(params) if is_array(leaf)]
    given: list[Share] = [(shares or {}).get(path, 1.0) for path in paths]
    given += [None] * (len(traced.values) - len(paths))
    return _body(traced.closed.jaxpr, given)[0]


def flops_of_jaxpr(jaxpr: Jaxpr) -> int:
    """Operations of a jaxpr, as `flops` counts those of a function."""
    return _body(jaxpr, [None] * len(jaxpr.invars))[0].total


def _body(jaxpr: Jaxpr, given: Sequence[Share]) -> tuple[Flops, list[Share]]:
    """Operations of a body, and the shares of its outputs, given those of its inputs."""
    shares: dict[Any, Share] = dict.fromkeys(jaxpr.constvars, 1.0)
    shares.update(zip(jaxpr.invars, given, strict=True))

    def of(atom: Any) -> Share:
        return 1.0 if unofficial.literal(atom) else shares[atom]

    total, nonzero = 0, 0.0
    for eqn in jaxpr.eqns:
        found, outputs = _equation(eqn, [of(atom) for atom in eqn.invars])
        total, nonzero = total + found.total, nonzero + found.nonzero
        shares.update(zip(eqn.outvars, outputs, strict=True))
    return Flops(total, nonzero), [of(atom) for atom in jaxpr.outvars]


def _equation(eqn: JaxprEqn, operands: list[Share]) -> tuple[Flops, list[Share]]:
    """The same for one equation."""
    name = eqn.primitive.name
    outputs = [_through(eqn, operands)] * len(eqn.outvars)
    if name in PRODUCTS:
        total = PRODUCTS[name](eqn)
        # Of two weights, the product skips at least the zeros of the sparser one.
        share = min((s for s in operands if s is not None), default=1.0)
        return Flops(total, total * share), outputs
    if name == "pallas_call":
        estimate = eqn.params.get("cost_estimate")
        count = estimate.flops if estimate else 0
        return Flops(count, count), outputs
    unknown: list[Share] = [None] * len(eqn.outvars)
    if name == "scan":
        consts, carries = unofficial.scan_counts(eqn.params)
        operands[consts : consts + carries] = [None] * carries  # other values after a step
        return _times(_inner(eqn.params["jaxpr"], operands), eqn.params["length"]), unknown
    if name == "while":
        return _while(eqn, operands), unknown
    if name == "cond":
        branches = [_inner(branch, operands[1:]) for branch in eqn.params["branches"]]
        return max(branches, key=lambda found: found.total), unknown
    if name == "shard_map":
        mesh = eqn.params["mesh"]
        devices = math.prod(mesh.shape[axis] for axis in eqn.params["newly_manual_axes"])
        return _times(_inner(eqn.params["jaxpr"], operands), devices), unknown
    bodies = list(jex.jaxprs_in_params(eqn.params))
    if len(bodies) == 1:  # jit, remat, custom_jvp, custom_vjp, ...: a call
        inner = getattr(bodies[0], "jaxpr", bodies[0])
        if len(inner.invars) == len(operands) and len(inner.outvars) == len(eqn.outvars):
            return _body(inner, operands)
    return _plus(*(_inner(body, None) for body in bodies)), outputs


def _inner(jaxpr: Any, operands: Sequence[Share] | None) -> Flops:
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return _body(inner, [None] * len(inner.invars) if operands is None else operands)[0]


def _while(eqn: JaxprEqn, operands: list[Share]) -> Flops:
    test, step = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carries: list[Share] = [None] * (len(operands) - test - step)
    body = _inner(eqn.params["body_jaxpr"], operands[test : test + step] + carries)
    return _plus(body, _inner(eqn.params["cond_jaxpr"], operands[:test] + carries))


def _through(eqn: JaxprEqn, operands: Sequence[Share]) -> Share:
    """The share of what an equation makes of its operands."""
    name = eqn.primitive.name
    if name == "dynamic_slice":
        return operands[0]  # a matrix picked by an input, an expert, is still a weight
    known = [share for share in operands if share is not None]
    if len(known) < len(operands):
        return None
    if name == "mul":
        return min(known)
    if name == "concatenate":
        sizes = [unofficial.aval(atom).size for atom in eqn.invars]
        return sum(a * b for a, b in zip(known, sizes, strict=True)) / max(sum(sizes), 1)
    return known[0] if name in KEEP_ZEROS or name == "div" else 1.0


def _plus(*found: Flops) -> Flops:
    return Flops(sum(f.total for f in found), sum((f.nonzero for f in found), 0.0))


def _times(found: Flops, times: int) -> Flops:
    return Flops(found.total * times, found.nonzero * times)


def _dot_general(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = unofficial.aval(eqn.invars[0]).shape
    return 2 * unofficial.aval(eqn.outvars[0]).size * math.prod(shape[i] for i in contracted)


def _convolution(eqn: JaxprEqn) -> int:
    """Each output sums over the kernel's inputs and window; a dilated input has no new products."""
    p = eqn.params
    spec = p["dimension_numbers"]
    kernel = unofficial.aval(eqn.invars[1]).shape
    of_one_output = math.prod(kernel) // kernel[spec.rhs_spec[0]]
    out = unofficial.aval(eqn.outvars[0]).shape
    places = [out[i] for i in spec.out_spec[2:]]
    if any(d > 1 for d in p["lhs_dilation"]):  # a transposed convolution
        places = [unofficial.aval(eqn.invars[0]).shape[i] for i in spec.lhs_spec[2:]]
    batch, channels = (out[i] for i in spec.out_spec[:2])
    return 2 * batch * channels * math.prod(places) * of_one_output


def _quantized_product(eqn: JaxprEqn) -> int:
    """`[..., M, K]` by K x N packed weights."""
    return 2 * unofficial.aval(eqn.outvars[0]).size * unofficial.aval(eqn.invars[0]).shape[-1]


def _scale_gradient(eqn: JaxprEqn) -> int:
    """`[..., M, N]` by `[..., M, K]`, of which the scales' gradient is made."""
    return 2 * unofficial.aval(eqn.invars[0]).size * unofficial.aval(eqn.invars[1]).shape[-1]


PRODUCTS: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "wna16_product": _quantized_product,
    "wna16_scale_gradient": _scale_gradient,
}
