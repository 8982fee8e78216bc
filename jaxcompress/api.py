"""The verbs a person types, in Python: `load`, `evaluate`, `save`, `inspect`, `generate_text`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from jaxcompress.checkpoints import native
from jaxcompress.checkpoints.describe import describe
from jaxcompress.checkpoints.leaves import open_leaves
from jaxcompress.checkpoints.tensors import nested
from jaxcompress.checkpoints.torch_writer import save_state_dict
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.data.images import read_images
from jaxcompress.data.text import Text, token_ids
from jaxcompress.evaluation.footprint import footprint
from jaxcompress.evaluation.images import accuracy
from jaxcompress.evaluation.language import perplexity
from jaxcompress.evaluation.sentences import read_pairs, sentence_similarity
from jaxcompress.export import VERIFY_MEMORY
from jaxcompress.export import save as export_model
from jaxcompress.models import EncoderConfig, find_checkpoint, generate
from jaxcompress.models import load as load_model

__all__ = [
    "evaluate",
    "generate_text",
    "inspect",
    "load",
    "load_params",
    "save",
    "save_state_dict",
]


def load(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    config: Mapping[str, Any] | None = None,
    scan_layers: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
) -> Model:
    """A model from a directory, a hub name or a weight file, dense or compressed.

    Args:
      path: a directory with `config.json`, a name on the Hugging Face hub, or a weight file.
      arch: what a bare state dict is, where its tensors do not say: `resnet20`, `vgg11`,
        `mobilenet_v2`, `lstm`, `transformer_decoder`, `bert`.
      config: entries that complete or replace those of `config.json`, such as `{"num_heads": 8}`.
      scan_layers: stack the blocks along a leading axis and run them by one `scan`.
      dtype: of parameters and computation; None: as stored.
      revision: branch, tag or commit on the hub.

    Raises:
      InputError: no such path or name, or an architecture that has no model here.
    """
    entries = dict(config or {})
    if arch is not None:
        family, depth = _architecture(arch)
        entries["model_type"] = family
    model = load_model(
        path, scan_layers=scan_layers, dtype=dtype, revision=revision, config=entries
    )
    if arch is not None and depth is not None and depth != model.config.depth:
        raise InputError(
            f"{path}: --arch {arch}, but the tensors are those of "
            f"{arch.removesuffix(str(depth))}{model.config.depth}"
        )
    return model


def _architecture(arch: str) -> tuple[str, int | None]:
    """The `model_type` and the depth in a name such as resnet20 or vgg16."""
    match = re.fullmatch(r"(resnet|vgg)(\d*)", arch)
    if match is None:
        return ("mobilenet" if arch == "mobilenet_v2" else arch), None
    family = {"resnet": "cifar_resnet", "vgg": "vgg"}[match[1]]
    return family, int(match[2]) if match[2] else None


def load_params(path: str | os.PathLike[str]) -> Any:
    """A checkpoint as a plain pytree, without a model.

    A directory that `save` wrote natively gives back its tree bit for bit, compressed leaves
    included. Anything else (safetensors, a PyTorch `.pth`, `.pt`, `.bin`) becomes a nested dict
    by the dots of its names. Nothing in a file is executed. What `torch.nn.utils.prune` leaves
    behind (`weight_orig`, `weight_mask`) comes as the pruned `weight`.

    Raises:
      InputError: an unreadable or damaged file, or a pickle that holds more than tensors.
    """
    leaves = open_leaves(path)
    if leaves.stored == "native":
        return native.read_native(path)
    return nested({name: leaves.read(name) for name in leaves.keys()})


def evaluate(
    model: Model,
    *,
    text: Text | None = None,
    images: str | os.PathLike[str] | None = None,
    sentences: str | os.PathLike[str] | None = None,
    ctx: int = 512,
    tokens: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    against: Model | None = None,
) -> dict[str, Any]:
    """Quality and size of a model.

    Args:
      model: what is evaluated.
      text: a text file, a text, or token ids: perplexity (see `evaluation.language`).
      images: a parquet file of labelled images instead: accuracy.
      sentences: a CSV file of sentence1, sentence2, score instead: rank correlation of the
        similarity of their embeddings (see `evaluation.sentences`).
      ctx: tokens in a window.
      tokens: use only so many tokens of the text.
      stride: tokens from window to window; None: `ctx`.
      limit: use only so many images, or pairs of sentences.
      against: the dense model; adds KL and agreement, or the similarity of embeddings.

    Returns:
      `perplexity`, `tokens`, `ctx` (or `accuracy`, `images`, or `spearman`, `pairs`), `bytes`,
      `parameters`, `bits_per_weight`, and with `against` `kl` and `agreement` (or `similarity`).

    Raises:
      InputError: not one of `text`, `images` and `sentences`, or data that do not fit the model.
    """
    if sum(given is not None for given in (text, images, sentences)) != 1:
        raise InputError("evaluate: give either a text, images or sentences")
    if sentences is not None:
        found = sentence_similarity(model, read_pairs(sentences, limit), against=against)
    elif text is not None:
        if isinstance(model.config, EncoderConfig):
            raise InputError("evaluate: the model predicts no tokens; give sentences")
        if model.config is not None and not hasattr(model.config, "vocab_size"):
            raise InputError("evaluate: the model does not read token ids; give images")
        ids = token_ids(text, model.tokenizer)
        found = perplexity(model, ids, ctx=ctx, tokens=tokens, stride=stride, against=against)
    else:
        if hasattr(model.config, "vocab_size"):
            raise InputError("evaluate: the model reads token ids, not images; give a text")
        pixels, labels = read_images(images, limit)  # type: ignore[arg-type]
        found = accuracy(model, pixels, labels, against=against)
    return {**found, **footprint(model.params)}


def save(
    model: Model,
    out: str | os.PathLike[str],
    format: str = "auto",  # noqa: A002 (the user's word)
    *,
    overwrite: bool = False,
    verify_memory: int = VERIFY_MEMORY,
) -> list[str]:
    """Write a model as a directory; see `jaxcompress.export.save`."""
    return export_model(model, out, format, overwrite=overwrite, verify_memory=verify_memory)


def inspect(path: str | os.PathLike[str] | Model) -> dict[str, Any]:
    """What a checkpoint (a path or a hub name), or a model in memory, holds.

    Returns:
      `tensors`: a list of `name`, `shape`, `dtype`, `format`, `bits`, `sparsity`, `bytes`; and
      `total`: `parameters`, `bytes`, `bits_per_weight`.
    """
    return describe(path.params if isinstance(path, Model) else find_checkpoint(path))


def generate_text(
    model: Model,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """The prompt and how the model goes on from it. Raises `InputError` without a tokenizer."""
    if model.tokenizer is None:
        raise InputError("generate: the model has no tokenizer (tokenizer.json beside its weights)")
    tokenizer = model.tokenizer
    ids = tokenizer.encode_prompt(prompt)
    if not ids:
        raise InputError("generate: the prompt is empty")
    out = generate(
        model,
        ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        eos_ids=tokenizer.eos_ids,
    )
    # Decoded together: a tokenizer may strip the space that a continuation alone begins with.
    return prompt + tokenizer.decode(out)[len(tokenizer.decode(ids)) :]
