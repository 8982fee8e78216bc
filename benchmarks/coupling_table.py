"""Groups that `coupling` finds, what it refuses and where, and one cut of each model.

    python benchmarks/coupling_table.py

Models: a Llama written by hand, the reference decoder, GPT-2 (its layer norms see what is masked),
the CIFAR ResNet-20 (of JAXCOMPRESS_ASSETS where set, otherwise drawn) and the LSTM. For each: the
groups, the symmetries derived, groups that are not cut and why; every second index of each exact
group removed by `cut`, compared with the function whose indices are masked (largest of all groups)
and with the whole one (smallest of all groups: what was removed mattered); and every symmetry tried
on the function itself (`verify`). Differences are relative to the largest output.
"""

import os
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.models import DecoderConfig, GPT2Config, LSTMConfig, ResNetConfig, build_model

IDS = np.arange(14).reshape(2, 7) % 17


def norm(x, gain):
    """RMS norm."""
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain


def rope(x):
    """Rotary embedding over halves of [batch, time, heads, width]."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def llama(p, ids, head_width=8):
    """Grouped queries, rotary positions, gated MLP; layers in a list."""
    x = p["embed"][ids]
    mask = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
    for w in p["layers"]:
        h = norm(x, w["n1"])
        q, k, v = ((h @ w[name]).reshape(*h.shape[:2], -1, head_width) for name in "qkv")
        q, k = rope(q), rope(k)
        k, v = (jnp.repeat(t, q.shape[2] // k.shape[2], axis=2) for t in (k, v))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / head_width**0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*h.shape[:2], -1) @ w["o"]
        h = norm(x, w["n2"])
        x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
    return norm(x, p["norm"]) @ p["head"]


def llama_shapes(layers, vocab=17, width=24, heads=4, kv=2, head_width=8, hidden=40):
    """Shapes of the parameters of `llama`."""
    layer = {
        "n1": (width,), "n2": (width,), "q": (width, heads * head_width),
        "k": (width, kv * head_width), "v": (width, kv * head_width),
        "o": (heads * head_width, width),
        "gate": (width, hidden), "up": (width, hidden), "down": (hidden, width),
    }  # fmt: skip
    outer = {"embed": (vocab, width), "norm": (width,), "head": (width, vocab)}
    return outer | {"layers": [layer] * layers}


def scrambled(params):
    """Random parameters of the same shapes; variances positive."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        shape = getattr(leaf, "shape", leaf)
        values = rng.standard_normal(shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1)
        positive = "batch_stats" in jax.tree_util.keystr(path)
        return jnp.asarray(np.abs(values) + 0.5 if positive else values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, params, is_leaf=lambda x: isinstance(x, tuple))


def models():
    """{name: (function, parameters, input)}"""
    decoder = build_model(
        DecoderConfig(
            vocab_size=17, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        )
    )  # fmt: skip
    gpt2 = build_model(GPT2Config(vocab_size=17, n_positions=9, n_embd=12, n_layer=2, n_head=3))
    lstm = build_model(
        LSTMConfig(vocab_size=17, embedding_dim=5, hidden_size=6, num_hidden_layers=2)
    )
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    assets = os.environ.get("JAXCOMPRESS_ASSETS")
    if assets:
        resnet = jc.load(Path(assets) / "cifar-resnet20" / "resnet20-12fca82f.th")
    else:
        resnet = build_model(ResNetConfig(stage_sizes=(3, 3, 3), widths=(16, 32, 64)))
        resnet = resnet.replace(params=scrambled(resnet.params))
    return {
        "Llama by hand": (llama, scrambled(llama_shapes(2)), IDS),
        "reference decoder": (decoder.apply, scrambled(decoder.params), IDS),
        "GPT-2": (gpt2.apply, scrambled(gpt2.params), IDS),
        "ResNet-20": (resnet.apply, resnet.params, images),
        "LSTM": (lstm.apply, scrambled(lstm.params), IDS),
    }


def members(group):
    """Where a group stands; long lists by their number."""
    places = Counter((member.path, member.axis) for member in group.members)
    shown = [f"{path}:{axis}" + (f" x{n}" if n > 1 else "") for (path, axis), n in places.items()]
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return ", ".join(shown[:5]) + more


def difference(a, b):
    """max |a - b| / max |b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def halved(group):
    """A record that removes every second index."""
    return group.keep(range(0, group.size, 2))


def describe(name, fn, params, x, summary):
    """Table of the groups of one model, alike ones in one row; its row in the summary."""
    start = time.perf_counter()
    groups = jc.coupling(fn)(params, x)
    seconds = time.perf_counter() - start
    columns = ["groups", "size", "cut", "members (of the first)", "symmetries", "because"]
    whole, run = jax.jit(fn)(params, x), jax.jit(fn)
    alike, states, from_masked, from_whole = {}, Counter(), [], []
    for group in groups:
        state = "refused" if not group.cuttable else "exact" if group.exact else "inexact"
        why = "; ".join(group.reasons[:2])
        if state == "inexact":
            lines = [f"{c.primitive} @ {c.source}" for c in group.crossing if not c.exact]
            why = "masking is not removing: " + "; ".join(list(dict.fromkeys(lines))[:2])
        key = group.size, state, ", ".join(group.symmetries), why
        alike.setdefault(key, []).append(group)
        states[state] += 1
        if state == "exact" and group.size > 1:
            kept = halved(group)
            small, smaller = jc.cut(fn, params, kept, x)
            masked = run(jc.masked(params, kept), x)
            from_masked.append(difference(smaller(small, x), masked))
            from_whole.append(difference(masked, whole))
    table = Table(f"{name}: {len(groups)} groups", columns)
    for (size, state, symmetries, why), found in alike.items():
        table.add(len(found), size, state, members(found[0]), symmetries, why)
    checks = jc.verify(groups, params, x)
    summary.append(
        (
            name, len(groups), states["exact"], states["inexact"], states["refused"],
            max(from_masked), min(from_whole), len(checks), max(c.error for c in checks), seconds,
        )
    )  # fmt: skip
    return table


def timing(layers):
    """Seconds to find all groups, and to derive everything about every group."""
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        llama_shapes(layers),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    start = time.perf_counter()
    groups = jc.coupling(llama)(shapes, IDS)
    middle = time.perf_counter()
    for group in groups:
        _ = group.exact, group.symmetries
    return len(groups), middle - start, time.perf_counter() - middle


def main():
    """Prints and writes the tables."""
    args = arguments(__doc__)
    rows = []
    tables = [describe(name, *model, rows) for name, model in models().items()]
    columns = [
        "model", "groups", "exact", "inexact", "refused", "removed - masked", "masked - whole",
        "symmetries tried", "largest change", "seconds to find groups",
    ]  # fmt: skip
    summary = Table("All models", columns)
    for row in rows:
        summary.add(*row)
    times = Table(
        "Llama by hand, unrolled: seconds",
        ["layers", "groups", "find groups", "every group's symmetries and exactness"],
    )
    for layers in (2, 8, 32):
        times.add(layers, *timing(layers))
    write(args.out, "coupling_table", __doc__, [summary, times, *tables])


if __name__ == "__main__":
    main()
