"""Rounded activations and caches: 8 bits static, dynamic and of weights alone; an LSTM.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/activations.py [--models tinystories,py4m]
        [--parts language,lstm] [--tokens 60000]

The language models round to nearest, a scale per row of a matrix (W4: per 128 columns), static
scales from 32 x 512 tokens of the training text; perplexity and KL(dense || model) are of held-out
text. The LSTM is that of `lstm_units.py`, trained here on TinyStories text; PyTorch quantizes it
(`torch.ao.quantization.quantize_dynamic`), and we do in the same way. What is done is kept in
`--workdir`, and a second call goes on from there.
"""

import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np
from lstm_units import trained
from peers import Kept, models
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.data.text import calibration_batch, token_ids
from jaxcompress.quantization.activations import activations
from jaxcompress.quantization.observers import STATISTICS

CTX, SEQUENCES, STEPS = 512, 64, 600
STATIC = {"activation_scaling": "static"}


def language_rows():
    """(name, weights, activations) of each row: options of `rtn` and of `activations`."""
    w8 = {"bits": 8, "group_size": -1}
    yield "W8", w8, None
    yield "W8A8 dynamic, a scale per token", w8, {}
    yield "W8A8 dynamic, a scale per batch", w8, {"activation_granularity": "tensor"}
    for observer in STATISTICS:
        yield f"W8A8 static, {observer}", w8, {**STATIC, "activation_range": observer}
    yield (
        "W8A8 static, mse, zero point", w8,
        {**STATIC, "activation_range": "mse", "activation_symmetric": False},
    )  # fmt: skip
    w4 = {"bits": 4, "group_size": 128}
    yield "W4", w4, None
    yield "W4A8 dynamic, a scale per token", w4, {}
    yield "W4A8 static, mse", w4, {**STATIC, "activation_range": "mse"}
    fp8 = {"dtype": "fp8", "granularity": "channel"}
    yield "FP8 weights", fp8, None
    yield "FP8 W8A8 dynamic, a scale per token", fp8, {"activations": "fp8"}
    yield "FP8 W8A8 static, minmax", fp8, {"activations": "fp8", **STATIC}


def language(name, args):
    """The table of a language model."""
    path, train, heldout = models(name)[name]
    dense = jc.load(path, dtype="float32")
    ids = token_ids(heldout, dense.tokenizer)[: args.tokens]
    given = calibration_batch(train, dense.tokenizer, samples=32, ctx=512, seed=0)
    kept = Kept(args.workdir / f"{name}-{len(ids)}.json")
    columns = ["", "perplexity", "against dense", "KL", "same first choice"]
    table = Table(f"{name}, {len(ids)} held-out tokens", columns)

    def quality(make):
        found = jc.evaluate(make(), text=ids, ctx=CTX, against=dense)
        return {name: found[name] for name in ("perplexity", "kl", "agreement")}

    base = kept("dense", lambda: quality(lambda: dense))["perplexity"]

    def add(row, make):
        found = kept(row, lambda: quality(make))
        change = f"{found['perplexity'] / base - 1:+.2%}"
        values = (f"{found['perplexity']:.4f}", change, f"{found['kl']:.2e}")
        table.add(row, *values, f"{found['agreement']:.2%}")

    def rounded(weights, inputs):
        small = jc.compress(dense, "rtn", **weights)
        if inputs is None:
            return small
        data = given if "activation_scaling" in inputs else None
        return activations(small, calibration=data, **inputs)

    table.add("dense", f"{base:.4f}", "", "", "")
    for row, weights, inputs in language_rows():
        add(row, lambda weights=weights, inputs=inputs: rounded(weights, inputs))
    for row, options in (("dynamic, a scale per token", {}), ("static, minmax", STATIC)):
        add(
            f"SmoothQuant W8A8 {row}",
            lambda options=options: jc.compress(dense, "smoothquant", calibration=given, **options),
        )
    for dtype in ("int8", "fp8", "int4"):
        add(f"KV cache {dtype}", lambda dtype=dtype: jc.quantize_kv_cache(dense, dtype))
    return table


def lstm(args):
    """The tables of the LSTM."""
    texts = models("tinystories")["tinystories"]
    model = trained(args.workdir / "lstm", {"train": texts[1], "heldout": texts[2]}, STEPS)
    tokens = token_ids(texts[2], model.tokenizer)[: SEQUENCES * 64].reshape(SEQUENCES, 64)
    twin, theirs = torch_twins(model)
    rounded = jc.compress(model, "rtn", bits=8, granularity="tensor", include="**/kernel")
    alike = {
        "activations": "int7",
        "activation_granularity": "tensor",
        "activation_symmetric": False,
    }
    outputs = {
        "PyTorch, float32": logits(twin, tokens),
        "float32": logits(model, tokens),
        "PyTorch, int8 dynamic": logits(theirs, tokens),
        "int8 dynamic, as PyTorch (7 bits and a zero point)": logits(
            activations(rounded, **alike), tokens
        ),
        "int8 dynamic, a scale per token": logits(activations(rounded), tokens),
    }
    table = Table(
        f"An LSTM of two layers of 128 units, {SEQUENCES} sequences of 64 tokens, one by one",
        ["", "perplexity", "from float32: max", "mean", "from PyTorch's int8: max", "mean",
         "outputs equal to 1e-6", "sequences equal to 1e-6"],
    )  # fmt: skip
    for name, found in outputs.items():
        gap = np.abs(found - outputs["PyTorch, float32"])
        other = np.abs(found - outputs["PyTorch, int8 dynamic"])
        table.add(
            name, f"{perplexity(found, tokens):.4f}", f"{gap.max():.1e}", f"{gap.mean():.1e}",
            f"{other.max():.1e}", f"{other.mean():.1e}", f"{np.mean(other < 1e-6):.1%}",
            f"{np.mean((other < 1e-6).all((1, 2))):.1%}",
        )  # fmt: skip
    return table


def torch_twins(model):
    """The LSTM in PyTorch, in float32 and quantized."""
    import torch
    from safetensors.torch import load_file

    config = model.config

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            width, hidden = config.embedding_dim, config.hidden_size
            self.embedding = torch.nn.Embedding(config.vocab_size, width)
            self.lstm = torch.nn.LSTM(width, hidden, config.num_hidden_layers, batch_first=True)
            self.fc = torch.nn.Linear(hidden, config.vocab_size)

        def forward(self, ids):
            with torch.no_grad():
                return self.fc(self.lstm(self.embedding(torch.tensor(ids)))[0]).numpy()

    twin = Twin().eval()
    with tempfile.TemporaryDirectory() as folder:
        jc.save(model, folder, "dense")
        twin.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    layers = {torch.nn.LSTM, torch.nn.Linear}
    return twin, torch.ao.quantization.quantize_dynamic(twin, layers)


def logits(model, tokens):
    """Of each sequence alone, `[sequences, tokens, vocabulary]`: one for all has one scale."""
    if isinstance(model, jc.Model):
        model = partial(jax.jit(jc.lift(model.apply)), model.params)
    return np.concatenate([np.asarray(model(row[None])) for row in tokens])


def perplexity(logits, tokens):
    """Of the tokens but the first of each sequence."""
    logits = logits[:, :-1].astype(np.float64)
    sums = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    right = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return float(np.exp((sums - right).mean()))


def main():
    """Prints and writes the tables."""
    args = arguments(
        __doc__, models="tinystories,py4m", parts="language,lstm", tokens=60_000,
        workdir=Path("activations-work"),
    )  # fmt: skip
    args.workdir.mkdir(parents=True, exist_ok=True)
    tables = []
    if "language" in args.parts:
        tables += [language(name, args) for name in args.models.split(",")]
    if "lstm" in args.parts:
        tables.append(lstm(args))
    notes = [
        "Matrices and their inputs, without embeddings and head; windows of 512 tokens. A scale "
        "per batch: of 16 windows or fewer, as they come. KV cache: a scale per head and token, "
        "nothing else rounded.",
        "PyTorch multiplies int8 weights by 7 bits of the inputs on x86. Given the same inputs its "
        "products are ours but where a value lies within rounding of float32 between two codes: "
        "PyTorch multiplies by the reciprocal of a scale, we divide as compressed-tensors does, "
        "and sigmoid and tanh differ in the last place. One code that differs moves what the "
        "sequence computes after it.",
    ]
    write(args.out, "activations", __doc__, tables, notes)


if __name__ == "__main__":
    main()
