"""Quantization-aware training of the model that comes along: 3 bits, against itself as the teacher.

    jaxcompress run --config configs/qat.py --workdir qat
    jaxcompress run --config configs/qat.py:2 --workdir qat2         # 2 bits

Post-training quantization is the first stage of the same list; the second trains the model as
that stage quantizes it, from the whole model, and ends with what was trained, bit for bit.
"""

from ml_collections import config_dict


def get_config(bits: str = "3") -> config_dict.ConfigDict:
    """Text other than Python's sources: change `data.train` and `data.heldout`."""
    config = config_dict.ConfigDict()
    config.name = "qat"
    config.seed = 0
    config.model = {"path": "builtin:py4m"}
    config.data = {
        "train": "python-stdlib",
        "heldout": "python-stdlib:heldout",
        "ctx": 256,
        "tokens": 20_480,
    }
    config.stages = (
        {
            "method": "distill",
            "quantize": {"method": "rtn", "bits": int(bits), "group_size": 64, "symmetric": False},
            "steps": 100,
            "batch_size": 16,
            "learning_rate": 5e-4,
            "warmup": 10,
            "checkpoint_every": 25,
        },
        {"method": "export", "path": "model"},
    )
    return config
