"""VGG-16 with batch norm, trained and then pruned by a quarter of its filters, twice.

    jaxcompress run --config configs/vgg16.py --workdir vgg16 \\
        --config.data.train=train.parquet --config.data.heldout=test.parquet

14.7 million parameters, 0.63 GFLOPs an image of 32 x 32 pixels: for an accelerator.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Column D of the paper's table 1, with one linear layer."""
    config = config_dict.ConfigDict()
    config.name = "vgg16"
    config.seed = 0
    config.model = {"architecture": {"model_type": "vgg", "depth": 16, "num_classes": 10}}
    config.data = {"train": "train.parquet", "heldout": "test.parquet"}
    training = {
        "method": "finetune",
        "batch_norm": "batch",
        "batch_size": 128,
        "weight_decay": 0.05,
        "checkpoint_every": 100,
    }
    cut = {"method": "filters", "sparsity": 0.25, "allocation": "global", "multiple": 8}
    config.stages = (
        {**training, "steps": 3000, "learning_rate": 2e-3, "warmup": 200},
        cut,
        {**training, "steps": 500, "learning_rate": 5e-4, "wins_back": 0.5},
        cut,
        {**training, "steps": 500, "learning_rate": 5e-4, "wins_back": 0.5},
        {"method": "export", "path": "model"},
    )
    return config
