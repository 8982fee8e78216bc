"""A model in 3 bits, and low rank factors beside it that win back what it lost.

    jaxcompress run --config configs/qlora.py --workdir qlora

The factors begin at what quantization lost (LoftQ) and train alone: codes and scales stay. With
`rtn` and `lora` in the place of `loftq` they begin as nothing (QLoRA).
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Text other than Python's sources: change `data.train` and `data.heldout`."""
    config = config_dict.ConfigDict()
    config.name = "qlora"
    config.seed = 0
    config.model = {"path": "builtin:py4m"}
    config.data = {
        "train": "python-stdlib",
        "heldout": "python-stdlib:heldout",
        "ctx": 256,
        "tokens": 20_480,
    }
    config.stages = (
        {"method": "loftq", "rank": 8, "bits": 3, "group_size": 64, "symmetric": False},
        {
            "method": "distill",
            "train": "factors",
            "steps": 60,
            "batch_size": 16,
            "learning_rate": 2e-3,
            "warmup": 5,
            "wins_back": 0.25,
            "checkpoint_every": 20,
        },
        {"method": "export", "path": "model", "format": "native"},
    )
    return config
