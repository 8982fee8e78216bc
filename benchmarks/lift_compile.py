"""Trace, lower and compile time of a lifted transformer against dequantization written by hand.

    python benchmarks/lift_compile.py [--layers 32] [--width 128] [--repeats 3]

Four forms of one decoder: dense; int4 dequantized by hand where each weight is used; int4 through
`lift`; and `lift` without a compressed leaf, its walk forced. Layers are unrolled, each a call of
one jitted layer, and then scanned. Times are the smallest of the repeats, which take turns, caches
cleared before each; "cpu" is processor time, which other programs on the machine disturb less.
"""

import argparse
import json
import platform
import time

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.affine import encode_affine, minmax_range
from jaxcompress.core.arrays.base import dense, densify
from jaxcompress.core.readers.lift import Lifted, lift

HEADS = 4


def norm(x, gain):
    """RMS norm."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain


def layer(p, x):
    """One decoder layer, x [batch, time, width]."""
    h = norm(x, p["g1"])
    q, k, v = (jnp.einsum("btd,dn->btn", h, p[c]).reshape(*x.shape[:2], HEADS, -1) for c in "qkv")
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
    x = x + jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(x.shape) @ p["o"]
    h = norm(x, p["g2"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def parameters(layers, width, key):
    """Dense parameters of every layer."""
    shapes = dict.fromkeys("qkvo", (width, width))
    shapes |= {"gate": (width, 4 * width), "up": (width, 4 * width), "down": (4 * width, width)}
    out = []
    for keys in jax.random.split(key, (layers, len(shapes))):
        kernels = {
            name: jax.random.normal(k, shape) * 0.05
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        out.append({**kernels, "g1": jnp.ones(width), "g2": jnp.ones(width)})
    return out


def int4(x):
    """A kernel [in, out] as int4 in four groups; gains as they are."""
    if x.ndim < 2:
        return x
    scale, _ = minmax_range(x.T, bits=4, groups=4, symmetric=True)
    return encode_affine(x.T, scale, None, bits=4)


def measure(fn, params, x):
    """Seconds to trace and lower, and to compile; processor seconds; size of the StableHLO."""
    jax.clear_caches()
    start, cpu = time.perf_counter(), time.process_time()
    lowered = jax.jit(fn).lower(params, x)
    middle = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return {
        "total": end - start,
        "lower": middle - start,
        "compile": end - middle,
        "cpu": time.process_time() - cpu,
        "characters": len(lowered.as_text()),
    }


def main():
    """Prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    params = parameters(args.layers, args.width, jax.random.key(0))
    codes = [jax.tree.map(int4, p) for p in params]
    plain = densify(codes)
    x = jax.random.normal(jax.random.key(1), (2, 16, args.width))

    def unrolled(apply):
        def run(params, x):
            for p in params:
                x = apply(p, x)
            return x

        return run

    def scanned(apply):
        return lambda stack, x: jax.lax.scan(lambda c, p: (apply(p, c), None), x, stack)[0]

    def by_hand(p, x):
        return layer({name: dense(leaf) for name, leaf in p.items()}, x)

    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    jitted, jitted_by_hand = jax.jit(layer), jax.jit(by_hand)
    cases = {
        "unrolled": {
            "dense": (unrolled(jitted), plain),
            "by hand": (unrolled(jitted_by_hand), codes),
            # A fresh lift for each trace: nothing is remembered from the repeat before.
            "lift": (lambda p, x: lift(unrolled(jitted))(p, x), codes),
            "forced walk": (lambda p, x: Lifted(unrolled(jitted), always=True)(p, x), plain),
        },
        "scanned": {
            "dense": (scanned(layer), stack(plain)),
            "by hand": (scanned(by_hand), stack(codes)),
            "lift": (lambda p, x: lift(scanned(layer))(p, x), stack(codes)),
            "forced walk": (lambda p, x: Lifted(scanned(layer), always=True)(p, x), stack(plain)),
        },
    }
    results = {}
    for form, ways in cases.items():
        runs = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, (fn, tree) in ways.items():
                runs[name].append(measure(fn, tree, x))
        for name, found in runs.items():
            least = {key: min(run[key] for run in found) for key in found[0]}
            results[f"{form}, {name}"] = least
            print(f"{form:9s} {name:12s}", *(f"{k} {v:.3f}" for k, v in least.items()), flush=True)
        for key in ("total", "cpu"):
            ratio = results[f"{form}, lift"][key] / results[f"{form}, by hand"][key]
            results[f"{form}, lift over by hand, {key}"] = ratio
            print(f"{form}: lift / by hand, {key}: {ratio:.3f}")
    print(
        json.dumps(
            {
                **vars(args),
                "jax": jax.__version__,
                "backend": jax.default_backend(),
                "machine": platform.machine(),
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
