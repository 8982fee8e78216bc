"""The `nn.TransformerDecoder` model with half of its output layer cut, brought back by MSE."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.distillation import distill
from jaxcompress.models import TransformerDecoderConfig, build_model

CONFIG = TransformerDecoderConfig(
    vocab_size=48,
    d_model=32,
    num_heads=4,
    dim_feedforward=64,
    num_hidden_layers=1,
    max_positions=16,
    causal_memory=True,
)

STEPS = 50


def drawn_ids(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (16, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def dense():
    """A model whose hidden states lie in few directions, as those of trained models do."""
    model = build_model(CONFIG)
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(6, CONFIG.d_model)).astype(np.float32)

    def drawn(entries):
        return {"embedding": rng.normal(size=(entries, 6)).astype(np.float32) @ directions}

    params = {
        **model.params,
        "embed": drawn(CONFIG.vocab_size),
        "positions": drawn(CONFIG.max_positions),
        "head": {**model.params["head"], "kernel": 3 * model.params["head"]["kernel"]},
    }
    return model.replace(params=params)


def test_half_of_fc_is_cut_and_tuned_back_by_plain_optax(dense):
    cut = jc.compress(dense, "magnitude", sparsity=0.5, include="head/kernel", store="masked")
    trainable, frozen = jc.split(cut.params, include="head/**")
    found = distill(cut, dense, loss="mse", chunk=6)
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-2, STEPS), weight_decay=0.01)

    def mse(trainable, ids, constants):
        params = jc.merge(trainable, frozen)
        total, count = found.function(params, {"ids": ids}, None, constants)["loss"]
        return total / count

    @jax.jit
    def step(trainable, state, ids, constants):
        value, slope = jax.value_and_grad(mse)(trainable, ids, constants)
        updates, state = optimizer.update(slope, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = optimizer.init(trainable), []
    for i in range(STEPS):  # fresh tokens in every step: each loss is that of unseen ones
        trainable, state, value = step(trainable, state, drawn_ids(i), found.constants)
        losses.append(float(value))
    logits = jc.lift(cut.apply)(cut.params, drawn_ids(0)) - dense(drawn_ids(0))
    np.testing.assert_allclose(losses[0], jnp.square(logits)[:, :-1].mean(), rtol=1e-5)
    assert np.mean(losses[-5:]) < losses[0] / 3

    params = jc.merge(trainable, frozen)
    old, new = cut.params["head"]["kernel"], params["head"]["kernel"]
    assert np.asarray(old.mask).sum() == old.mask.size // 2
    np.testing.assert_array_equal(new.mask, old.mask)
    np.testing.assert_array_equal(np.asarray(jc.dense(new)) != 0, np.asarray(jc.dense(old)) != 0)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(cut.params), jax.tree.leaves(params), strict=True
    )
    moved = [path for (path, before), after in pairs if not np.array_equal(before, after)]
    assert sorted(jax.tree_util.keystr(p, simple=True, separator="/") for p in moved) == [
        "head/bias",
        "head/kernel/weight",
    ]
