"""A VGG with batch norm whose layers have any number of filters.

from network import load
logits = load()(images)  # float images [batch, channels, height, width]
"""

from __future__ import annotations

import pathlib

import torch
from torch import nn

CONFIG: dict = {}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = CONFIG["channels"]
        for filters in CONFIG["layers"]:
            if filters == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [
                nn.Conv2d(channels, filters, 3, 1, 1),
                nn.BatchNorm2d(
                    filters, CONFIG["batch_norm_epsilon"], CONFIG["batch_norm_momentum"]
                ),
                nn.ReLU(),
            ]
            channels = filters
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(CONFIG["pool_size"])
        units, hidden = channels * CONFIG["pool_size"] ** 2, list[nn.Module]()
        for size in CONFIG["hidden"]:
            hidden += [nn.Linear(units, size), nn.ReLU(), nn.Dropout()]
            units = size
        last = nn.Linear(units, CONFIG["num_classes"])
        self.classifier = nn.Sequential(*hidden, last) if hidden else last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


def load(path: str | None = None) -> Network:
    """The network with its weights, from the .pth beside this file if no path is given."""
    network = Network()
    beside = pathlib.Path(__file__).with_suffix(".pth")
    network.load_state_dict(torch.load(path or beside, weights_only=True))
    return network.eval()
