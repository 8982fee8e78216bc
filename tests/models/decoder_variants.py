"""Small random models of transformers, one per variant of the decoder."""

import dataclasses

import numpy as np
import torch
import transformers

from jaxcompress.models import DecoderConfig, model_from_tensors

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}
Llama, Mistral = transformers.LlamaConfig, transformers.MistralConfig
Qwen2, Qwen3 = transformers.Qwen2Config, transformers.Qwen3Config
VARIANTS = {
    "llama2": (Llama, {}),
    "llama3": (
        Llama,
        {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "llama_bias": (
        Llama,
        {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "num_key_value_heads": 3},
    ),
    "linear": (
        Llama,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "dynamic": (
        Llama,
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
            "max_position_embeddings": 16,
        },
    ),
    "yarn": (Llama, {"rope_parameters": YARN}),
    "yarn_deepseek": (
        Llama,
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}},
    ),
    "mistral": (Mistral, {"num_key_value_heads": 2, "sliding_window": 7}),
    "mistral_full": (Mistral, {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": (Qwen2, {"num_key_value_heads": 2}),
    "qwen2_mixed": (
        Qwen2,
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (Qwen3, {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
}


def torch_model(variant, **changes):
    """A model of transformers with weights far from their initial values."""
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


def ours(model, **changes):
    """Our model with the weights of one of transformers; `changes` of its config."""
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    config = dataclasses.replace(DecoderConfig.from_hf(model.config.to_dict()), **changes)
    return model_from_tensors(config, tensors.__getitem__, tensors)


def token_ids(seq=24, batch=2, seed=0):
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (batch, seq))


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()
