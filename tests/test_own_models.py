"""Models of other people: plain JAX, Equinox, NNX. Nothing of ours stands in them.

Masks, solvers and factors are compared with NumPy in float64 on rows that a second, hand-written
forward pass gives; structured cuts with the uncut function on masked parameters.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.core.errors import InputError

sys.path.append(f"{__file__.rsplit('/', 1)[0]}/layerwise")
import solver_oracle

VOCAB, WIDTH, HEADS, HEAD, HIDDEN = 40, 24, 4, 6, 48
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, VOCAB, (8, 16)).astype(np.int32)
MATRICES = ("q", "k", "v", "o", "up", "down")
INCLUDE = [f"layers/*/{name}" for name in MATRICES]


def drawn(*shape, fan):
    return jnp.asarray(RNG.normal(size=shape) / np.sqrt(fan), jnp.float32)


# ------------------------------------------------------------------ a transformer in plain JAX


def transformer_params(layers=2):
    block = lambda: {  # noqa: E731
        "gain": jnp.asarray(1 + 0.1 * RNG.normal(size=WIDTH), jnp.float32),
        "q": drawn(WIDTH, HEADS, HEAD, fan=WIDTH),
        "k": drawn(WIDTH, HEADS, HEAD, fan=WIDTH),
        "v": drawn(WIDTH, HEADS, HEAD, fan=WIDTH),
        "o": drawn(HEADS, HEAD, WIDTH, fan=HEADS * HEAD),
        "up": drawn(HIDDEN, WIDTH, fan=WIDTH),  # [out, in], as PyTorch keeps them
        "up_bias": drawn(HIDDEN, fan=4),
        "down": drawn(WIDTH, HIDDEN, fan=HIDDEN),
    }
    return {
        "table": drawn(VOCAB, WIDTH, fan=1),
        "layers": [block() for _ in range(layers)],
        "unembed": drawn(WIDTH, VOCAB, fan=WIDTH),
    }


def normed(x, gain):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain


def block(w, x):
    length = x.shape[1]
    y = normed(x, w["gain"])
    q, k, v = (jnp.einsum("btd,dhk->bhtk", y, w[name]) for name in "qkv")
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k) / np.sqrt(HEAD)
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
    mixed = jnp.einsum("bhts,bhsk->bthk", jax.nn.softmax(scores), v)
    x = x + jnp.einsum("bthk,hkd->btd", mixed, w["o"])
    hidden = jax.nn.relu(x @ w["up"].T + w["up_bias"])
    return x + hidden @ w["down"].T


def transformer(params, ids):
    x = params["table"][ids]
    for w in params["layers"]:
        x = block(w, x)
    return x @ params["unembed"]


def scanned(params, ids):
    x, _ = jax.lax.scan(lambda x, w: (block(w, x), None), params["table"][ids], params["layers"])
    return x @ params["unembed"]


def numpys(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def numpy_forward(params, ids):
    """Logits, and the rows `[tokens, K]` that every matrix reads, by path; float64."""
    params, rows = numpys(params), {}
    x = params["table"][ids]
    length = ids.shape[1]
    for i, w in enumerate(params["layers"]):
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w["gain"]
        q, k, v = (np.einsum("btd,dhk->bhtk", y, w[name]) for name in "qkv")
        scores = np.einsum("bhtk,bhsk->bhts", q, k) / np.sqrt(HEAD)
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("bhts,bhsk->bthk", weights, v)
        x = x + np.einsum("bthk,hkd->btd", mixed, w["o"])
        hidden = np.maximum(x @ w["up"].T + w["up_bias"], 0)
        read = {"q": y, "k": y, "v": y, "o": mixed, "up": x, "down": hidden}
        size = {"o": HEADS * HEAD, "down": HIDDEN}
        for name, value in read.items():
            rows[f"layers/{i}/{name}"] = value.reshape(-1, size.get(name, WIDTH))
        x = x + hidden @ w["down"].T
    return x @ params["unembed"], rows


def stored(path, leaf):
    """The matrix `[N, K]` of a leaf of the transformer."""
    leaf = np.asarray(leaf)
    name = path.rsplit("/", 1)[1]
    if name in "qkv":
        return leaf.reshape(WIDTH, -1).T
    return leaf.reshape(-1, WIDTH).T if name == "o" else leaf


def at(params, path):
    for key in path.split("/"):
        params = params[int(key) if isinstance(params, list) else key]
    return params


@functools.cache
def own_model():
    return jc.Model(transformer, transformer_params())


PATHS = [f"layers/{i}/{name}" for i in range(2) for name in MATRICES]


def compressed(method, **options):
    model = own_model()
    return jc.compress(model, method, include=INCLUDE, **options)


def assert_runs_as_numpy(model):
    """The user's own function on the new parameters gives NumPy's logits of the dense values."""
    expected, _ = numpy_forward(jc.densify(model.params), IDS)
    assert model.apply is transformer
    np.testing.assert_allclose(model(IDS), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_magnitude(pattern):
    model = own_model()
    axes = jc.contractions(transformer)(model.params, IDS)
    assert axes["layers/0/q"] == (0,)
    assert axes["layers/0/o"] == (0, 1)
    assert axes["layers/0/up"] == (1,)
    small = compressed("magnitude", axes=axes, sparsity=0.5, pattern=pattern)
    for path in PATHS:
        before, after = (stored(path, at(m.params, path)) for m in (model, small))
        scores = np.abs(before) if pattern == "2:4" else np.abs(before).reshape(1, -1)
        groups = scores.reshape(-1, 4 if pattern == "2:4" else scores.size)
        keep = np.argsort(np.argsort(groups, axis=-1), axis=-1) >= groups.shape[-1] // 2
        np.testing.assert_array_equal(after, np.where(keep.reshape(before.shape), before, 0))
    assert_runs_as_numpy(small)


@pytest.mark.parametrize("store", ["zeros", "sparse"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda(pattern, store):
    options = {"pattern": pattern, "sparsity": 0.5, "store": store}
    small = compressed("wanda", calibration=IDS, sequential="none", **options)
    _, rows = numpy_forward(own_model().params, IDS)
    for path in PATHS:
        before = stored(path, at(own_model().params, path))
        leaf = at(small.params, path)
        assert jc.is_compressed(leaf) == (store == "sparse")
        scores = np.abs(before) * np.linalg.norm(rows[path], axis=0)
        groups = scores.reshape(-1, 4) if pattern == "2:4" else scores
        keep = np.argsort(np.argsort(groups, axis=-1), axis=-1) >= groups.shape[-1] // 2
        expected = np.where(keep.reshape(before.shape), before, 0)
        np.testing.assert_array_equal(stored(path, jc.dense(leaf)), expected)
    assert_runs_as_numpy(small)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt(pattern):
    small = compressed("sparsegpt", calibration=IDS, sequential="none", pattern=pattern)
    _, rows = numpy_forward(own_model().params, IDS)
    how = {"n_m": (2, 4)} if pattern == "2:4" else {"sparsity": 0.5}
    for path in PATHS:
        before, after = (stored(path, at(m.params, path)) for m in (own_model(), small))
        expected, _ = solver_oracle.solve(before, rows[path].T @ rows[path], **how)
        alike = (after == 0) == (expected == 0)
        assert alike.mean() > 0.99, path
        assert (after == 0).mean() == 0.5
        whole = alike.all(axis=1)  # in float32 a near tie may fall the other way, and shift its row
        np.testing.assert_allclose(after[whole], expected[whole], atol=2e-3)
    assert_runs_as_numpy(small)


def test_refit_is_least_squares_under_its_mask():
    options = {"mask": "magnitude", "sparsity": 0.5, "iterations": 200}
    small = compressed("refit", calibration=IDS, sequential="none", dense_target=0.0, **options)
    _, rows = numpy_forward(own_model().params, IDS)
    for path in PATHS:
        before, after = (stored(path, at(m.params, path)) for m in (own_model(), small))
        inputs, wanted = rows[path], rows[path] @ before.T.astype(np.float64)
        for row in range(0, len(before), 5):
            kept = after[row] != 0
            fitted = np.linalg.lstsq(inputs[:, kept], wanted[:, row], rcond=None)[0]
            best = np.sum((inputs[:, kept] @ fitted - wanted[:, row]) ** 2)
            ours = np.sum((inputs @ after[row] - wanted[:, row]) ** 2)
            masked = np.sum((inputs[:, kept] @ before[row][kept] - wanted[:, row]) ** 2)
            assert ours <= 1.01 * best + 1e-6 * masked
            assert ours < masked


def test_svd_is_the_truncated_one_and_stays_factored():
    small = compressed("svd", rank=4, axes=jc.contractions(transformer)(own_model().params, IDS))
    for path in PATHS:
        u, s, vt = np.linalg.svd(stored(path, at(own_model().params, path)).astype(np.float64))
        leaf = at(small.params, path)
        assert sum(x.size for x in jax.tree.leaves(leaf)) == 4 * (len(u) + len(vt))
        expected = (u[:, :4] * s[:4]) @ vt[:4]
        np.testing.assert_allclose(stored(path, jc.dense(leaf)), expected, atol=1e-5)
    assert_runs_as_numpy(small)
    assert not jc.materialized(transformer)(small.params, IDS)


def test_a_scan_over_stacked_layers_is_walked_block_by_block():
    """The same solutions as of the unrolled model with the same inputs; nothing is said of it."""
    params = transformer_params()
    stacked = {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}
    one = {"calibration": IDS, "sequential": "none", "pattern": "2:4"}
    small = jc.compress(
        jc.Model(scanned, stacked), "sparsegpt", include=[f"layers/{n}" for n in MATRICES], **one
    )
    unrolled = jc.compress(jc.Model(transformer, params), "sparsegpt", include=INCLUDE, **one)
    assert not any("captured whole" in note for note in small.notes)
    assert any("captured whole" in note for note in unrolled.notes)
    for path in PATHS:
        _, index, name = path.split("/")
        found, expected = small.params["layers"][name][int(index)], at(unrolled.params, path)
        assert np.mean((found == 0) == (expected == 0)) > 0.995
    assert small.apply is scanned


# ------------------------------------------------------------------ structured cuts


def removed(before, after, axis):
    """Indices of `before` along an axis that `after` lacks; other axes may be cut as well."""
    before, after = (np.moveaxis(np.asarray(x), axis, 0) for x in (before, after))
    kept, start = [], 0
    for row in after:
        start = next(i for i in range(start, len(before)) if np.isin(row, before[i]).all())
        kept.append(start)
        start += 1
    return sorted({*range(len(before))} - {*kept})


@pytest.mark.parametrize("score", ["magnitude", "activation", "wanda", "taylor"])
def test_neurons(score):
    model = own_model()
    small = jc.compress(model, "neurons", calibration=IDS, sparsity=0.5, score=score)
    assert small.apply is transformer
    masked = jax.tree.map(lambda x: x, model.params)
    for full, w in zip(masked["layers"], small.params["layers"]):
        assert w["up"].shape == (HIDDEN // 2, WIDTH)
        assert w["up_bias"].shape == (HIDDEN // 2,)
        assert w["down"].shape == (WIDTH, HIDDEN // 2)
        gone = np.array(removed(full["up"], w["up"], 0))
        if score == "magnitude":
            total = np.abs(full["up"]).sum(1) + np.abs(full["down"]).sum(0)
            assert set(gone) == set(np.argsort(total)[: HIDDEN // 2])
        full["down"] = full["down"].at[:, gone].set(0)
    np.testing.assert_allclose(small(IDS), transformer(masked, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("score", ["magnitude", "entropy", "gate"])
def test_heads(score):
    model = own_model()
    small = jc.compress(model, "heads", calibration=IDS, sparsity=0.5, score=score)
    masked = jax.tree.map(lambda x: x, model.params)
    for full, w in zip(masked["layers"], small.params["layers"]):
        assert w["q"].shape == w["k"].shape == w["v"].shape == (WIDTH, HEADS // 2, HEAD)
        assert w["o"].shape == (HEADS // 2, HEAD, WIDTH)
        gone = np.array(removed(full["o"], w["o"], 0))
        full["o"] = full["o"].at[gone].set(0)
    np.testing.assert_allclose(small(IDS), transformer(masked, IDS), rtol=1e-4, atol=1e-4)


def convnet_params():
    return {
        "stem": drawn(3, 3, 2, 8, fan=18),
        "gain": jnp.asarray(1 + 0.1 * RNG.normal(size=8), jnp.float32),
        "shift": drawn(8, fan=10),
        "inner": drawn(3, 3, 8, 12, fan=72),
        "classes": drawn(12 * 4, 5, fan=48),
    }


def convnet(params, images):
    """A norm by hand, a pool, a flatten into a dense layer."""

    def conv(x, kernel, stride):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=numbers
        )

    x = jax.nn.relu(conv(images, params["stem"], 2) * params["gain"] + params["shift"])
    x = jax.nn.relu(conv(x, params["inner"], 2))
    return x.reshape(x.shape[0], -1) @ params["classes"]


IMAGES = RNG.normal(size=(10, 8, 8, 2)).astype(np.float32)


def test_filters_of_a_convolutional_network():
    params = convnet_params()
    model = jc.Model(convnet, params)
    small = jc.compress(model, "filters", calibration=IMAGES, sparsity=0.5)
    assert small.params["stem"].shape == (3, 3, 2, 4)
    assert small.params["gain"].shape == small.params["shift"].shape == (4,)
    assert small.params["inner"].shape == (3, 3, 4, 6)
    assert small.params["classes"].shape == (6 * 4, 5)
    gone = removed(params["stem"], small.params["stem"], 3)
    gone_inner = removed(params["inner"], small.params["inner"], 3)
    classes = params["classes"].reshape(2, 2, 12, 5)
    masked = {
        **params,
        "inner": params["inner"].at[:, :, np.array(gone)].set(0),
        "classes": classes.at[:, :, np.array(gone_inner)].set(0).reshape(48, 5),
    }
    np.testing.assert_allclose(small(IMAGES), convnet(masked, IMAGES), rtol=1e-4, atol=1e-5)


def test_wanda_and_sparsegpt_of_a_convolution():
    """A window is folded into the contracted axis: rows are patches."""
    model = jc.Model(convnet, convnet_params())
    include = ["stem", "inner", "classes"]
    how = {"include": include, "calibration": IMAGES, "sequential": "none"}
    small = jc.compress(model, "wanda", **how)
    padded = np.pad(IMAGES.astype(np.float64), ((0, 0), (0, 1), (0, 1), (0, 0)))
    patches = np.stack(
        [padded[:, i : i + 8 : 2, j : j + 8 : 2] for i in range(3) for j in range(3)], axis=3
    ).reshape(-1, 18)
    kernel = np.asarray(model.params["stem"]).reshape(18, 8).T
    scores = np.abs(kernel) * np.linalg.norm(patches, axis=0)
    keep = np.argsort(np.argsort(scores, axis=1), axis=1) >= 9
    found = np.asarray(small.params["stem"]).reshape(18, 8).T
    np.testing.assert_array_equal(found, np.where(keep, kernel, 0))
    solved = jc.compress(model, "sparsegpt", **how)
    expected, _ = solver_oracle.solve(kernel, patches.T @ patches, sparsity=0.5)
    found = np.asarray(solved.params["stem"]).reshape(18, 8).T
    assert np.mean((found == 0) == (expected == 0)) > 0.98
    error = np.abs(np.asarray(solved(IMAGES)) - np.asarray(model(IMAGES))).mean()
    assert error < np.abs(np.asarray(small(IMAGES)) - np.asarray(model(IMAGES))).mean()


def recurrent(params, x):
    """A gated recurrence by hand; all gates in one matrix."""

    def step(state, row):
        h, c = state
        i, f, g, o = jnp.split(row @ params["w"] + h @ params["u"] + params["b"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    size = params["u"].shape[0]
    start = (jnp.zeros((x.shape[0], size)),) * 2
    _, states = jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(states, 0, 1) @ params["out"]


def test_units_of_a_recurrence():
    params = {
        "w": drawn(5, 4 * 8, fan=5),
        "u": drawn(8, 4 * 8, fan=8),
        "b": drawn(4 * 8, fan=4),
        "out": drawn(8, 3, fan=8),
    }
    x = RNG.normal(size=(4, 6, 5)).astype(np.float32)
    small = jc.compress(jc.Model(recurrent, params), "units", calibration=x, sparsity=0.5)
    assert {n: v.shape for n, v in small.params.items()} == {
        "w": (5, 16), "u": (4, 16), "b": (16,), "out": (4, 3)
    }  # fmt: skip
    gone = np.array(removed(params["out"], small.params["out"], 0))
    masked = {  # a unit that nobody reads
        **params, "u": params["u"].at[gone].set(0), "out": params["out"].at[gone].set(0)
    }  # fmt: skip
    np.testing.assert_allclose(small(x), recurrent(masked, x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_followed_is_refused_and_says_where():
    def mixing(params, x):
        h = jnp.sort(jax.nn.relu(x @ params["a"]), axis=-1)  # which neuron is which, data decide
        return h @ params["b"]

    params = {"a": drawn(6, 8, fan=6), "b": drawn(8, 3, fan=8)}
    x = RNG.normal(size=(5, 6)).astype(np.float32)
    with pytest.raises(InputError, match=r"neurons:.*sort.*test_own_models\.py:\d+"):
        jc.compress(jc.Model(mixing, params), "neurons", calibration=x)
    with pytest.raises(InputError, match="heads: the model has none"):
        jc.compress(jc.Model(convnet, convnet_params()), "heads", calibration=IMAGES)
    with pytest.raises(InputError, match=r"table: no product reads it"):
        jc.compress(own_model(), "sparsegpt", include="table", calibration=IDS)
    with pytest.raises(InputError, match=r"layers/0/gain"):
        jc.compress(own_model(), "wanda", include="layers/0/gain", calibration=IDS)


# ------------------------------------------------------------------ other people's libraries


def equinox_network():
    import equinox as eqx

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        norm: eqx.nn.LayerNorm
        mlp: eqx.nn.MLP  # whose activation is a leaf of the tree, and no array

        def __init__(self, key):
            keys = jax.random.split(key)
            self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
            self.norm = eqx.nn.LayerNorm(WIDTH)
            self.mlp = eqx.nn.MLP(WIDTH, WIDTH, HIDDEN, 1, key=keys[1])

        def __call__(self, x):
            y = jax.vmap(self.norm)(x)
            x = x + self.attention(y, y, y)
            return x + jax.vmap(self.mlp)(x)

    class Network(eqx.Module):
        table: eqx.nn.Embedding
        blocks: list
        out: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.table = eqx.nn.Embedding(VOCAB, WIDTH, key=keys[0])
            self.blocks = [Block(key) for key in keys[1:3]]
            self.out = eqx.nn.Linear(WIDTH, VOCAB, key=keys[3])

        def __call__(self, ids):
            x = jax.vmap(self.table)(ids)
            for block in self.blocks:
                x = block(x)
            return jax.vmap(self.out)(x)

    return Network(jax.random.key(0))


def run_network(network, ids):
    return jax.vmap(network)(ids)


MLP = ["blocks/*/mlp/layers/*/weight"]


def equinox_rows(network):
    """What the two layers of the first block's MLP read, through Equinox's own modules."""
    first = network.blocks[0]

    def one(ids):
        x = jax.vmap(network.table)(ids)
        y = jax.vmap(first.norm)(x)
        x = x + first.attention(y, y, y)
        return x, jax.nn.relu(jax.vmap(first.mlp.layers[0])(x))

    return [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in jax.vmap(one)(IDS)]


def test_equinox_masks_and_sparsegpt():
    network = equinox_network()
    model = jc.Model(run_network, network)
    how = {"include": MLP, "calibration": IDS, "sequential": "none"}
    wanda = jc.compress(model, "wanda", **how)
    solved = jc.compress(model, "sparsegpt", pattern="2:4", **how)
    assert type(wanda.params) is type(network)
    for i, rows in enumerate(equinox_rows(network)):
        weight, found, fitted = (
            np.asarray(m.blocks[0].mlp.layers[i].weight)
            for m in (network, wanda.params, solved.params)
        )
        scores = np.abs(weight) * np.linalg.norm(rows, axis=0)
        keep = np.argsort(np.argsort(scores, axis=1), axis=1) >= weight.shape[1] // 2
        np.testing.assert_array_equal(found, np.where(keep, weight, 0))
        expected, _ = solver_oracle.solve(weight, rows.T @ rows, n_m=(2, 4))
        assert np.mean((fitted == 0) == (expected == 0)) > 0.99
    np.testing.assert_allclose(solved(IDS), run_network(solved.params, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_equinox_refit_does_better():
    model = jc.Model(run_network, equinox_network())
    how = {"include": MLP, "calibration": IDS, "pattern": "2:4"}
    solved, refitted = (jc.compress(model, name, **how) for name in ("sparsegpt", "refit"))
    dense = np.asarray(model(IDS))
    assert np.mean((refitted(IDS) - dense) ** 2) < np.mean((solved(IDS) - dense) ** 2)


def test_equinox_structured_cuts():
    network = equinox_network()
    model = jc.Model(run_network, network)
    small = jc.compress(model, "neurons", calibration=IDS, sparsity=0.25)
    masked = network
    import equinox as eqx

    for i in range(2):
        layers = small.params.blocks[i].mlp.layers
        assert layers[0].weight.shape == (HIDDEN * 3 // 4, WIDTH)
        assert layers[0].bias.shape == (HIDDEN * 3 // 4,)
        assert layers[1].weight.shape == (WIDTH, HIDDEN * 3 // 4)
        before = network.blocks[i].mlp.layers
        gone = np.array(removed(before[0].weight, layers[0].weight, 0))
        masked = eqx.tree_at(
            lambda n, i=i: n.blocks[i].mlp.layers[1].weight,
            masked,
            before[1].weight.at[:, gone].set(0),
        )
    np.testing.assert_allclose(small(IDS), run_network(masked, IDS), rtol=1e-4, atol=1e-5)
    # Equinox writes the number of heads into the module: the cut program says so itself.
    fewer = jc.compress(model, "heads", calibration=IDS, sparsity=0.5)
    assert fewer.params.blocks[0].attention.query_proj.weight.shape == (WIDTH // 2, WIDTH)
    assert any("its own program" in note for note in fewer.notes)
    masked = network
    for i in range(2):
        whole, part = (m.blocks[i].attention.output_proj.weight for m in (network, fewer.params))
        gone = np.array(removed(whole, part, 1))
        assert len(gone) == WIDTH // 2
        masked = eqx.tree_at(
            lambda n, i=i: n.blocks[i].attention.output_proj.weight,
            masked,
            whole.at[:, gone].set(0),
        )
    np.testing.assert_allclose(fewer(IDS), run_network(masked, IDS), rtol=1e-4, atol=1e-5)


def test_nnx():
    try:
        from flax import nnx
    except Exception as error:  # Flax and JAX break each other in several ways
        pytest.skip(f"flax.nnx does not import under this JAX: {error}")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(16, 32, rngs=rngs)
            self.down = nnx.Linear(32, 8, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    net = Net(nnx.Rngs(0))
    model = jc.from_nnx(net)
    x = RNG.normal(size=(64, 16)).astype(np.float32)
    pruned = jc.compress(model, "wanda", calibration=x, sequential="none")
    kernel = np.asarray(model.params["up"]["kernel"])
    scores = np.abs(kernel.T) * np.linalg.norm(x.astype(np.float64), axis=0)
    keep = np.argsort(np.argsort(scores, axis=1), axis=1) >= 8
    np.testing.assert_array_equal(pruned.params["up"]["kernel"], np.where(keep.T, kernel, 0))
    small = jc.compress(model, "neurons", calibration=x, sparsity=0.5)
    assert small.params["up"]["kernel"].shape == (16, 16)
    gone = np.array(removed(kernel, small.params["up"]["kernel"], 1))
    down = np.asarray(model.params["down"]["kernel"]).copy()
    down[gone] = 0
    hidden = np.maximum(x @ kernel + np.asarray(model.params["up"]["bias"]), 0)
    np.testing.assert_allclose(
        small(x), hidden @ down + np.asarray(model.params["down"]["bias"]), rtol=1e-4, atol=1e-5
    )
