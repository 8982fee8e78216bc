"""Distil, cut the width, fine-tune, 4 bits: of a language model, and of a convolutional network.

    jaxcompress run --config configs/distil_prune_quantize.py --workdir small
    jaxcompress run --config configs/distil_prune_quantize.py:images --workdir cnn \\
        --config.stages[0].teacher=resnet20.th \\
        --config.data.train=train.parquet --config.data.heldout=test.parquet

The report has the size, the quality and the speed after each stage. The language model is
`builtin:py4m`: a layer less, a quarter of the width and a third of the neurons less, 4 bits in
groups of 64, written for compressed-tensors. The convolutional network is a fresh ResNet-14 that
learns from a ResNet-20, loses a quarter of its filters and trains on under 4 bits. A few minutes
each.
"""

from ml_collections import config_dict

LANGUAGE = (
    {"method": "distill", "layers": 4, "steps": 60, "learning_rate": 1e-3},
    {"method": "width", "sparsity": 0.25, "multiple": 64},
    {
        "method": "neurons",
        "sparsity": 1 / 3,
        "multiple": 64,
        "score": "activation_l2",
        "compensate": "refit",
    },
    {"method": "finetune", "steps": 60, "learning_rate": 1e-3, "wins_back": 1 / 3},
    {"method": "gptq", "bits": 4, "group_size": 64},
    {"method": "export", "path": "model", "format": "compressed-tensors"},
)
IMAGES = (
    {
        "method": "distill",
        "teacher": "resnet20.th",
        "loss": "kl",
        "alpha": 0.9,
        "temperature": 4.0,
        "steps": 400,
        "learning_rate": 3e-3,
    },
    {"method": "filters", "sparsity": 0.25, "allocation": "global", "minimum": 4},
    {"method": "finetune", "batch_norm": "batch", "steps": 100, "learning_rate": 1e-3},
    {
        "method": "finetune",
        "quantize": {"method": "rtn", "bits": 4, "granularity": "channel"},
        "steps": 50,
        "learning_rate": 2e-4,
    },
    {"method": "export", "path": "model", "format": "native"},
)


def get_config(kind: str = "language") -> config_dict.ConfigDict:
    """Other text or images: change `data.train` and `data.heldout`."""
    config = config_dict.ConfigDict()
    config.name = f"distil, prune, quantize: {kind}"
    config.seed = 0
    training = {"batch_size": 16, "warmup": 5, "checkpoint_every": 20}
    if kind == "language":
        config.model = {"path": "builtin:py4m"}
        config.data = {
            "train": "python-stdlib",
            "heldout": "python-stdlib:heldout",
            "ctx": 256,
            "tokens": 20_480,
            "speed": True,
        }
    else:
        config.model = {"architecture": {"model_type": "cifar_resnet", "stage_sizes": [2, 2, 2]}}
        data = {"train": "train.parquet", "heldout": "test.parquet"}
        config.data = {**data, "images": 2000, "speed": True}
        training |= {"batch_size": 64, "checkpoint_every": 100}
    stages = LANGUAGE if kind == "language" else IMAGES
    config.stages = tuple({**training, **s} if "steps" in s else s for s in stages)
    return config
