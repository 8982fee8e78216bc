"""PyTorch twins of the models that transformers does not have, and how results are compared."""

import math

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional


def scramble(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, biases, norms and running statistics far from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                norm = name.endswith("weight") or "norm" in name
                value.copy_(noise * 0.3 + float(norm and name.endswith("weight")))
            else:
                fan = math.prod(value.shape[1:]) if "embedding" not in name else 4
                value.copy_(noise * 1.5 * fan**-0.5)
        for name, value in module.named_buffers():
            if name.endswith("running_mean"):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return module.eval()


def assert_close(got, want, tolerance: float = 1e-4) -> None:
    """Within `tolerance` of the spread (max - min) of the wanted values."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() < tolerance * (want.max() - want.min())


def run(model, inputs):
    """Outputs of one of our models, compiled: faster than compiling operation by operation."""
    return jax.jit(model.apply)(model.params, inputs)


class LSTMModel(nn.Module):
    """`nn.Embedding`, `nn.LSTM`, `nn.Linear`."""

    def __init__(self, vocab=50, embedding=12, hidden=16, layers=2, bias=True):
        super().__init__()
        self.embedding = nn.Embedding(vocab, embedding)
        self.rnn = nn.LSTM(embedding, hidden, layers, bias=bias, batch_first=True)
        self.decoder = nn.Linear(hidden, vocab)

    def forward(self, ids):
        return self.decoder(self.rnn(self.embedding(ids))[0])


class DecoderModel(nn.Module):
    """The tutorial form `decoder(tgt, memory, tgt_mask)`."""

    def __init__(
        self,
        vocab=50,
        width=16,
        heads=4,
        feedforward=32,
        layers=2,
        *,
        activation="relu",
        norm_first=False,
        final_norm=False,
        positions="learned",
        memory="embedded",
        causal_memory=False,
        bias=True,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        if positions == "learned":
            self.pos_embedding = nn.Embedding(40, width)
        layer = nn.TransformerDecoderLayer(
            width, heads, feedforward, 0.1, activation, batch_first=True,
            norm_first=norm_first, bias=bias,
        )  # fmt: skip
        norm = nn.LayerNorm(width, bias=bias) if final_norm else None
        self.transformer_decoder = nn.TransformerDecoder(layer, layers, norm)
        self.fc = nn.Linear(width, vocab)
        self.width, self.memory, self.causal_memory = width, memory, causal_memory

    def forward(self, ids):
        seq = ids.shape[1]
        x = self.embedding(ids)
        if hasattr(self, "pos_embedding"):
            x = x + self.pos_embedding(torch.arange(seq))
        else:
            x = x * math.sqrt(self.width) + self.sinusoids(seq)
        mask = nn.Transformer.generate_square_subsequent_mask(seq)
        memory = x if self.memory == "embedded" else torch.zeros_like(x)
        memory_mask = mask if self.causal_memory else None
        return self.fc(self.transformer_decoder(x, memory, tgt_mask=mask, memory_mask=memory_mask))

    def sinusoids(self, seq):
        """As in PyTorch's tutorial "Language Modeling with nn.Transformer"."""
        position = torch.arange(seq).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, self.width, 2) * (-math.log(10000.0) / self.width))
        pe = torch.zeros(seq, self.width)
        pe[:, 0::2] = torch.sin(position * div_term)
        pe[:, 1::2] = torch.cos(position * div_term)
        return pe


class _BasicBlock(nn.Module):
    def __init__(self, width_in, width, stride, option, inner=None, pad=None):
        super().__init__()
        inner = inner or width
        self.conv1 = nn.Conv2d(width_in, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pads = None
        if width_in != width and option == "A":
            before = (width - width_in) // 2 if pad is None else pad
            self.pads = (0, 0, 0, 0, before, width - width_in - before)
        self.shortcut = nn.Sequential()
        if width_in != width and option == "B":
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.pads:
            x = functional.pad(x[:, :, ::2, ::2], self.pads)
        return functional.relu(y + self.shortcut(x))


class ResNetModel(nn.Module):
    """The CIFAR ResNet with option A or B shortcuts.

    `inner`: channels between the convolutions of each block; `pads`: zero channels before.
    """

    def __init__(
        self,
        sizes=(3, 3, 3),
        widths=(16, 32, 64),
        option="A",
        classes=10,
        inner=None,
        pads=(None, None),
    ):
        super().__init__()
        inner = iter(inner or [None] * sum(sizes))
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        width_in = widths[0]
        for stage, (size, width) in enumerate(zip(sizes, widths), 1):
            blocks = []
            for index in range(size):
                stride = 2 if stage > 1 and index == 0 else 1
                pad = pads[stage - 2] if stride == 2 else None
                blocks.append(_BasicBlock(width_in, width, stride, option, next(inner), pad))
                width_in = width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(width_in, classes)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return self.linear(x.mean(dim=(2, 3)))
