"""Linear layers of low rank as two: `X.0` from the inputs to the rank, `X.1` to the outputs.

from two_linear import load

model = load()        # the model of transformers that config.json beside this file describes
model = load(module)  # a module whose linear layers have the names of the state dict
"""

from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent


def load(module: nn.Module | None = None) -> nn.Module:
    """The module with the weights of `two_linear.pth`, ready to run."""
    state = torch.load(HERE / "two_linear.pth", weights_only=True)
    if module is None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(HERE)
        dtype = next(iter(state.values())).dtype
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name in [n.removesuffix(".0.weight") for n in state if n.endswith(".0.weight")]:
        if isinstance(module.get_submodule(name), nn.Sequential):
            continue  # it was two layers before
        (rank, inputs), outputs = state[f"{name}.0.weight"].shape, len(state[f"{name}.1.weight"])
        first = nn.Linear(inputs, rank, bias=False)
        second = nn.Linear(rank, outputs, bias=f"{name}.1.bias" in state)
        parent, _, child = name.rpartition(".")
        both = nn.Sequential(first, second).to(state[f"{name}.0.weight"].dtype)
        setattr(module.get_submodule(parent), child, both)
    tied = getattr(module, "_tied_weights_keys", None) or ()
    missing, unexpected = module.load_state_dict(state, strict=False)
    lacking = [name for name in missing if name not in tied]
    if lacking or unexpected:
        raise ValueError(f"not in the weights: {lacking}; not in the module: {unexpected}")
    return module.eval()
