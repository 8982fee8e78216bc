"""An LSTM language model.

from network import load
logits = load()(ids)  # integer ids [batch, seq]
"""

from __future__ import annotations

import pathlib

import torch
from torch import nn

CONFIG: dict = {}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.names = CONFIG["names"]
        vocab, features, units = (
            CONFIG[name] for name in ("vocab_size", "embedding_dim", "hidden_size")
        )
        layers = (
            nn.Embedding(vocab, features),
            nn.LSTM(
                features, units, CONFIG["num_hidden_layers"], bias=CONFIG["bias"], batch_first=True
            ),
            nn.Linear(units, vocab, bias=CONFIG["output_bias"]),
        )
        for name, layer in zip(self.names, layers):
            self.add_module(name, layer)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedding, lstm, output = (self.get_submodule(name) for name in self.names)
        return output(lstm(embedding(ids))[0])


def load(path: str | None = None) -> Network:
    """The network with its weights, from the .pth beside this file if no path is given."""
    network = Network()
    beside = pathlib.Path(__file__).with_suffix(".pth")
    network.load_state_dict(torch.load(path or beside, weights_only=True))
    return network.eval()
