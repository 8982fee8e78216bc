"""`builtin:py4m`: a Llama of 4 million parameters, trained on Python's standard library.

    jaxcompress run --config configs/py4m.py --workdir py4m

About 75 minutes on two cores. The weights that come with the package were made by this config on
Python 3.11: another Python has another standard library, and so another model.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Next-token training from scratch, then a Hugging Face directory in bfloat16."""
    config = config_dict.ConfigDict()
    config.name = "py4m"
    config.seed = 0
    config.model = {
        "architecture": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 4096,
            "hidden_size": 256,
            "intermediate_size": 384,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        "tokenizer": "train:4096",
        "compute_dtype": "bfloat16",
    }
    config.data = {"train": "python-stdlib", "heldout": "python-stdlib:heldout", "ctx": 256}
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.stages = (
        {
            "method": "finetune",
            "steps": 4500,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "warmup": 60,
            "optimizer_options": {"b2": 0.95},
            "log_every": 20,
            "checkpoint_every": 100,
        },
        {"method": "export", "path": "model", "format": "dense", "dtype": "bfloat16"},
    )
    return config
