"""What `lift` keeps packed, and how far it is from the dequantized model, by transformation.

    python benchmarks/lift_table.py          # every transformation of a plain function, and
                                             # those of OFTEN of the other models
    python benchmarks/lift_table.py --full 1 # every transformation of every model

Every transformation T is tried inside, `lift(T(f))`, and outside, `T(lift(f))`, on int4 weights
in groups of 32, against `T(f)` on the dequantized weights; all in float32 on 8 virtual CPU
devices. A row tells the worse of the two: how many arrays went dense, the largest difference of
outputs, and the differences of the gradients of a squared error by the inputs, and by the scales
and dense parameters (outside: of the plain function only). A gradient's difference is relative to
the largest entry of its leaf, or to a thousandth of the largest of all leaves where that is more.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lift_models import SPECS, WIDTH, attend, cases, norm
from tables import Table, arguments, largest_difference, write

import jaxcompress as jc

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # many programs, each run once

MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
X = jax.random.normal(jax.random.key(1), (8, 6, WIDTH))
TARGET = jax.random.normal(jax.random.key(2), X.shape)


def squared_error(y):
    """Of outputs against a fixed target: the norm at a model's end makes sum(y^2) constant."""
    return ((y - TARGET) ** 2).sum()


def squares(f, p, x):
    """The loss whose gradients are compared."""
    return squared_error(f(p, x))


def with_custom_jvp(f):
    """A rule that is wrong on purpose: tripled tangents can come from nowhere else."""
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (f(*primals), 3 * jax.jvp(f, primals, tangents)[1]))
    return g


def with_custom_vjp(f):
    """Tripled cotangents, from parameters kept as residuals."""

    def backward(saved, y):
        return jax.vjp(f, *saved)[1](3 * y)

    g = jax.custom_vjp(f)
    g.defvjp(lambda p, x: (f(p, x), (p, x)), backward)
    return g


def sharded_data(f):
    """Data parallel `shard_map`."""
    return jax.shard_map(f, mesh=MESH, in_specs=(P(), P("data")), out_specs=P("data"))


def psum_data(f):
    """A mean over shards, inside `shard_map`."""

    def local(p, x):
        return f(p, x) + lax.pmean(f(p, x).mean(0, keepdims=True), "data")

    return sharded_data(local)


def loop(f):
    """A `while` that carries the parameters."""

    def run(p, x):
        def step(c):
            return c[0] + 1, c[1], f(c[1], c[2])

        return lax.while_loop(lambda c: c[0] < 2, step, (0, p, x))[2]

    return run


def directions(x):
    """A tangent of the inputs."""
    return jnp.cos(x)


TRANSFORMS = {
    "jit": jax.jit,
    "jit in jit": lambda f: jax.jit(lambda p, x: jax.jit(f)(p, jax.jit(jnp.sin)(x))),
    "grad by inputs": lambda f: lambda p, x: jax.grad(lambda x: squares(f, p, x))(x),
    "vmap inputs": lambda f: lambda p, x: jax.vmap(f, (None, 0))(p, jnp.stack([x, -x])),
    "vmap weights": lambda f: jax.vmap(f, (0, None)),
    "jvp": lambda f: lambda p, x: jax.jvp(lambda x: f(p, x), (x,), (directions(x),))[1],
    "linearize": lambda f: lambda p, x: jax.linearize(lambda x: f(p, x), x)[1](directions(x)),
    "scan xs": lambda f: lambda p, x: lax.scan(lambda c, q: (f(q, c), None), x, p)[0],
    "scan consts": lambda f: (
        lambda p, x: lax.scan(lambda c, _: (f(p, c), None), x, None, length=2)[0]
    ),
    "scan carry": lambda f: (
        lambda p, x: lax.scan(lambda c, _: ((c[0], f(*c)), None), (p, x), None, length=2)[0][1]
    ),
    "remat, policy": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
    "cond": lambda f: (
        lambda p, x: lax.cond(x.sum() > 0, lambda p, x: f(p, -x), lambda p, x: f(p, 2 * x), p, x)
    ),
    "while": loop,
    "custom_jvp": with_custom_jvp,
    "custom_vjp": with_custom_vjp,
    "shard_map": sharded_data,
    "shard_map, psum": psum_data,
}
OFTEN = ("jit", "vmap inputs", "scan xs", "remat, policy", "shard_map")
STACKED = ("vmap weights", "scan xs")
NO_REVERSE = ("while",)
ON_A_MESH = ("shard_map", "shard_map, psum")


def quantized(case):
    """int4 in groups of 32, every weight that a product reads."""
    axes = jc.contractions(case.apply)(case.params, X)
    params = jc.quantize(case.params, bits=4, group_size=32, include=list(axes), axes=axes)
    return params


def stacked(params):
    """Two sets of parameters along a leading axis."""

    def pair(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.stack([leaf, leaf * 0.9 if floating else leaf])

    return jax.tree.map(pair, params)


def placed(params, shardings, lead):
    """Parameters and inputs on the mesh."""
    shift = lambda s: NamedSharding(s.mesh, P(*[None] * lead, *s.spec))  # noqa: E731
    return jc.place(params, jax.tree.map(shift, shardings), batch=("data",))


def gradient_difference(a, b):
    """See the top of this file."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(b)]
    floor = max(np.abs(leaf).max() for leaf in leaves) / 1000
    return max(
        largest_difference(x, y) / max(np.abs(y).max(), floor)
        for x, y in zip(jax.tree.leaves(a), leaves, strict=True)
    )


def results(run, params, x, reverse):
    """Outputs, and gradients by inputs and by what trains, of `run(params, x)`, compiled."""
    if not reverse:
        return jax.jit(run)(params, x), None, None
    trainable, frozen = jc.split(params, ["scales", "dense"])

    def loss(trainable, x):
        y = run(jc.merge(trainable, frozen), x)
        return squared_error(y), y

    (_, y), (by_params, by_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        trainable, x
    )
    return y, by_x, by_params


def compare(forms, reference, params, x):
    """(arrays that went dense, difference of outputs, of both gradients): the worst of forms.

    A form is (lifted, function, whether its gradients are compared too).
    """
    any_reverse = any(reverse for *_, reverse in forms)
    want = results(lambda p, x: reference(jc.densify(p), x), params, x, any_reverse)
    worst = [0, 0.0, 0.0, 0.0]
    records = []
    for lifted, run, reverse in forms:
        y, by_x, by_params = results(run, params, x, reverse)
        records += lifted.materialized()
        found = [
            sum(record.count for record in lifted.materialized()),
            largest_difference(y, want[0]),
            gradient_difference(by_x, want[1]) if reverse else 0.0,
            gradient_difference(by_params, want[2]) if reverse else 0.0,
        ]
        worst = list(map(max, worst, found))
    return (*worst[:2], *(worst[2:] if any_reverse else (None, None))), records


def tensor_parallel(p, x):
    """The plain block by hand: columns, then rows and `psum`, two heads on each device."""
    h = norm(x)
    q, k, v = ((h @ p[name]).reshape(*h.shape[:2], 2, -1) for name in "qkv")
    x = x + lax.psum(attend(q, k, v).reshape(*x.shape[:2], -1) @ p["o"], "model")
    h = norm(x)
    y = jax.nn.silu(h @ p["up"]) @ p["down"]
    return norm(x + lax.psum(y, "model"))


def tensor_parallel_forms(params):
    """`shard_map` around and inside `lift`, weights split by columns and rows."""

    def mapped(f, specs):
        return jax.shard_map(
            f, mesh=MESH, in_specs=(specs, P("data")), out_specs=P("data"), check_vma=True
        )

    inside = jc.lift(mapped(tensor_parallel, SPECS))
    outside = jc.lift(tensor_parallel)
    buffers = jax.tree.map(lambda buffer: buffer.sharding.spec, params)
    forms = [(inside, inside, True), (outside, mapped(outside, buffers), True)]
    return forms, mapped(tensor_parallel, SPECS)


def main():
    """Prints and writes the table."""
    args = arguments(__doc__, full=0)
    columns = ["transformation", "model", "went dense", "outputs", "by inputs", "by parameters"]
    table = Table("lift against the dequantized model: largest differences", columns)
    notes = []

    def add(name, model, found, records):
        table.add(name, model, *found)
        notes.extend(
            f"{name}, {model}: {r.count} x {r.primitive} {r.shape}: {r.reason} ({r.line})"
            for r in dict.fromkeys(records)
        )

    everything = cases(X, MESH)
    packed = {model: quantized(case) for model, case in everything.items()}
    for name, transform in TRANSFORMS.items():
        for model, case in everything.items():
            if case.shardings is not None and name in ON_A_MESH:
                continue
            if not (args.full or model == "plain" or name in OFTEN):
                continue
            lead = int(name in STACKED)
            params, x = stacked(packed[model]) if lead else packed[model], X
            inside, outside = jc.lift(transform(case.apply)), jc.lift(case.apply)
            if case.shardings is not None:
                params = placed(params, case.shardings, lead)
                x = jax.device_put(X, NamedSharding(MESH, P("data")))
            reverse = name not in NO_REVERSE
            forms = [
                (inside, inside, reverse),
                (outside, transform(outside), reverse and model == "plain"),
            ]
            add(name, model, *compare(forms, transform(case.apply), params, x))
    params = jc.place(
        {name: packed["plain"][name] for name in SPECS},
        {name: NamedSharding(MESH, spec) for name, spec in SPECS.items()},
    )
    forms, reference = tensor_parallel_forms(params)
    add("tensor parallel, psum", "plain", *compare(forms, reference, params, X))
    write(args.out, "lift_table", __doc__, [table], notes)


if __name__ == "__main__":
    main()
