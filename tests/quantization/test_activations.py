"""Models with rounded activations: against PyTorch, and written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from marks import slow_but

import jaxcompress as jc
from jaxcompress.core.arrays.inputs import QuantizedInput
from jaxcompress.core.deferred import Deferred, in_memory
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.core.readers.capture import capture
from jaxcompress.evaluation.language import perplexity
from jaxcompress.models import DecoderConfig, build_model, from_state_dict, with_scan_layers
from jaxcompress.quantization.activations import activations

CONFIG = DecoderConfig(
    vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
OBSERVERS = ("minmax", "moving", "percentile", "entropy", "mse")


def ids(samples=4, ctx=16, seed=0):
    return np.random.default_rng(seed).integers(0, 61, (samples, ctx)).astype(np.int32)


@pytest.fixture(scope="module")
def quantized():
    return jc.compress(build_model(CONFIG, seed=1), "rtn", bits=8, group_size=-1)


def wrapped(model):
    leaves = leaves_with_paths(model.params)
    return {path: leaf for path, leaf in leaves if isinstance(leaf, QuantizedInput)}


def test_every_quantized_linear_layer_is_told_and_nothing_else(quantized):
    model = activations(quantized)
    assert len(wrapped(model)) == 7 * 2
    assert not any("embed" in path or "lm_head" in path for path in wrapped(model))
    everything = jc.compress(
        quantized.replace(params=jc.densify(quantized.params)), "rtn",
        bits=8, group_size=-1, include=["**/kernel", "embed/embedding"],
    )  # fmt: skip
    assert "lm_head/kernel" in wrapped(activations(everything))
    assert "embed/embedding" not in wrapped(activations(everything))
    for leaf in wrapped(model).values():
        assert (leaf.input_dtype, leaf.granularity, leaf.static) == ("int8", "token", False)
    assert model.apply is quantized.apply
    assert not jc.materialized(model.apply)(model.params, ids())


def test_one_block_is_what_compressed_tensors_arithmetic_gives(quantized):
    """The feed-forward layer of the first block, in NumPy."""
    model = activations(quantized)
    x = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    leaves = wrapped(model)

    def linear(name, x):
        scale = np.abs(x).max(-1, keepdims=True) / np.float32(127.5)
        weight = np.asarray(leaves[f"layers/0/mlp/{name}_proj/kernel"].dense(), np.float64)
        return (np.clip(np.rint(x / scale), -128, 127) * scale) @ weight

    gate, up = linear("gate", x), linear("up", x)
    want = linear("down", (gate / (1 + np.exp(-gate)) * up).astype(np.float32))

    def mlp(params, x):
        gate = jax.nn.silu(x @ params["gate"])
        return (gate * (x @ params["up"])) @ params["down"]

    params = {n: leaves[f"layers/0/mlp/{n}_proj/kernel"] for n in ("gate", "up", "down")}
    got = jax.jit(jc.lift(mlp))(params, x)
    np.testing.assert_allclose(got, want, atol=np.abs(want).max() / 60)
    assert np.abs(np.asarray(got) - want).mean() < np.abs(want).mean() * 2e-3


@pytest.mark.parametrize("sequential", [False, True])
def test_static_scales_cover_what_the_calibration_data_do(quantized, sequential):
    model = activations(
        quantized,
        calibration=ids(),
        activation_scaling="static",
        activation_sequential=sequential,
    )
    params = model.params if sequential else quantized.params
    seen = capture(model.apply, "max_abs")(params, ids())
    for path, leaf in wrapped(model).items():
        assert (leaf.granularity, leaf.static) == ("tensor", True)
        assert leaf.input_scale.shape == (1, 1)
        # In the second block a flipped code of the first may move the largest value a little.
        tolerance = 0.05 if sequential else 1e-5
        want = float(seen[path, 0]["max_abs"].max()) / 127.5
        np.testing.assert_allclose(leaf.input_scale.item(), want, rtol=tolerance)
    q, k = (wrapped(model)[f"layers/1/attn/{p}_proj/kernel"] for p in "qk")
    assert q.input_scale == k.input_scale


@pytest.mark.parametrize("observer", slow_but(OBSERVERS, ["mse"]))
def test_scanned_and_unrolled_models_get_the_same(quantized, observer):
    how = {
        "calibration": ids(),
        "activation_scaling": "static",
        "activation_range": observer,
        "activation_symmetric": observer != "minmax",
        "activation_percentile": 99.0,
    }
    one = activations(quantized, **how)
    other = activations(with_scan_layers(quantized, True), **how)
    apart = with_scan_layers(other, False)
    for path, leaf in wrapped(one).items():
        got = wrapped(apart)[path]
        np.testing.assert_allclose(got.input_scale, leaf.input_scale, rtol=1e-5)
        assert (got.input_zero_point is None) == (observer != "minmax")
    # Through the stacked blocks and one after the other it is the same function.
    np.testing.assert_allclose(other(ids()), apart(ids()), atol=1e-4)


def test_ranges_but_minmax_leave_something_out(quantized):
    scales = {}
    for observer in OBSERVERS:
        model = activations(
            quantized,
            calibration=ids(16, 32),
            activation_scaling="static",
            activation_range=observer,
            activation_percentile=99.0,
        )
        scales[observer] = np.array([leaf.input_scale.item() for leaf in wrapped(model).values()])
    assert (scales["percentile"] < scales["minmax"]).all()
    for observer in ("moving", "entropy", "mse"):
        assert (scales[observer] <= scales["minmax"] * 1.0001).all()
        assert scales[observer].min() > 0


def test_the_chosen_paths_and_dense_weights(quantized):
    only = activations(quantized, ["layers/0/mlp/up_proj/kernel"])
    assert set(wrapped(only)) == {"layers/0/mlp/up_proj/kernel"}
    dense = build_model(CONFIG, seed=1)
    model = activations(dense, dense_weights=True, activations="fp8")
    assert len(wrapped(model)) == 14
    np.testing.assert_array_equal(
        wrapped(model)["layers/0/mlp/up_proj/kernel"].dense(),
        dense.params["layers"]["0"]["mlp"]["up_proj"]["kernel"],
    )
    gap = np.abs(np.asarray(model(ids()) - dense(ids())))
    assert 0 < gap.max() < 0.2 * float(jnp.abs(dense(ids())).max())
    # Once more, otherwise: not in addition.
    again = activations(model, activations="int8", dense_weights=True)
    assert not any(isinstance(leaf.weight, QuantizedInput) for leaf in wrapped(again).values())
    assert {leaf.input_dtype for leaf in wrapped(again).values()} == {"int8"}


def test_a_strangers_function_with_a_convolution():
    rng = np.random.default_rng(0)
    params = {
        "conv": jnp.asarray(rng.normal(size=(3, 3, 2, 8)), jnp.float32),
        "table": jnp.asarray(rng.normal(size=(5, 8)), jnp.float32),
        "out": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
    }

    def apply(params, images, kinds):
        y = jax.lax.conv_general_dilated(
            images, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jax.nn.relu(y).mean((1, 2)) + params["table"][kinds]
        return y @ params["out"]

    images = rng.normal(size=(8, 6, 6, 2)).astype(np.float32)
    kinds = rng.integers(0, 5, (8, 1))[:, 0].astype(np.int32)
    axes = jc.contractions(apply)(params, images, kinds)
    base = jc.Model(apply, jc.quantize(params, bits=8, group_size=-1, include="*", axes=axes))
    data = (images, kinds[:, None])

    def with_pairs(params, images, kinds):
        return apply(params, images, kinds[:, 0])

    model = activations(
        base.replace(apply=with_pairs),
        calibration=data,
        activation_scaling="static",
        activation_range="percentile",
        activation_percentile=100.0,
    )
    assert set(wrapped(model)) == {"conv", "out"}  # rows of the table are read, not multiplied
    np.testing.assert_allclose(
        wrapped(model)["conv"].input_scale.item(), np.abs(images).max() / 127.5, rtol=2e-3
    )
    want = np.asarray(base(images, kinds))
    np.testing.assert_allclose(model(*data), want, atol=0.03 * np.abs(want).max())


class TorchLSTM(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(61, 24)
        self.lstm = torch.nn.LSTM(24, 32, 2, batch_first=True)
        self.fc = torch.nn.Linear(32, 61)

    def forward(self, ids):
        return self.fc(self.lstm(self.embedding(ids))[0])


class DynamicLSTM:
    """PyTorch's quantized LSTM from its quantized products; sees all that they round."""

    def __init__(self, twin, theirs):
        self.embedding, self.fc = twin.embedding, theirs.fc
        layers = torch.nn.ModuleDict()
        for name, weight in twin.lstm.named_parameters():
            if "weight" in name:
                layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
                layer.weight, layer.bias = (
                    weight,
                    getattr(twin.lstm, name.replace("weight", "bias")),
                )
                layers[name.removeprefix("weight_")] = layer
        self.layers = torch.ao.quantization.quantize_dynamic(layers, {torch.nn.Linear})

    def product(self, layer, x):
        scale, _ = torch._choose_qparams_per_tensor(x, reduce_range=True)
        steps = x.double().numpy() / scale
        self.nearest = min(self.nearest, np.abs(steps - np.floor(steps) - 0.5).min())
        return layer(x)

    def __call__(self, given):
        """Logits, and the distance of the nearest border between two codes, in steps."""
        self.nearest = 1.0
        x = self.embedding(given)
        for index in range(2):
            inputs = self.product(self.layers[f"ih_l{index}"], x)
            hidden = cell = torch.zeros(len(x), 32)
            out = []
            for step in range(x.shape[1]):
                gates = inputs[:, step] + self.product(self.layers[f"hh_l{index}"], hidden)
                i, f, g, o = gates.chunk(4, 1)
                cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
                hidden = torch.sigmoid(o) * torch.tanh(cell)
                out.append(hidden)
            x = torch.stack(out, 1)
        return self.product(self.fc, x), self.nearest


def test_a_dynamic_int8_lstm_is_that_of_pytorch():
    """`quantize_dynamic`: int8 weights per tensor; on x86, inputs of 7 bits with a zero point.

    Equal in all digits of float32, unless a value that is rounded lies between two codes to within
    what float32 leaves open: sigmoid and tanh differ from PyTorch's by up to 1.2e-7, 2e-5 of a
    step; PyTorch multiplies by the reciprocal of a scale, where we divide, as compressed-tensors
    does. Then one code flips, and moves what its sequence computes after it by no more than
    rounding itself does. So sequences go through one by one, and those that come nowhere nearer to
    a border than 5e-5 steps must be equal.
    """
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        pytest.skip("inputs have 8 bits on other platforms")
    twin = TorchLSTM().eval()
    theirs = torch.ao.quantization.quantize_dynamic(twin, {torch.nn.LSTM, torch.nn.Linear})
    state = {name: value.numpy() for name, value in twin.state_dict().items()}
    weights = jc.compress(
        from_state_dict(state, "lstm"), "rtn", bits=8, granularity="tensor", include="**/kernel"
    )
    model = activations(
        weights, activations="int7", activation_granularity="tensor", activation_symmetric=False
    )
    written_out = DynamicLSTM(twin, theirs)
    clear, gaps, errors = [], [], []
    with torch.no_grad():
        for row in ids(12, 20):
            given = torch.tensor(row[None])
            want, dense = theirs(given).numpy(), twin(given).numpy()
            by_hand, nearest = written_out(given)
            np.testing.assert_array_equal(by_hand, want)
            clear.append(nearest > 5e-5)
            gaps.append(np.abs(np.asarray(model(row[None])) - want).max())
            errors.append(np.abs(want - dense).max())
    clear, gaps = np.array(clear), np.array(gaps)
    assert clear.mean() >= 0.5
    assert gaps[clear].max() < 2e-7
    assert gaps.max() < max(errors)
    assert min(errors) > 1e-3
    row = ids(1, 20)
    with torch.no_grad():
        dense = twin(torch.tensor(row)).numpy()
    eight = activations(weights)
    assert np.abs(eight(row) - dense).max() < max(errors)


def test_what_lies_on_the_disk_is_told_when_it_is_read(quantized):
    reads = []

    def deferred(path, leaf):
        return Deferred.of(leaf, lambda: reads.append(path) or leaf)

    lazy = activations(quantized.replace(params=map_with_paths(deferred, quantized.params)))
    assert not reads
    here = lazy.replace(params=jax.tree.map(in_memory, lazy.params))
    np.testing.assert_array_equal(here(ids()), activations(quantized)(ids()))


def test_refusals(quantized):
    dense = build_model(CONFIG, seed=1)
    with pytest.raises(InputError, match="activations: no weight is quantized; run a method"):
        activations(dense)
    with pytest.raises(InputError, match="static scales need calibration data"):
        activations(quantized, activation_scaling="static")
    with pytest.raises(InputError, match="activations fp8: has no zero point"):
        activations(quantized, activations="fp8", activation_symmetric=False)
    with pytest.raises(InputError, match="no parameter 'layers/7'"):
        activations(quantized, ["layers/7"])
    with pytest.raises(InputError, match="calibration data tell which are weights"):
        activations(jc.Model(dense.apply, dense.params), dense_weights=True)


@pytest.mark.slow
def test_tinystories_stays_near_dense(assets):
    model = jc.load(assets / "tinystories-656k")
    text = (assets / "text" / "tinystories-valid.txt").read_text()[:300_000]
    tokens = np.asarray(model.tokenizer.encode(text), np.int32)
    calibration, held_out = tokens[: 16 * 256].reshape(16, 256), tokens[-20 * 256 :]

    def ppl(model):
        return perplexity(model, held_out, ctx=256)["perplexity"]

    weights = jc.compress(model, "rtn", bits=8, group_size=-1)
    dense, dynamic = ppl(model), ppl(activations(weights))
    per_tensor = ppl(activations(weights, activation_granularity="tensor"))
    static = {
        observer: ppl(
            activations(
                weights,
                calibration=calibration,
                activation_scaling="static",
                activation_range=observer,
            )
        )
        for observer in OBSERVERS
    }
    assert dense < dynamic < 1.01 * dense
    assert dynamic < per_tensor < 1.03 * dense
    assert dynamic < min(static.values())
    assert max(static.values()) < 1.04 * dense
    assert min(static["percentile"], static["mse"]) < static["minmax"]
