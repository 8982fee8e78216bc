"""The unofficial facts about JAX that the readers rest on, checked against the installed one."""

import warnings

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from lift_cases import equations

from jaxcompress.core.readers import unofficial

X, W = jnp.ones((4, 6)), jnp.ones((6, 4))


@jax.custom_vjp
def vjp_rule(x):
    return x * 2


vjp_rule.defvjp(lambda x: (x * 2, x), lambda x, g: (g * 2,))


@jax.custom_jvp
def jvp_rule(x):
    return x * 2


jvp_rule.defjvp(lambda p, t: (jvp_rule(*p), t[0] * 2))


@jax.custom_batching.custom_vmap
def vmap_rule(x):
    return x * 2


vmap_rule.def_vmap(lambda size, batched, x: (x * 2, batched[0]))


def everything(x, w):
    """Has every primitive of `unofficial.PARAMS` in its jaxpr."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    x = jax.jit(jnp.sin)(x)
    x = jax.checkpoint(jnp.cos)(x)
    x = vjp_rule(jvp_rule(vmap_rule(x)))
    x, _ = lax.scan(lambda c, y: (c + y.sum(), y), x, x)
    x = lax.while_loop(lambda c: c.sum() < 0, lambda c: c + 1, x)
    x = lax.cond(x.sum() > 0, lambda x: x, lambda x: x + 1, x)
    gathered = jax.shard_map(
        lambda x: lax.all_gather(x, "i", tiled=True),
        mesh=mesh,
        in_specs=P("i"),
        out_specs=P("i"),
        check_vma=False,
    )(x)
    y = (gathered @ w).T.reshape(2, 2, 4)[None].astype(jnp.bfloat16).astype(jnp.float32)
    y = jnp.squeeze(y, 0)
    a, b = jnp.split(y, 2)
    y = jnp.concatenate([a, b, lax.dynamic_slice(y, (0, 0, 0), (1, 2, 4))])[:2]
    y = jnp.stack([y, y])[0][jnp.array([0, 1])].at[0].set(1.0)
    y = jax.ad_checkpoint.checkpoint_name(y, "named")
    y = lax.with_sharding_constraint(y, jax.sharding.NamedSharding(mesh, P()))
    return lax.conv_general_dilated(
        y[..., None],
        jnp.ones((2, 2, 1, 3)),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@pytest.fixture(scope="module")
def params():
    found = {}
    for eqn in equations(jax.make_jaxpr(everything)(X, W).jaxpr):
        found.setdefault(eqn.primitive.name, eqn.params)
    return found


@pytest.mark.parametrize("primitive", sorted(set(unofficial.PARAMS) - {"closed_call"}))
def test_params_that_the_readers_read(params, primitive):
    assert primitive in params, f"{primitive} has another name in JAX {jax.__version__}"
    missing = unofficial.PARAMS[primitive] - set(params[primitive])
    assert not missing, f"{primitive} has other params in JAX {jax.__version__}"


def test_counts_of_a_scan(params):
    def f(a, b, xs):
        return lax.scan(lambda c, x: ((c[0] + a, c[1] * x + b), c[0]), (a, b), xs)

    (eqn,) = [
        e
        for e in jax.make_jaxpr(f)(jnp.ones(2), jnp.ones(3), jnp.ones((5, 3))).eqns
        if e.primitive.name == "scan"
    ]
    assert unofficial.scan_counts(eqn.params) == (2, 2)


def test_a_backward_rule_that_returns_something_unknown_is_no_zero():
    """Taking it for symbolic zeros would be a silently wrong gradient."""
    (eqn,) = jax.make_jaxpr(vjp_rule)(X).eqns
    unofficial.custom_vjp_forward(eqn, [True])  # residuals are known only then
    assert [g.shape for g in unofficial.custom_vjp_backward(eqn, [X], [X])] == [(4, 6)]

    class Odd:
        def __init__(self, out):
            self.call_wrapped = lambda *args: out

    for out in (["what"], [X, X], (X, {"logs": 1})):
        odd = eqn.replace(params={**eqn.params, "bwd": Odd(out)})
        with pytest.raises(TypeError, match="backward rule returned"):
            unofficial.custom_vjp_backward(odd, [X], [X])


def test_an_equation_bound_again_is_the_same(params):
    def again(x, w):
        closed = jax.make_jaxpr(everything)(x, w)
        values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        values.update(zip(closed.jaxpr.invars, (x, w), strict=True))
        for eqn in closed.jaxpr.eqns:
            operands = [a.val if unofficial.literal(a) else values[a] for a in eqn.invars]
            with unofficial.context_of(eqn):
                outputs = unofficial.bind_as_traced(eqn, operands)
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [values[v] for v in closed.jaxpr.outvars]

    ours, theirs = (jax.make_jaxpr(f)(X, W).jaxpr for f in (again, everything))
    assert [e.primitive.name for e in ours.eqns] == [e.primitive.name for e in theirs.eqns]
    assert unofficial.source_line(ours.eqns[0]) == unofficial.source_line(theirs.eqns[0])
    assert "test_unofficial.py" in unofficial.source_line(ours.eqns[0])


def test_an_unknown_version_warns_once(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    unofficial.warn_if_unknown.cache_clear()
    with pytest.warns(UserWarning, match=r"JAX below 0\.12"):
        unofficial.warn_if_unknown()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unofficial.warn_if_unknown()
    unofficial.warn_if_unknown.cache_clear()


def test_a_known_version_does_not_warn():
    unofficial.warn_if_unknown.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unofficial.warn_if_unknown()
