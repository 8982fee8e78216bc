"""Optimizers against PyTorch's, schedules against closed forms, and what decays."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from training_cases import decoder, perceptron, points, squared_error

from jaxcompress.core.arrays.affine import encode_affine, minmax_range
from jaxcompress.core.errors import InputError
from jaxcompress.core.partition import split
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.training.optimizers import decays, learning_rate_schedule, make_optimizer
from jaxcompress.training.step import init_state, make_step

STEPS = 6


class Twin(torch.nn.Module):
    """The perceptron of `training_cases` in PyTorch."""

    def __init__(self, params):
        super().__init__()
        self.named = {}
        for path, leaf in leaves_with_paths(params):
            self.named[path] = torch.nn.Parameter(torch.tensor(np.asarray(leaf)))
            self.register_parameter(path.replace("/", "_"), self.named[path])

    def forward(self, x):
        p = self.named
        h = torch.tanh(x * p["norm/scale"] @ p["first/kernel"] + p["first/bias"])
        return h @ p["second/kernel"] + p["second/bias"]


def batches():
    rng = np.random.default_rng(0)
    return [points(rng, 8) for _ in range(STEPS)]


def ours(optimizer):
    model = perceptron()
    step = jax.jit(make_step(squared_error(model), optimizer))
    trainable, frozen = split(model.params)
    state, found = init_state(trainable, optimizer), []
    for batch in batches():
        state, metrics = step(state, frozen, None, batch)
        found.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return dict(leaves_with_paths(state.trainable)), found


def theirs(make, clip, rate_of):
    """Parameters, and (loss, gradient norm) of each step, by a plain PyTorch loop."""
    twin = Twin(perceptron().params)
    groups = [
        {"params": [p for n, p in twin.named.items() if "kernel" in n]},
        {"params": [p for n, p in twin.named.items() if "kernel" not in n], "weight_decay": 0.0},
    ]
    optimizer = make(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_of)
    found = []
    for batch in batches():
        optimizer.zero_grad()
        x, y = (torch.tensor(batch[name]) for name in "xy")
        loss = (twin(x) - y).square().sum(-1).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), clip)
        found.append((loss.item(), norm.item()))
        optimizer.step()
        schedule.step()
    return {name: p.detach().numpy() for name, p in twin.named.items()}, found


def cosine(step):
    return (1 + math.cos(math.pi * step / STEPS)) / 2


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_adamw_is_that_of_pytorch(clip):
    got, metrics = ours(
        make_optimizer("adamw", steps=STEPS, learning_rate=0.02, weight_decay=0.3, clip=clip)
    )
    want, expected = theirs(
        lambda groups: torch.optim.AdamW(groups, lr=0.02, weight_decay=0.3), clip, cosine
    )
    np.testing.assert_allclose(metrics, expected, rtol=2e-5)
    assert (metrics[0][1] > clip) == (clip == 0.5)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-4, atol=2e-6, err_msg=name)


def test_sgd_is_that_of_pytorch():
    got, _ = ours(
        make_optimizer(
            "sgd",
            steps=STEPS,
            learning_rate=0.05,
            schedule="linear",
            weight_decay=0.1,
            clip=None,
            momentum=0.9,
            nesterov=True,
        )
    )
    want, _ = theirs(
        lambda groups: torch.optim.SGD(
            groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1
        ),
        1e9,
        lambda step: 1 - step / STEPS,
    )
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_decoupled_decay_follows_the_learning_rate_and_spares_vectors(name):
    """With a gradient of 0 all that is left is the decay: w <- w (1 - rate_t * decay)."""
    params = {"kernel": jnp.full((4, 4), 2.0), "bias": jnp.full((4,), 2.0)}
    optimizer = make_optimizer(
        name, steps=STEPS, learning_rate=0.1, weight_decay=0.5, schedule="linear"
    )
    state, expected = optimizer.init(params), 2.0
    for step in range(STEPS):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        expected *= 1 - 0.1 * (1 - step / STEPS) * 0.5
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-6)
    np.testing.assert_array_equal(params["bias"], 2.0)


def test_stacked_norms_and_scales_of_quantized_arrays_do_not_decay():
    model = decoder(scan_layers=True, num_hidden_layers=3, attention_bias=True)
    kernel = model.params["lm_head"]["kernel"].T
    scale, zero = minmax_range(kernel, bits=4, groups=2, symmetric=True)
    params = {**model.params, "lm_head": {"kernel": encode_affine(kernel, scale, zero, bits=4)}}
    trainable, _ = split(params)
    flat = jax.tree_util.tree_flatten_with_path(decays(trainable))[0]
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): flag for path, flag in flat}
    assert params["layers"]["input_norm"]["scale"].ndim == 2
    assert {path for path, flag in found.items() if flag} == {
        "embed/embedding",
        *(f"layers/attn/{name}_proj/kernel" for name in "qkvo"),
        *(f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")),
    }
    assert {path for path, flag in found.items() if not flag} == {
        "final_norm/scale",
        "layers/input_norm/scale",
        "layers/post_attention_norm/scale",
        *(f"layers/attn/{name}_proj/bias" for name in "qkv"),
        "lm_head/kernel/scale",
    }


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
        ("linear", lambda done: 1 - done),
        ("constant", lambda done: 1.0),
    ],
)
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_are_their_closed_forms(name, after, warmup):
    rate = learning_rate_schedule(name, steps=25, learning_rate=0.3, warmup=warmup)
    for step in range(26):
        done = (step - warmup) / (25 - warmup)
        expected = 0.3 * (step / warmup if step < warmup else after(done))
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5, abs=1e-7), step


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "adamv"}, "optimizer 'adamv': unknown; .*adamw"),
        ({"schedule": "cosin"}, "schedule 'cosin': unknown; .*cosine"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"warmup": 10}, "warmup 10 of 10 steps"),
        ({"clip": 0.0}, "clip 0.0"),
        ({"weight_decay": -1.0}, "weight_decay -1.0"),
        ({"beta2": 0.9}, "optimizer adamw: .*beta2"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(options, text):
    with pytest.raises(InputError, match=text) as caught:
        make_optimizer(**{"steps": 10, **options})
    assert "\n" not in str(caught.value)
