"""Which part of two vocabularies is one and the same."""

from __future__ import annotations

from typing import Any

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.models import Tokenizer

# What vocabularies are rounded up to, so that their tables divide over devices and tiles.
MULTIPLES = (2, 4, 8, 16, 32, 64, 128, 256)


def aligned_vocabulary(student: Model, teacher: Model) -> int | None:
    """Entries that the vocabularies have in common; what follows them is padding.

    With two tokenizers it is they that decide: the same tokens, all within both tables. Otherwise
    the sizes: equal, or one is the other rounded up to a multiple of at most 256.

    Returns:
      The number of logits to compare, from the first; None where a model does not say how many
      it has (see `common_size`).

    Raises:
      InputError: the vocabularies really differ.
    """
    tokens = [_tokens(model.tokenizer) for model in (student, teacher)]
    ours, theirs = (getattr(model.config, "vocab_size", None) for model in (student, teacher))
    known = [vocabulary for vocabulary in tokens if vocabulary is not None]
    if len(known) == 2 and known[0] != known[1]:
        shared = len(known[0].items() & known[1].items())
        raise InputError(
            f"distill: student and teacher have different tokenizers ({shared} of "
            f"{len(known[0])} and {len(known[1])} tokens are the same); distil from a teacher "
            "with the student's tokenizer"
        )
    if ours is None or theirs is None:
        return None
    for name, size in (("student", ours), ("teacher", theirs)):
        needed = max((max(vocabulary.values()) + 1 for vocabulary in known), default=0)
        if size < needed:
            raise InputError(
                f"distill: the {name}'s vocabulary has {size} entries, the tokenizer needs {needed}"
            )
    return min(ours, theirs) if len(known) == 2 else common_size(ours, theirs)


def common_size(student: int, teacher: int) -> int:
    """The smaller of two sizes of vocabularies, if the larger one is it rounded up.

    Raises:
      InputError: it is not.
    """
    small, large = sorted((student, teacher))
    if small != large and all(-(-small // m) * m != large for m in MULTIPLES):
        raise InputError(
            f"distill: the student has {student} logits and the teacher {teacher}, more apart than "
            "padding; distil from a teacher with the student's vocabulary"
        )
    return small


def _tokens(tokenizer: Any) -> dict[str, int] | None:
    return tokenizer.inner.get_vocab() if isinstance(tokenizer, Tokenizer) else None
