"""Every fact about JAX that its documentation does not promise, in this one file.

The readers use public functions, and besides: the names of primitives, the layout of
`eqn.params`, `eqn.ctx.manager` and `Primitive.get_bind_params`. `PARAMS` lists the layouts; a test
compares it with the installed JAX, so that a new version is noticed before a user notices it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Number
from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.interpreters import ad, partial_eval

KNOWN_BELOW = (0, 12)  # the first JAX version that these facts were not checked against

# The params that the readers rely on, by primitive; there may be others, listed in `ALSO`.
PARAMS: dict[str, frozenset[str]] = {
    name: frozenset(params.split())
    for name, params in {
        "jit": "jaxpr donated_invars in_shardings out_shardings name keep_unused inline "
        "compiler_options_kvs",
        "closed_call": "call_jaxpr",
        "remat2": "jaxpr policy prevent_cse differentiated",
        "custom_jvp_call": "call_jaxpr num_consts jvp_jaxpr_fun symbolic_zeros",
        "custom_vjp_call": "call_jaxpr num_consts fwd_jaxpr_thunk bwd out_trees symbolic_zeros",
        "custom_vmap_call": "call rule in_tree out_tree",
        "scan": "jaxpr length reverse unroll",
        "while": "cond_jaxpr body_jaxpr cond_nconsts body_nconsts",
        "cond": "branches",
        "shard_map": "jaxpr mesh in_specs out_specs check_vma newly_manual_axes",
        "dot_general": "dimension_numbers precision preferred_element_type out_sharding",
        "conv_general_dilated": "window_strides padding lhs_dilation rhs_dilation "
        "dimension_numbers feature_group_count batch_group_count precision "
        "preferred_element_type",
        "gather": "dimension_numbers slice_sizes mode fill_value",
        "scatter": "dimension_numbers mode indices_are_sorted unique_indices update_jaxpr",
        "transpose": "permutation",
        "reshape": "new_sizes dimensions sharding",
        "broadcast_in_dim": "shape broadcast_dimensions sharding",
        "convert_element_type": "new_dtype weak_type sharding",
        "squeeze": "dimensions",
        "slice": "start_indices limit_indices strides",
        "split": "sizes axis",
        "dynamic_slice": "slice_sizes",
        "concatenate": "dimension",
        "stack": "axis",
        "name": "name",
        "sharding_constraint": "sharding",
        "all_gather": "all_gather_dimension axis_name tiled axis_index_groups",
    }.items()
}

REMAT = ("remat2", "checkpoint", "remat")
JIT = ("jit", "pjit")
CALL = ("closed_call", "core_call")

# Primitives of one operand that mean the same for every buffer of a compressed array.
BUFFERWISE = (
    "copy",
    "copy_p",
    "device_put",
    "name",
    "pcast",
    "pvary",
    "reduced_vary_cast",
    "stop_gradient",
)


@functools.cache
def warn_if_unknown() -> None:
    """Warn, once, of a JAX version that this file was not checked against."""
    if jax.__version_info__[:2] >= KNOWN_BELOW:
        warnings.warn(
            f"jaxcompress reads jaxprs as JAX below {'.'.join(map(str, KNOWN_BELOW))} writes them; "
            f"this is JAX {jax.__version__}: compare a lifted function with the dense one first",
            stacklevel=3,
        )


def bind_as_traced(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Apply the primitive of `eqn` to `values` with every parameter as it was traced.

    Remat policies, donation, names, shardings and effects are kept.
    """
    primitive = eqn.primitive
    out = primitive.bind(*values, **primitive.get_bind_params(eqn.params))
    return list(out) if primitive.multiple_results else [out]


@contextmanager
def context_of(eqn: JaxprEqn) -> Iterator[None]:
    """The context `eqn` was traced in: mesh, compute type, name stack and source line."""
    info = eqn.source_info
    names = source_info_util.current_name_stack() + info.name_stack
    with (
        source_info_util.user_context(info.traceback, name_stack=names),
        eqn.ctx.manager,
    ):
        yield


def source_line(eqn: JaxprEqn) -> str:
    """`file.py:12:3 (function)` of the user's line that made `eqn`."""
    return source_info_util.summarize(eqn.source_info)


def aval(atom: Any) -> Any:
    """Shape and dtype of an operand or output of an equation."""
    return atom.aval


def literal(atom: Any) -> bool:
    """Whether an operand of an equation is a literal (its value is `atom.val`)."""
    return isinstance(atom, Literal)


@dataclass(frozen=True, eq=False)
class Body:
    """A jaxpr and the values of its constants."""

    jaxpr: Jaxpr
    consts: Sequence[Any] = ()

    @classmethod
    def of(cls, jaxpr: ClosedJaxpr | Jaxpr) -> Body:
        """From an open or a closed jaxpr."""
        if isinstance(jaxpr, ClosedJaxpr):
            return cls(jaxpr.jaxpr, jaxpr.consts)
        return cls(jaxpr)


def given_shardings(shardings: Sequence[Any]) -> list[Any]:
    """Shardings of a jit, None where unspecified."""
    return [None if type(s).__name__ == "UnspecifiedValue" else s for s in shardings]


def remat(eqn: JaxprEqn, closed: ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
    """Bind the remat equation `eqn` with another body.

    `jax.checkpoint` would lose `differentiated=True`, which stands in a gradient's jaxpr.
    """
    old = closed.jaxpr
    jaxpr = old.replace(
        constvars=[],
        invars=[*old.constvars, *old.invars],
        debug_info=old.debug_info.with_unknown_names(),
    )
    return eqn.primitive.bind(*closed.consts, *values, **{**eqn.params, "jaxpr": jaxpr})


def body_of_call(eqn: JaxprEqn) -> Body | None:
    """What a `jit` without shardings, a `jax.checkpoint` or a plain call computes; else None."""
    p, name = eqn.params, eqn.primitive.name
    if name not in (*JIT, *CALL, *REMAT):
        return None
    placed = [*p.get("in_shardings", ()), *p.get("out_shardings", ())]
    if any(sharding is not None for sharding in given_shardings(placed)):
        return None
    return Body.of(p.get("call_jaxpr") or p["jaxpr"])


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers of constants and of carries of a scan, by the params of its equation."""
    if "ft_in" in params:  # JAX 0.11: trees of (constants, carries, scanned)
        consts, carries, _ = params["ft_in"].unpack()
        return len(list(consts)), len(list(carries))
    return params["num_consts"], params["num_carry"]


def platforms_of(eqn: JaxprEqn) -> Sequence[Sequence[str] | None] | None:
    """Platforms of each branch of a `platform_dependent` cond (None: the default), or None."""
    return eqn.params.get("branches_platforms")


@dataclass(frozen=True, eq=False)
class ForwardRule:
    """A custom_vjp's own forward rule, traced: outputs are `[*residuals, *outputs]`."""

    body: Body
    forwarded: Sequence[int | None]  # by residual: the operand that it is, or None
    residuals: int  # outputs of `body` that are residuals


def has_custom_vjp_rules(eqn: JaxprEqn) -> bool:
    """Whether the user's own rules can be found in a custom_vjp equation."""
    return {"fwd_jaxpr_thunk", "bwd", "out_trees"} <= set(eqn.params)


def custom_vjp_forward(eqn: JaxprEqn, perturbed: Sequence[bool]) -> ForwardRule:
    """The forward rule of a custom_vjp equation, for operands (constants left out) `perturbed`."""
    jaxpr, consts = eqn.params["fwd_jaxpr_thunk"].call_wrapped(*perturbed)
    _, residual_tree, forwarded = eqn.params["out_trees"]()
    count = residual_tree.num_leaves - sum(i is not None for i in forwarded)
    return ForwardRule(Body(jaxpr, consts), forwarded, count)


def custom_vjp_backward(
    eqn: JaxprEqn, residuals: Sequence[Any], cotangents: Sequence[Any]
) -> list[Any]:
    """Call the backward rule of a custom_vjp equation.

    Returns:
      For each operand that is not a constant, its cotangent, or None: zero.

    Raises:
      TypeError: the rule returns something that this version of the readers does not know. A
        wrong guess here would be a wrong gradient.
    """
    out = eqn.params["bwd"].call_wrapped(*residuals, *cotangents)
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], list):
        out = out[0]  # JAX 0.11: (cotangents, logs)
    known = all(isinstance(g, (ad.Zero, Number)) or hasattr(g, "dtype") for g in out)
    if not known or len(out) != len(eqn.invars) - eqn.params["num_consts"]:
        raise TypeError(
            f"custom_vjp: the backward rule returned {out} for {len(eqn.invars)} operands, which "
            f"these readers cannot interpret under JAX {jax.__version__}"
        )
    return [None if isinstance(g, ad.Zero) else g for g in out]


def without_dead_equations(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same function of the same arguments, without equations whose results nothing uses."""
    used = [True] * len(closed.jaxpr.outvars)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, used, instantiate=True)
    return ClosedJaxpr(jaxpr, closed.consts)


def excerpt(
    closed: ClosedJaxpr, invars: Sequence[Any], eqns: Sequence[JaxprEqn], outvars: Sequence[Any]
) -> ClosedJaxpr:
    """Those of some equations of a program that give `outvars`, as a function of `invars`."""
    part = closed.jaxpr.replace(
        invars=list(invars),
        eqns=list(eqns),
        outvars=list(outvars),
        debug_info=closed.jaxpr.debug_info.with_unknown_names(),
    )
    return without_dead_equations(ClosedJaxpr(part, closed.consts))
