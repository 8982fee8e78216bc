"""Outputs of every reference model against PyTorch's, on the same weights.

    [JAXCOMPRESS_ASSETS=DIR] python benchmarks/logits_table.py

Random weights far from their initial values, float32; each model with its layers unrolled and
scanned. The differences are the largest over all outputs, absolute and relative to the spread
(max - min) of PyTorch's; the models of PyTorch are those of `transformers`, and of
`tests/models/torch_twins.py`. The real weights of JAXCOMPRESS_ASSETS where it is set.
"""

import dataclasses
import os
import sys
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from tables import Table, arguments, largest_difference, write

import jaxcompress as jc
from jaxcompress.models import GPT2Config, from_state_dict, model_from_tensors

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "models"))
from decoder_variants import VARIANTS, ours, token_ids, torch_logits, torch_model
from torch_twins import DecoderModel, LSTMModel, ResNetModel, scramble

GPT2 = {"vocab_size": 97, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4}
GPT2_VARIANTS = {
    "gpt2": {},
    "gpt2, scaled by layer, relu": {
        "scale_attn_by_inverse_layer_idx": True, "n_inner": 40, "activation_function": "relu",
    },
    "gpt2, untied, unscaled": {"tie_word_embeddings": False, "scale_attn_weights": False},
}  # fmt: skip
LSTMS = {
    "LSTM": {},
    "LSTM, one layer, no bias": {"layers": 1, "bias": False},
    "LSTM, three layers": {"hidden": 9, "layers": 3},
}
DECODERS = {
    "TransformerDecoder": {},
    "TransformerDecoder, norm first, gelu": {
        "norm_first": True, "final_norm": True, "activation": "gelu",
    },
    "TransformerDecoder, no memory, sinusoids": {"memory": "zeros", "positions": "sinusoidal"},
    "TransformerDecoder, causal memory, no bias": {
        "causal_memory": True, "bias": False, "final_norm": True,
    },
}  # fmt: skip
RESNETS = {
    "ResNet-20, option A": {},
    "ResNet, option B, odd sizes": {
        "sizes": (1, 2, 1), "widths": (8, 12, 20), "option": "B", "classes": 7,
    },
}  # fmt: skip
IMAGES = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)


def arrays(module):
    """State of a PyTorch module."""
    return {name: value.numpy() for name, value in module.state_dict().items()}


@torch.no_grad()
def torch_outputs(module, x):
    """Outputs of a twin; images go in channels first."""
    if x.ndim == 4:
        x = x.transpose(0, 3, 1, 2)
    return module(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def scanned(model, tensors):
    """The same weights with the layers stacked."""
    config = dataclasses.replace(model.config, scan_layers=True)
    return model_from_tensors(config, tensors.__getitem__, tensors)


def pairs():
    """(name, unrolled model, scanned model or None, inputs, PyTorch's outputs), one by one."""
    for name in VARIANTS:
        twin, ids = torch_model(name), token_ids()
        yield name, ours(twin), ours(twin, scan_layers=True), ids, torch_logits(twin, ids)
    for name, changes in GPT2_VARIANTS.items():
        twin = scramble(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | changes)))
        tensors, ids = arrays(twin), token_ids()
        config = GPT2Config.from_hf(twin.config.to_dict())
        model = model_from_tensors(config, tensors.__getitem__, tensors)
        yield name, model, scanned(model, tensors), ids, torch_logits(twin, ids)
    ids = token_ids() % 50
    for name, shape in LSTMS.items():
        twin = scramble(LSTMModel(**shape))
        yield name, from_state_dict(twin.state_dict(), "lstm"), None, ids, torch_outputs(twin, ids)
    for name, options in DECODERS.items():
        twin = scramble(DecoderModel(**options))
        told = {k: v for k, v in options.items() if k not in ("bias", "final_norm", "positions")}
        told["scale_embedding"] = options.get("positions") == "sinusoidal"
        model = from_state_dict(twin.state_dict(), "transformer_decoder", num_heads=4, **told)
        yield name, model, scanned(model, arrays(twin)), ids, torch_outputs(twin, ids)
    for name, shape in RESNETS.items():
        twin = scramble(ResNetModel(**shape))
        model = from_state_dict(twin.state_dict(), "cifar_resnet")
        yield name, model, None, IMAGES, torch_outputs(twin, IMAGES)


def real_pairs(assets):
    """The same of trained weights."""
    path = assets / "tinystories-656k"
    twin = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = (assets / "text" / "tinystories-valid.txt").read_text()[:20_000]
    ids = np.asarray(tokenizer(text, add_special_tokens=False).input_ids)[: 4 * 512].reshape(4, -1)
    stacked = jc.load(path, scan_layers=True)
    yield "TinyStories-656K, trained", jc.load(path), stacked, ids, torch_logits(twin, ids)
    path = assets / "cifar-resnet20" / "resnet20-12fca82f.th"
    stored = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    twin = ResNetModel().eval()
    twin.load_state_dict({n.removeprefix("module."): v for n, v in stored.items()}, strict=False)
    yield "ResNet-20, trained", jc.load(path), None, IMAGES, torch_outputs(twin, IMAGES)


def difference(model, x, want):
    """Largest difference of outputs, compiled."""
    return (
        None if model is None else largest_difference(jax.jit(model.apply)(model.params, x), want)
    )


def main():
    """Prints and writes the table."""
    args = arguments(__doc__)
    transformers.utils.logging.disable_progress_bar()
    columns = ["model", "outputs", "spread", "unrolled", "relative", "scanned", "relative, scanned"]
    table = Table("Largest difference of outputs to PyTorch", columns)
    found = list(pairs())
    if "JAXCOMPRESS_ASSETS" in os.environ:
        found += real_pairs(Path(os.environ["JAXCOMPRESS_ASSETS"]))
    for name, model, stacked, x, want in found:
        spread = float(want.max() - want.min())
        unrolled, scan = difference(model, x, want), difference(stacked, x, want)
        shape = " x ".join(map(str, want.shape))
        relative = None if scan is None else scan / spread
        table.add(name, shape, spread, unrolled, unrolled / spread, scan, relative)
    write(args.out, "logits_table", __doc__, [table])


if __name__ == "__main__":
    main()
