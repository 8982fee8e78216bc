"""The type a model computes in, apart from that of its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.core.arrays.affine import encode_affine, minmax_range
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Blocks, Model
from jaxcompress.core.readers.lift import lift, materialized
from jaxcompress.models import DecoderConfig, build_model
from jaxcompress.models.layers import Linear, RMSNorm
from jaxcompress.models.precision import with_compute_dtype

CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
HALF = jnp.bfloat16


def test_a_reference_model_keeps_its_parameters_and_computes_in_the_other_type():
    model = build_model(CONFIG)
    half = with_compute_dtype(model, "bfloat16")
    assert half.params is model.params
    assert half.config.dtype == "bfloat16"
    assert half.config.param_dtype == "float32"
    ids = jnp.arange(12)[None] % 32
    whole, logits = model(ids), half(ids)
    assert logits.dtype == HALF
    assert half.blocks.run(half.params, ids).dtype == HALF
    error = np.abs(np.asarray(logits, np.float32) - whole).max() / np.abs(whole).max()
    assert 1e-4 < error < 0.03
    back = with_compute_dtype(half, "float32")
    np.testing.assert_array_equal(back(ids), whole)


def plain() -> Model:
    """A model without config, of two blocks that are walked in another place than `layers`."""
    rng = np.random.default_rng(0)
    params = {
        "table": jnp.asarray(rng.normal(size=(10, 8)), jnp.float32),
        "net": {"body": [{"w": jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)}] * 2},
        "steps": jnp.int32(3),
    }
    blocks = Blocks(
        embed=lambda params, ids, shift: params["table"][ids] + shift,
        block=lambda params, hidden: jnp.tanh(hidden @ params["w"]),
        head=lambda params, hidden: hidden @ params["table"].T,
        where="net/body",
        trunk=lambda params, ids, shift: jnp.tanh(params["table"][ids] + shift),
    )

    def apply(params, ids, shift, scale=None):
        assert params["steps"].dtype == jnp.int32
        assert ids.dtype == jnp.int32
        assert scale is None or scale.dtype == shift.dtype
        return blocks.run(params, ids, shift)

    return Model(apply, params, blocks=blocks)


def test_a_model_without_config_has_parameters_and_floating_inputs_cast():
    model = plain()
    half = with_compute_dtype(model, "bfloat16")
    ids, shift = jnp.arange(4, dtype=jnp.int32)[None], np.ones((4, 8), np.float32)
    logits = half(ids, shift, scale=np.float32([2.0]))
    assert logits.dtype == HALF
    assert half.params["table"].dtype == jnp.float32
    expected = model.apply(
        {**jax.tree.map(lambda x: x.astype(HALF), model.params), "steps": jnp.int32(3)},
        ids,
        shift.astype(HALF),
    )
    np.testing.assert_array_equal(logits, expected)


def test_other_blocks_are_cast_one_by_one():
    half = with_compute_dtype(plain(), "bfloat16")
    ids, shift = jnp.arange(4, dtype=jnp.int32)[None], np.ones((4, 8), np.float32)
    assert half.blocks.where == "net/body"
    hidden = half.blocks.embed(half.params, ids, shift)
    assert hidden.dtype == HALF
    block = half.blocks.of(half.params)[0]
    assert half.blocks.block(block, hidden.astype(jnp.float32)).dtype == HALF
    assert half.blocks.trunk(half.params, ids, shift).dtype == HALF
    assert half.blocks.head(half.params, hidden).dtype == HALF


def test_a_compressed_leaf_is_cast_without_being_made_dense():
    model = plain()
    matrix = model.params["table"].T  # stored [n, k] = [8, 10]
    scale, zero = minmax_range(matrix, bits=8, groups=1, symmetric=True)
    w = encode_affine(matrix, scale, zero, bits=8)  # a kernel [10, 8]

    def apply(params, x):
        return x @ params["w"]

    half = with_compute_dtype(Model(apply, {"w": w}), "bfloat16")
    x = np.ones((3, 10), np.float32)
    assert lift(half.apply)(half.params, x).dtype == HALF
    assert not materialized(half.apply)(half.params, x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_biases_and_norms_round_as_half_precision_does(dtype):
    """Made in float32 for the sake of their gradients: the same bits as in half precision."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(64, 33)), dtype)
    norm = RMSNorm(dtype=dtype)
    scale = {"scale": jnp.asarray(rng.normal(size=33), jnp.float32)}
    plain = norm.apply({"params": {"scale": jnp.ones(33)}}, x)
    np.testing.assert_array_equal(
        norm.apply({"params": scale}, x), plain * scale["scale"].astype(dtype)
    )
    kernel = jnp.asarray(rng.normal(size=(33, 17)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=17), jnp.float32)
    without = Linear(17, dtype=dtype).apply({"params": {"kernel": kernel}}, x)
    biased = Linear(17, use_bias=True, dtype=dtype)
    np.testing.assert_array_equal(
        biased.apply({"params": {"kernel": kernel, "bias": bias}}, x), without + bias.astype(dtype)
    )


def test_another_dtype_is_refused():
    with pytest.raises(InputError, match="'int8': use float32, bfloat16 or float16"):
        with_compute_dtype(plain(), "int8")
