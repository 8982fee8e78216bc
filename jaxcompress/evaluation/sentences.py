"""Sentence embeddings: rank correlation with people's judgement, and fidelity to a dense model."""

from __future__ import annotations

import csv
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.checkpoints.huggingface import read_json
from jaxcompress.checkpoints.tensors import file_errors
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.evaluation.running import Placement, lifted
from jaxcompress.evaluation.slices import over_slices
from jaxcompress.progress import progress

SHORTEST = 16  # tokens that a batch is padded to at least; longer ones to powers of two
_COLUMNS = ("sentence1", "sentence2", "score")
# Modules of sentence-transformers that the cosine of two embeddings is understood through.
_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


class Pairs(NamedTuple):
    """Pairs of sentences, and how alike people found them: float64 `[pairs]`."""

    first: list[str]
    second: list[str]
    scores: np.ndarray


def read_pairs(path: str | os.PathLike[str], limit: int | None = None) -> Pairs:
    """Pairs from a CSV file with the columns sentence1, sentence2 and score.

    A first line whose third entry is no number names the columns, in any order and with others
    among them; without one the three are the first three.

    Args:
      path: the file, UTF-8.
      limit: use only so many pairs.

    Raises:
      InputError: an unreadable file, a missing column, a score that is no number, or no pairs.
    """
    with file_errors("read", Path(path)), open(path, newline="", encoding="utf-8") as file:
        try:
            rows = [row for row in csv.reader(file) if row]
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}: no CSV file ({str(error)[:80]})") from None
    places = [0, 1, 2]
    if rows and not (len(rows[0]) > 2 and _is_number(rows[0][2])):
        header = rows.pop(0)
        missing = [name for name in _COLUMNS if name not in header]
        if missing:
            raise InputError(f"{path}: no column {missing[0]!r}; give {', '.join(_COLUMNS)}")
        places = [header.index(name) for name in _COLUMNS]
    rows = rows[:limit]
    if not rows:
        raise InputError(f"{path}: no pairs of sentences in it")
    for number, row in enumerate(rows, 1):
        if len(row) <= max(places) or not _is_number(row[places[2]]):
            raise InputError(f"{path}: pair {number} has no sentence1, sentence2 and score")
    first, second, scores = ([row[place] for row in rows] for place in places)
    return Pairs(first, second, np.asarray([float(score) for score in scores]))


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def sentence_similarity(
    model: Model,
    pairs: Pairs,
    *,
    batch: int = 64,
    against: Model | None = None,
    slices: int = 0,
) -> dict[str, Any]:
    """Spearman's rank correlation of cosine similarities with people's scores.

    The protocol of the STS benchmark (Cer et al. 2017, arXiv:1708.00055): every sentence is
    embedded by itself, the cosine of a pair's embeddings is ranked against its score.

    Args:
      model: see `embed_sentences`.
      pairs: sentences and scores.
      batch: sentences at a time.
      against: the dense model; adds `similarity`, the mean cosine between a sentence's embedding
        by it and by the model.
      slices: adds the correlations of so many contiguous runs of pairs, from the same pass.

    Returns:
      `spearman` in -1..1, `pairs`, with `against` `similarity`, with `slices` `slices` (a list)
      and `spread` (their standard deviation).

    Raises:
      InputError: see `embed_sentences`; embeddings of two widths; or fewer than 2 pairs.
    """
    if len(pairs.scores) < 2:
        raise InputError("sentences: a rank correlation needs 2 pairs or more")
    sentences = [*pairs.first, *pairs.second]
    found = embed_sentences(model, sentences, batch=batch)
    one, other = np.split(found.astype(np.float64), 2)
    judged = np.stack([(one * other).sum(-1), pairs.scores], axis=-1)
    out: dict[str, Any] = {"spearman": _spearman(judged), "pairs": len(judged)}
    if against is not None:
        dense = embed_sentences(against, sentences, batch=batch)
        if dense.shape != found.shape:
            raise InputError(
                f"sentences: embeddings of {found.shape[1]} features against {dense.shape[1]}; "
                "only those of one width can be compared"
            )
        out["similarity"] = float((found * dense).sum(-1).mean(dtype=np.float64))
    return out | over_slices(judged, slices, _spearman)


def _spearman(judged: np.ndarray) -> float:
    from scipy.stats import spearmanr  # half a second that only this needs

    return float(spearmanr(judged[:, 0], judged[:, 1]).statistic)


def embed_sentences(model: Model, sentences: Sequence[str], *, batch: int = 64) -> np.ndarray:
    """Embeddings of unit length, as sentence-transformers makes them.

    Special tokens are added, long sentences truncated, and the last hidden states of all tokens
    that are no padding averaged (or the first one taken, where the checkpoint's `modules.json`
    says so).

    Args:
      model: `apply(params, ids [batch, seq], mask [batch, seq])` to hidden states
        `[batch, seq, d]`, such as a BERT-style encoder, with a tokenizer; leaves may be compressed.
      sentences: the texts.
      batch: how many at a time; those of like length go together.

    Returns:
      float32 `[sentences, d]`.

    Raises:
      InputError: no tokenizer, or a checkpoint that pools in another way.
    """
    if model.tokenizer is None:
        raise InputError(
            "sentences: the model has no tokenizer (tokenizer.json beside its weights)"
        )
    settings = _Settings.of(model)
    tokens = [model.tokenizer.encode_sentence(text, settings.max_length) for text in sentences]
    order = np.argsort([len(ids) for ids in tokens], kind="stable")
    place = Placement.of(model.params)
    batch = -(-batch // place.shards) * place.shards
    apply, params = lifted(model.apply), place.put(model.params)
    parts = []
    for at in progress(range(0, len(order), batch), "evaluate", unit="batch"):
        chosen = [tokens[i] for i in order[at : at + batch]]
        ids, mask = _padded(chosen, batch, settings.max_length)
        found = _program(place.everywhere)(
            apply, settings.pooling, params, place.batch(ids), place.batch(mask)
        )
        parts.append(np.asarray(found)[: len(chosen)])
    out = np.concatenate(parts)
    out[order] = out.copy()
    return out


def embedding_model(model: Model) -> Model:
    """A model that gives embeddings, to be distilled: `apply(params, inputs)`.

    Args:
      model: see `embed_sentences`; the pooling is that of its checkpoint.

    Returns:
      Of the same parameters, from what `sentence_inputs` gives, int `[batch, 2, seq]`, to
      embeddings of unit length `[batch, d]`.
    """
    pooling, apply = _Settings.of(model).pooling, model.apply

    def embeddings(params: Any, inputs: jax.Array) -> jax.Array:
        return _embeddings(apply, pooling, params, inputs[:, 0], inputs[:, 1])

    return model.replace(apply=embeddings, blocks=None, config=None)


def sentence_inputs(model: Model, sentences: Sequence[str], length: int) -> np.ndarray:
    """Token ids and mask of sentences, int32 `[sentences, 2, length]`; longer ones are truncated.

    Raises:
      InputError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise InputError("sentences: the model has no tokenizer to encode them")
    out = np.zeros((len(sentences), 2, length), np.int32)
    for row, text in zip(out, sentences, strict=True):
        ids = model.tokenizer.encode_sentence(text, length)
        row[:, : len(ids)] = [ids, [1] * len(ids)]
    return out


def pool(hidden: jax.Array, mask: jax.Array, pooling: str = "mean") -> jax.Array:
    """Hidden states `[batch, seq, d]` to embeddings of unit length, float32 `[batch, d]`.

    Args:
      hidden: the last hidden states.
      mask: `[batch, seq]`, 0 where there is padding.
      pooling: "mean" over what is no padding, or "cls": the first position.
    """
    x = hidden.astype(jnp.float32)
    if pooling == "cls":
        x = x[:, 0]
    else:
        weights = mask.astype(jnp.float32)[..., None]
        x = (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _padded(
    tokens: list[list[int]], batch: int, limit: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int32 `[batch, seq]`; few different shapes, so that few programs are made."""
    longest = max(len(ids) for ids in tokens)
    seq = max(SHORTEST, 1 << (longest - 1).bit_length())
    seq = seq if limit is None else min(seq, limit)
    ids, mask = np.zeros((2, batch, seq), np.int32)
    for row, found in enumerate(tokens):
        ids[row, : len(found)] = found
        mask[row, : len(found)] = 1
    return ids, mask


@functools.cache
def _program(everywhere: Any) -> Any:
    return jax.jit(_embeddings, static_argnums=(0, 1), out_shardings=everywhere)


def _embeddings(apply: Any, pooling: str, params: Any, ids: Any, mask: Any) -> jax.Array:
    return pool(apply(params, ids, mask), mask, pooling)


@dataclass(frozen=True)
class _Settings:
    """How the checkpoint's sentence-transformers files want sentences embedded."""

    pooling: str = "mean"
    max_length: int | None = None

    @classmethod
    def of(cls, model: Model) -> _Settings:
        limits = [getattr(model.config, "max_length", None)]
        root = Path(model.source) if model.source else None
        if root is None or not (root / "modules.json").is_file():
            return cls(max_length=limits[0])
        if (root / "sentence_bert_config.json").is_file():
            limits.append(read_json(root / "sentence_bert_config.json").get("max_seq_length"))
        known = [limit for limit in limits if limit is not None]
        return cls(_pooling_of(root), min(known, default=None))


def _pooling_of(root: Path) -> str:
    """The pooling that `modules.json` names."""
    import json

    path, pooling = root / "modules.json", "mean"
    with file_errors("read", path):
        modules = json.loads(path.read_bytes())
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        if kind not in _MODULES:
            raise InputError(f"{path}: module {kind} is not computed here, only {_MODULES}")
        if kind != "Pooling":
            continue
        asked = [
            name
            for name, value in read_json(root / module["path"] / "config.json").items()
            if name.startswith("pooling_mode_") and value
        ]
        if len(asked) != 1 or asked[0] not in _POOLINGS:
            raise InputError(f"{path}: pools by {asked}; only one of {list(_POOLINGS)} is computed")
        pooling = _POOLINGS[asked[0]]
    return pooling
