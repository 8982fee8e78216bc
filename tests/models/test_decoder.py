"""The decoder computes what transformers computes, for each variant of the architecture."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxcompress.models.decoder import DecoderConfig
from jaxcompress.models.families import model_from_tensors

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 100.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 1e4,
    },
}
VARIANTS = {
    "llama2": (transformers.LlamaConfig, {}),
    "llama3": (
        transformers.LlamaConfig,
        {"num_key_value_heads": 2, "rope_parameters": ROPE["llama3"], "tie_word_embeddings": True},
    ),
    "llama_bias": (
        transformers.LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "num_key_value_heads": 3},
    ),
    "linear": (transformers.LlamaConfig, {"rope_parameters": ROPE["linear"]}),
    "dynamic": (
        transformers.LlamaConfig,
        {"rope_parameters": ROPE["dynamic"], "max_position_embeddings": 16},
    ),
    "yarn": (transformers.LlamaConfig, {"rope_parameters": ROPE["yarn"]}),
    "yarn_deepseek": (
        transformers.LlamaConfig,
        {
            "rope_parameters": ROPE["yarn"]
            | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}
        },
    ),
    "mistral": (transformers.MistralConfig, {"num_key_value_heads": 2, "sliding_window": 7}),
    "mistral_full": (
        transformers.MistralConfig,
        {"num_key_value_heads": 2, "sliding_window": None},
    ),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2}),
    "qwen2_mixed": (
        transformers.Qwen2Config,
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (
        transformers.Qwen3Config,
        {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    ),
}


def torch_model(variant: str, **changes):
    """A transformers model with weights far from their initial values, biases and norms too."""
    kind, fields = VARIANTS[variant]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES | fields | changes)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.copy_(torch.randn_like(value) * 0.3 + ("norm" in name))
            else:
                value.normal_(std=value.shape[-1] ** -0.5 * 1.5)
    return model


def ours(model, *, scan_layers=False, **changes):
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    config = DecoderConfig.from_hf(model.config.to_dict())
    config = dataclasses.replace(config, scan_layers=scan_layers, **changes)
    return model_from_tensors(config, tensors.__getitem__, tensors)


def assert_close(got, want):
    """Within 1e-4 of the spread of the logits."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() < 1e-4 * (want.max() - want.min())


def token_ids(seq=24, batch=2, seed=0):
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (batch, seq))


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, scan_layers):
    twin = torch_model(variant)
    ids = token_ids()
    with torch.no_grad():
        want = twin(torch.from_numpy(ids)).logits.numpy()
    model = ours(twin, scan_layers=scan_layers)
    assert_close(jax.jit(model.apply)(model.params, ids), want)
