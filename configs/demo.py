"""The main job on the model that comes along: a layer less, half of the weights, 4 bits.

    jaxcompress run --config configs/demo.py --workdir demo
    jaxcompress run --config configs/demo.py --workdir other --config.model.path=DIRECTORY

Drop one layer and distil back, remove two of four weights and fine-tune the rest, round to 4 bits,
export to compressed-tensors, and compare the export with what transformers computes from it in
PyTorch. The run fails unless each recovery wins back a third of what the cut before it cost.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Text other than Python's sources: change `data.train` and `data.heldout`."""
    config = config_dict.ConfigDict()
    config.name = "demo"
    config.seed = 0
    config.model = {"path": "builtin:py4m"}
    config.data = {
        "train": "python-stdlib",
        "heldout": "python-stdlib:heldout",
        "ctx": 256,
        "tokens": 20_480,
    }
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.stages = (
        {"method": "depth", "drop": 1},
        {
            "method": "distill",
            "steps": 60,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "warmup": 5,
            "temperature": 2.0,
            "wins_back": 1 / 3,
            "checkpoint_every": 20,
        },
        {"method": "magnitude", "pattern": "2:4"},
        {
            "method": "finetune",
            "steps": 40,
            "batch_size": 16,
            "learning_rate": 5e-4,
            "warmup": 5,
            "wins_back": 1 / 3,
            "checkpoint_every": 20,
        },
        {"method": "rtn", "bits": 4, "group_size": 128},
        {"method": "export", "format": "compressed-tensors", "compare": True},
    )
    return config
