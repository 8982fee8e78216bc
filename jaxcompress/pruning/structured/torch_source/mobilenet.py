"""A MobileNetV2 whose layers have any number of channels.

from network import load
logits = load()(images)  # float images [batch, channels, height, width]
"""

from __future__ import annotations

import pathlib

import torch
from torch import nn

CONFIG: dict = {}


def normed(
    channels_in: int, channels: int, size: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels, CONFIG["batch_norm_epsilon"], CONFIG["batch_norm_momentum"]),
    ]


class Block(nn.Module):
    def __init__(
        self, width_in: int, expanded: int, width: int, stride: int, residual: bool
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if expanded:
            layers.append(nn.Sequential(*normed(width_in, expanded, 1), nn.ReLU6()))
        inner = expanded or width_in
        layers.append(nn.Sequential(*normed(inner, inner, 3, stride, inner), nn.ReLU6()))
        self.conv = nn.Sequential(*layers, *normed(inner, width, 1))
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = CONFIG["stem_width"]
        stem = normed(CONFIG["channels"], width, 3, CONFIG["stem_stride"])
        layers: list[nn.Module] = [nn.Sequential(*stem, nn.ReLU6())]
        rows = (CONFIG[name] for name in ("expanded", "widths", "strides", "residuals"))
        for expanded, width_out, stride, residual in zip(*rows):
            layers.append(Block(width, expanded, width_out, stride, residual))
            width = width_out
        layers.append(nn.Sequential(*normed(width, CONFIG["last_width"], 1), nn.ReLU6()))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(CONFIG["last_width"], CONFIG["num_classes"])
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def load(path: str | None = None) -> Network:
    """The network with its weights, from the .pth beside this file if no path is given."""
    network = Network()
    beside = pathlib.Path(__file__).with_suffix(".pth")
    network.load_state_dict(torch.load(path or beside, weights_only=True))
    return network.eval()
