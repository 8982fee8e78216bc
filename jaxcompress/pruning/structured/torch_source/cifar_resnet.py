"""A CIFAR ResNet whose blocks may differ in their inner channels.

from network import load
logits = load()(images)  # float images [batch, channels, height, width]
"""

from __future__ import annotations

import pathlib

import torch
from torch import nn
from torch.nn import functional

CONFIG: dict = {}


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, CONFIG["batch_norm_epsilon"], CONFIG["batch_norm_momentum"])


class Block(nn.Module):
    def __init__(self, width_in: int, inner: int, width: int, stride: int, front: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, inner, 3, stride, 1, bias=False)
        self.bn1 = norm(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, 1, 1, bias=False)
        self.bn2 = norm(width)
        self.stride, self.pads = stride, (0, 0, 0, 0, front, width - width_in - front)
        self.shortcut = nn.Sequential()
        if CONFIG["shortcut"] == "B" and (stride != 1 or width_in != width):
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), norm(width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if CONFIG["shortcut"] == "A" and x.shape != y.shape:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], self.pads)
        return functional.relu(y + self.shortcut(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths, inner = CONFIG["widths"], iter(CONFIG["inner_widths"])
        self.conv1 = nn.Conv2d(CONFIG["channels"], widths[0], 3, 1, 1, bias=False)
        self.bn1 = norm(widths[0])
        width_in = widths[0]
        for stage, (size, width) in enumerate(zip(CONFIG["stage_sizes"], widths), 1):
            blocks = []
            for index in range(size):
                first = stage > 1 and index == 0
                front = CONFIG["pads"][stage - 2] if first else 0
                blocks.append(Block(width_in, next(inner), width, 1 + first, front))
                width_in = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.stages = len(widths)
        self.linear = nn.Linear(width_in, CONFIG["num_classes"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.linear(x.mean(dim=(2, 3)))


def load(path: str | None = None) -> Network:
    """The network with its weights, from the .pth beside this file if no path is given."""
    network = Network()
    beside = pathlib.Path(__file__).with_suffix(".pth")
    network.load_state_dict(torch.load(path or beside, weights_only=True))
    return network.eval()
