"""A byte-level BPE tokenizer for source code, trained with the `tokenizers` library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxcompress.core.errors import InputError

# Ends a document, and so stands between two. Its id is 0.
END_OF_TEXT = "<|endoftext|>"

# Pieces that no merge crosses: a word with the one character before it (" return", ".items",
# "_name", "(self"); a digit; punctuation with the line end and all but the last space of the
# indentation after it; the same line end and indentation alone; other whitespace. The last space
# stays with the word, so that a word is the same token wherever it stands in a line.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+(?:\n\s*(?!\S)|\n)?|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> Any:
    """A `tokenizers.Tokenizer` whose every text decodes to itself.

    Byte-pair encoding (Sennrich et al. 2016, section 3.2) over bytes (Radford et al. 2019,
    section 2.2). The same texts in the same order make the same tokenizer.

    Args:
      texts: documents.
      vocab_size: tokens, `END_OF_TEXT` (id 0) and the 256 bytes among them.

    Returns:
      The tokenizer; fewer tokens than asked where the texts have no more pairs to merge.

    Raises:
      InputError: a vocabulary smaller than the bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise InputError(f"vocabulary of {vocab_size}: must be more than the 256 bytes and one")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(
    directory: str | os.PathLike[str], tokenizer: Any, max_length: int | None = None
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` of a Hugging Face directory.

    Args:
      directory: made where it is missing.
      tokenizer: of `train_tokenizer`.
      max_length: tokens that the model takes, for the config.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(root / "tokenizer.json"))
    # The classes of transformers that bear a model's name rebuild the pre-tokenizer; this one
    # takes the file as it is.
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    text = json.dumps(config, indent=2) + "\n"
    (root / "tokenizer_config.json").write_text(text, encoding="utf-8")
