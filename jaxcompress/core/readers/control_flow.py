"""Loops and branches that compressed arrays enter, rebuilt through `jax.lax`.

A carry or branch output that would change its type (a compressed array that comes back dense) is
made dense before entering, and recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import JaxprEqn

from jaxcompress.core.arrays import views
from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.readers import unofficial
from jaxcompress.core.readers.observations import Observations, zeros_like
from jaxcompress.core.readers.origins import Origins, Tag
from jaxcompress.core.readers.unofficial import Body
from jaxcompress.core.readers.walk import Frame, same_type


def scan(frame: Frame, eqn: JaxprEqn, operands: list[Any], origins: list[Origins]) -> list[Any]:
    """`lax.scan`. Observations of scanned weights are stacked, of all others accumulated."""
    p, walk = eqn.params, frame.walk
    first_carry, carries = unofficial.scan_counts(p)
    first_x = first_carry + carries
    if p["length"] == 0:
        return frame.bind(eqn, [walk.densify(v, eqn, "a scan of length 0") for v in operands])
    consts, init = operands[:first_carry], operands[first_carry:first_x]
    xs = [_scannable(frame, eqn, x) for x in operands[first_x:]]
    body = Body.of(p["jaxpr"])
    inner = _carried(frame.inner(origins), body, first_carry, carries)
    if inner is not None:
        inner[first_x:] = [Tag(t.mesh[1:]) if isinstance(t, Tag) else t for t in inner[first_x:]]

    def step(carry: Any, x: Any) -> tuple[list[Any], list[Any], Observations]:
        outputs, seen = frame.run(body, [*consts, *carry, *x], inner)
        return outputs[:carries], outputs[carries:], seen

    x0 = jax.eval_shape(lambda xs: [jax.tree.map(lambda b: b[0], x) for x in xs], xs)
    init = settle(frame, eqn, init, lambda carry: jax.eval_shape(step, carry, x0)[0])
    expected = Observations()
    if frame.recorder:
        expected = jax.eval_shape(step, init, x0)[2]
    # A weight scanned over keeps one statistic per step; a value read by both kinds leaves twice.
    stacked, summed = expected.split(
        lambda use: isinstance(use.origin, str) or use.origin >= first_x
    )

    def lifted(carry: Any, x: Any) -> tuple[Any, Any]:
        values, totals = carry
        out, ys, seen = step(values, x)
        out = frame.like(out, init, eqn, "a carry that changes type")
        totals = [
            _combine(frame, t, seen.statistics[i])
            for t, i in zip(totals, summed.index, strict=True)
        ]
        return (out, totals), (ys, [seen.statistics[i] for i in stacked.index])

    zeros = [zeros_like(expected.statistics[i]) for i in summed.index]
    (carry, totals), (ys, stacks) = lax.scan(
        lifted,
        (init, zeros),
        xs,
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    frame.absorb(stacked.observations(stacks), operands, origins, first_x)
    frame.absorb(summed.observations(totals), operands, origins, first_x)
    return [*carry, *ys]


def _carried(given: Any, body: Body, first: int, count: int) -> Any:
    """What a loop's body is told: a carry keeps its origins only if every step hands it on."""
    if given is None:
        return None
    ins, outs = body.jaxpr.invars[first : first + count], body.jaxpr.outvars
    kept = [
        tag if i is o else None
        for tag, i, o in zip(given[first : first + count], ins, outs, strict=False)
    ]
    return [*given[:first], *kept, *given[first + count :]]


def _combine(frame: Frame, a: Any, b: Any) -> Any:
    assert frame.walk.settings is not None
    return frame.walk.settings.combine(a, b)


def _scannable(frame: Frame, eqn: JaxprEqn, x: Any) -> Any:
    """`x` with its first axis leading."""
    if not is_compressed(x) or x.lead:
        return x
    rows = views.row_axes(x)
    if rows[:1] == [0]:
        dims = tuple(zip([kind for kind, _ in x.dims], x.shape, strict=True))[1:]
        moved = views.rearrange(x, [0], rows[1:], dims)
        if moved is not None:
            return moved
    return frame.walk.densify(x, eqn, "a scan over an axis that is not a leading one")


def settle(
    frame: Frame, eqn: JaxprEqn, init: list[Any], step: Callable[[list[Any]], list[Any]]
) -> list[Any]:
    """Make those carries dense that do not come back as they went in."""
    while any(map(is_compressed, init)):
        out = step(init)
        changed = [
            is_compressed(before) and not same_type(before, after)
            for before, after in zip(init, out, strict=True)
        ]
        if not any(changed):
            break
        init = [
            frame.walk.densify(x, eqn, "a carry that changes type") if c else x
            for x, c in zip(init, changed, strict=True)
        ]
    return init


def while_loop(
    frame: Frame, eqn: JaxprEqn, operands: list[Any], origins: list[Origins]
) -> list[Any]:
    """`lax.while_loop`. Observations of the body and of the condition are accumulated."""
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = operands[:n_cond], operands[n_cond : n_cond + n_body]
    init = operands[n_cond + n_body :]
    cond_body, loop_body = Body.of(p["cond_jaxpr"]), Body.of(p["body_jaxpr"])
    inner = frame.inner(origins)
    loop_origins = cond_origins = None
    if inner is not None:
        loop_origins = _carried(inner[n_cond:], loop_body, n_body, len(init))
        cond_origins = [*inner[:n_cond], *loop_origins[n_body:]]

    def test(carry: Any) -> tuple[list[Any], Observations]:
        return frame.run(cond_body, [*cond_consts, *carry], cond_origins)

    def step(carry: Any) -> tuple[list[Any], Observations]:
        return frame.run(loop_body, [*body_consts, *carry], loop_origins)

    init = settle(frame, eqn, init, lambda carry: jax.eval_shape(step, carry)[0])
    if not frame.recorder:
        return lax.while_loop(
            lambda carry: test(carry)[0][0],
            lambda carry: frame.like(step(carry)[0], init, eqn, "a carry that changes type"),
            init,
        )
    seen_by_step = jax.eval_shape(step, init)[1]
    tested = bool(jax.eval_shape(test, init)[1].entries)
    # What the condition sees is observed where its value can leave: before the loop and after
    # every step, which is when it is evaluated.
    at_start = test(init)[1] if tested else Observations()

    def lifted(carry: Any) -> Any:
        values, totals, tests = carry
        out, seen = step(values)
        out = frame.like(out, init, eqn, "a carry that changes type")
        totals = [_combine(frame, a, b) for a, b in zip(totals, seen.statistics, strict=True)]
        if tested:
            again = test(out)[1].statistics
            tests = [_combine(frame, a, b) for a, b in zip(tests, again, strict=True)]
        return out, totals, tests

    zeros = [zeros_like(s) for s in seen_by_step.statistics]
    out, totals, tests = lax.while_loop(
        lambda carry: test(carry[0])[0][0], lifted, (init, zeros, at_start.statistics)
    )
    frame.absorb(seen_by_step.with_statistics(totals), operands[n_cond:], origins[n_cond:])
    frame.absorb(
        at_start.with_statistics(tests),
        [*cond_consts, *init],
        [*origins[:n_cond], *origins[n_cond + n_body :]],
    )
    return out


def cond(frame: Frame, eqn: JaxprEqn, operands: list[Any], origins: list[Origins]) -> list[Any]:
    """`lax.cond`, `lax.switch` and `lax.platform_dependent`.

    Observations of the branches not taken are zero, with a count of 0.
    """
    index, *args = operands
    inner = frame.inner(origins[1:])
    bodies = [Body.of(branch) for branch in eqn.params["branches"]]
    runs = [lambda *a, body=body: frame.run(body, a, inner) for body in bodies]
    shapes = [jax.eval_shape(run, *args) for run in runs]
    outputs = [out for out, _ in shapes]
    templates = [
        first if all(same_type(first, other) for other in others) else None
        for first, *others in zip(*outputs, strict=True)
    ]

    def branch(taken: int) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            out, seen = runs[taken](*args)
            out = frame.like(out, templates, eqn, "branches that return different types")
            statistics = [
                seen.statistics if i == taken else [zeros_like(s) for s in shape.statistics]
                for i, (_, shape) in enumerate(shapes)
            ]
            return out, statistics

        return run

    branches = [branch(i) for i in range(len(runs))]
    platforms = unofficial.platforms_of(eqn)
    if platforms is not None:
        named = {
            name: fn for names, fn in zip(platforms, branches, strict=True) for name in names or ()
        }
        default = next((f for n, f in zip(platforms, branches, strict=True) if n is None), None)
        out, statistics = lax.platform_dependent(*args, default=default, **named)
    elif len(branches) == 2:
        out, statistics = lax.cond(index, branches[1], branches[0], *args)
    else:
        out, statistics = lax.switch(index, branches, *args)
    for (_, seen), values in zip(shapes, statistics, strict=True):
        frame.absorb(seen.with_statistics(values), args, origins[1:])
    return out
