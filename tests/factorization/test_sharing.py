"""Layers that share their parameters: one function, held, counted and stored once."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Blocks, Model
from jaxcompress.evaluation.footprint import footprint
from jaxcompress.factorization.sharing import share, share_shapes
from jaxcompress.models import (
    DecoderConfig,
    build_model,
    functions_of,
    share_layers,
    unshare_layers,
    with_scan_layers,
)

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
)
MAP = [0, 0, 1, 0]
IDS = np.random.default_rng(0).integers(0, 61, (4, 12), np.int32)


@pytest.fixture(scope="module")
def model():
    made = build_model(CONFIG)
    return made.replace(params=jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, made.params))


def written_out(model, layer_map, weights):
    """The same network with a copy for every layer, in NumPy."""
    layers = model.params["layers"]
    groups = {n: [layers[str(i)] for i, m in enumerate(layer_map) if m == n] for n in layer_map}
    means = {
        n: jax.tree.map(lambda *x: np.mean([np.asarray(y) for y in x], axis=0), *group)
        if weights == "mean"
        else group[0]
        for n, group in groups.items()
    }
    copies = {str(i): means[n] for i, n in enumerate(layer_map)}
    return {**model.params, "layers": copies}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("weights", ["mean", "first"])
def test_it_is_the_network_with_copies(model, scan, weights):
    copies = written_out(model, MAP, weights)
    want = model.apply(copies, IDS)
    given = with_scan_layers(model, True) if scan else model
    shared = share_layers(given, MAP, weights=weights)
    np.testing.assert_allclose(shared(IDS), want, rtol=1e-4, atol=1e-4)
    own = shared.params["layers"]
    assert (jax.tree.leaves(own)[0].shape[0] == 2) if scan else (set(own) == {"0", "1"})
    whole = unshare_layers(shared)
    assert whole.config == given.config
    np.testing.assert_allclose(whole(IDS), want, rtol=1e-4, atol=1e-4)


def test_its_gradient_is_the_sum_over_the_layers_that_share(model):
    shared = share_layers(model, MAP, weights="first")

    def loss(apply):
        return lambda params: jnp.square(apply(params, IDS)).mean()

    got = jax.grad(loss(shared.apply))(shared.params)
    copies = jax.grad(loss(model.apply))(written_out(model, MAP, "first"))["layers"]
    want = jax.tree.map(lambda *x: sum(x), *(copies[i] for i in "013"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        got["layers"]["0"],
        want,
    )


def test_it_counts_and_trains_once(model):
    shared = share_layers(model, MAP)
    per_block = footprint(model.params["layers"]["0"])["bytes"]
    assert footprint(shared.params)["bytes"] == footprint(model.params)["bytes"] - 2 * per_block
    fresh = functions_of(shared.config).init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, shared.params)
    assert functions_of(shared.config) is functions_of(share_layers(model, [5, 5, 9, 5]).config)
    tokens = jc.generate(shared, [1, 2, 3], 4)
    assert list(tokens) == list(jc.generate(unshare_layers(shared), [1, 2, 3], 4))


def test_stored_once_and_exported_with_copies(model, tmp_path):
    import transformers

    shared = share_layers(model, MAP)
    lines = jc.save(shared, tmp_path / "native")
    assert "native" in lines[0]
    assert json.loads((tmp_path / "native" / "config.json").read_text())["layer_map"] == MAP
    back = jc.load(tmp_path / "native")
    assert back.config.layer_map == tuple(MAP)
    np.testing.assert_array_equal(back(IDS), shared(IDS))
    jc.save(shared, tmp_path / "dense", format="dense")
    size = {
        name: sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors"))
        for name in ("native", "dense")
    }
    assert size["native"] < 0.65 * size["dense"]
    assert "layer_map" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    import torch

    with torch.no_grad():
        logits = theirs(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(shared(IDS), logits, atol=1e-4 * np.ptp(logits))


def test_shared_layers_are_compressed_as_one_and_go_through_lift(model, tmp_path):
    shared = share_layers(model, MAP)
    small = jc.compress(shared, "rtn", bits=8, group_size=16)
    assert jc.is_compressed(small.params["layers"]["1"]["mlp"]["up_proj"]["kernel"])
    whole = jc.compress(unshare_layers(shared), "rtn", bits=8, group_size=16)
    np.testing.assert_allclose(small(IDS), whole(IDS), rtol=1e-4, atol=1e-4)
    jc.save(small, tmp_path / "small")
    np.testing.assert_array_equal(jc.load(tmp_path / "small")(IDS), small(IDS))


def kl(model, params, want):
    got = np.asarray(jax.nn.log_softmax(model.apply(params, IDS)), np.float64)
    want = np.asarray(jax.nn.log_softmax(want), np.float64)
    return (np.exp(want) * (want - got)).sum(-1).mean()


def test_the_search_takes_the_best_pair_of_neighbours(model):
    want = model(IDS)
    layers = [model.params["layers"][str(i)] for i in range(4)]
    found = {}
    for i, which in itertools.product(range(3), ("mean", "first", "last")):
        pair = layers[i : i + 2]
        both = {"first": pair[0], "last": pair[1]}.get(
            which, jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        )
        tried = [*layers[:i], both, both, *layers[i + 2 :]]
        params = {**model.params, "layers": {str(j): b for j, b in enumerate(tried)}}
        found[i, which] = (kl(model, params, want), params)
    best = min(found, key=lambda choice: found[choice][0])
    shared = share(model, calibration=IDS, layers=3)
    wanted = [0, 1, 2, 3]
    wanted = [n - (j > best[0]) for j, n in enumerate(wanted)]
    assert list(shared.config.layer_map) == wanted
    np.testing.assert_allclose(shared(IDS), model.apply(found[best][1], IDS), atol=1e-4)
    told = float(shared.notes[-1].split()[-1])
    assert told == pytest.approx(found[best][0], rel=1e-3)


def test_equal_layers_share_first_and_cost_nothing(model):
    layers = dict(model.params["layers"])
    layers["2"] = layers["1"]
    twin = model.replace(params={**model.params, "layers": layers})
    shared = share(twin, calibration=IDS, layers=3, loss="mse")
    assert shared.config.layer_map == (0, 1, 1, 2)
    np.testing.assert_allclose(shared(IDS), twin(IDS), atol=1e-5)
    one = share(model, calibration=IDS, layers=1, weights="first")
    assert one.config.layer_map == (0, 0, 0, 0)
    shapes = share_shapes(model, layers=1)
    assert jax.tree.map(jnp.shape, shapes.params) == jax.tree.map(jnp.shape, one.params)


def test_a_model_of_ones_own():
    rng = np.random.default_rng(0)
    params = {"blocks": [{"w": jnp.asarray(rng.normal(size=(8, 8)) / 3)} for _ in range(3)]}
    walk = Blocks(
        embed=lambda params, x: x,
        block=lambda block, x: x + jnp.tanh(x @ block["w"]),
        head=lambda params, x: x,
        where="blocks",
    )
    own = Model(walk.run, params, blocks=walk)
    x = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    shared = jc.compress(own, "share", calibration=np.asarray(x), layers=2, loss="mse")
    assert len(shared.params["blocks"]) == 2
    assert shared(x).shape == x.shape
    np.testing.assert_allclose(unshare_layers(shared)(x), shared(x), rtol=1e-5)
    assert len(unshare_layers(shared).params["blocks"]) == 3


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(InputError, match="layers 5: the model has 4"):
        share(model, calibration=IDS, layers=5)
    with pytest.raises(InputError, match="3 entries for a model of 4 layers"):
        share_layers(model, [0, 0, 1])
    shared = share_layers(model, MAP)
    with pytest.raises(InputError, match="no Blocks"):
        share(shared, calibration=IDS, layers=1)
    with pytest.raises(InputError, match=r"write \[0, 1, 0, 0\]"):
        functions_of(type(CONFIG)(**{**vars(CONFIG), "layer_map": (1, 0, 1, 1)}))
