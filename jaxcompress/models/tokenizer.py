"""Text to token ids and back, by the `tokenizer.json` of a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxcompress.core.errors import InputError


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that adds nothing to what it is given.

    Attributes:
      inner: the `tokenizers.Tokenizer`.
      bos_id: id that begins a text, by the config of the model, or None.
      eos_ids: ids that end one.
    """

    inner: Any
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Tokenizer | None:
        """The tokenizer of a checkpoint directory, None where there is no `tokenizer.json`.

        Raises:
          InputError: a `tokenizer.json` that cannot be read.
        """
        root = Path(directory)
        path = root / "tokenizer.json"
        if not path.is_file():
            return None
        import tokenizers

        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path}: not a tokenizer file ({str(error)[:80]})") from None
        _as_transformers_builds_it(inner, root / "tokenizer_config.json")
        # A truncation or padding stored in the file is for batches of sentences.
        inner.no_truncation()
        inner.no_padding()
        special: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json"):
            if (root / name).is_file():
                special |= json.loads((root / name).read_text())
        return cls(inner, special.get("bos_token_id"), _ids(special))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text to go on from, with the special tokens that begin one."""
        ids = self.inner.encode(text, add_special_tokens=True).ids
        while len(ids) > 1 and ids[-1] in self.eos_ids:
            ids.pop()
        return ids

    def encode_sentence(self, text: str, max_length: int | None = None) -> list[int]:
        """Token ids of a text with special tokens around it, `max_length` of them at most."""
        encoding = self.inner.encode(text, add_special_tokens=False)
        if max_length is not None:
            encoding.truncate(max_length - self.inner.num_special_tokens_to_add(False))
        return self.inner.post_process(encoding).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)


def _as_transformers_builds_it(inner: Any, config_path: Path) -> None:
    """Make `inner` encode as transformers 5 does.

    Its Llama tokenizer takes only vocabulary and merges from `tokenizer.json`; the rest it sets
    itself. A text outside of the vocabulary would otherwise become other tokens here than there.
    """
    from tokenizers import pre_tokenizers

    config = json.loads(config_path.read_text()) if config_path.is_file() else {}
    is_llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    if not is_llama or type(inner.model).__name__ != "BPE":
        return
    scheme = "never"
    if config.get("add_prefix_space") is not False:
        scheme = "always" if config.get("legacy") else "first"
    inner.normalizer = None
    inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    inner.model.unk_token = None
    inner.model.fuse_unk = True
    inner.model.byte_fallback = True


def _ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    found = config.get("eos_token_id")
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)
