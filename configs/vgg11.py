"""A VGG-11 of 0.69 million parameters, trained on 15,000 images of CIFAR-10.

    jaxcompress run --config configs/vgg11.py --workdir vgg11 \\
        --config.data.train=train.parquet --config.data.heldout=test.parquet

About 15 minutes of one core. Where structured pruning begins: `benchmarks/convnet_filters.py`.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Column A of the paper, a quarter to three eighths as wide, with one linear layer."""
    config = config_dict.ConfigDict()
    config.name = "vgg11"
    config.seed = 0
    config.model = {
        "architecture": {
            "model_type": "vgg",
            "layers": [24, "M", 48, "M", 96, 96, "M", 128, 128, "M", 128, 128, "M"],
            "num_classes": 10,
        }
    }
    config.data = {"train": "train.parquet", "heldout": "test.parquet", "images": 2000}
    config.stages = (
        {
            "method": "finetune",
            "batch_norm": "batch",
            "steps": 1404,  # 12 epochs
            "batch_size": 128,
            "learning_rate": 3e-3,
            "warmup": 100,
            "weight_decay": 0.05,
            "log_every": 20,
            "checkpoint_every": 100,
        },
        {"method": "export", "path": "model"},
    )
    return config
