"""The text that every machine with Python has: the sources of its standard library.

Nothing is shipped or downloaded: the modules are read from the Python that runs. Two Pythons have
two texts, so whoever reports a figure reports `digest` with it.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sysconfig
from pathlib import Path

from jaxcompress.core.errors import InputError

WORD = "python-stdlib"
SPLITS = ("train", "heldout")

# Between two modules in `stdlib_text`: one empty line, as a module ends in a newline.
SEPARATOR = "\n"

# Modules that no training sees: 5 % of the bytes, of many kinds, none with a near copy elsewhere
# in the library (as posixpath has in ntpath). All of them are files of 3.11, 3.12 and 3.13.
HELD_OUT = (
    "argparse.py",
    "asyncio/locks.py",
    "asyncio/queues.py",
    "bisect.py",
    "calendar.py",
    "email/feedparser.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "html/parser.py",
    "json/decoder.py",
    "sched.py",
    "shlex.py",
    "tarfile.py",
    "textwrap.py",
    "urllib/robotparser.py",
)

# Split off or patched by distributions, tests and their helpers, or no prose-like code.
_LEFT_OUT_FOLDERS = re.compile(
    r"(site|dist)-packages|tests?|idle_test|idlelib|tkinter|turtledemo|lib2to3|distutils"
    r"|ensurepip|pydoc_data|macholib|lib-dynload|config-.*|__phello__|__pycache__"
)
_LEFT_OUT_FILES = re.compile(
    r"_sysconfigdata.*|sitecustomize|usercustomize|__hello__|_distutils_system_mod"
    r"|encodings/(?!__init__).*"
    # Tables.
    r"|html/entities|locale|stringprep|re/_casefix|_opcode_metadata"
    # Gone in Python 3.12 and 3.13.
    r"|asynchat|asyncore|imp|smtpd|aifc|cgi|cgitb|chunk|crypt|imghdr|mailcap|nntplib|pipes|sndhdr"
    r"|sunau|telnetlib|uu|xdrlib"
)


def sources(split: str = "train") -> list[tuple[str, str]]:
    """Modules of the running Python's standard library.

    Args:
      split: "train", or "heldout" for the modules of `HELD_OUT`.

    Returns:
      (path inside the library with forward slashes, text with "\\n" at line ends), sorted by path;
      empty modules and those that are not UTF-8 are left out.

    Raises:
      InputError: no such split, or a Python without its sources.
    """
    if split not in SPLITS:
        raise InputError(f"{WORD}:{split}: no such split; use {WORD} or {WORD}:heldout")
    return list(_read(split))


def stdlib_text(split: str = "train") -> str:
    """All modules of a split as one text, an empty line between two; see `sources`."""
    return SEPARATOR.join(text for _, text in sources(split))


def digest(split: str = "train") -> str:
    """SHA-256 of `stdlib_text`, in hexadecimal digits."""
    return hashlib.sha256(stdlib_text(split).encode()).hexdigest()


def split_of(word: str) -> str | None:
    """Split named by `python-stdlib` or `python-stdlib:SPLIT`, None for any other word.

    Raises:
      InputError: no such split.
    """
    name, _, split = word.partition(":")
    if name != WORD:
        return None
    if ":" in word and split not in SPLITS:
        raise InputError(f"{word}: no such split; use {WORD} or {WORD}:heldout")
    return split or "train"


@functools.cache
def _read(split: str) -> tuple[tuple[str, str], ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if _is_left_out(name) or (name in HELD_OUT) != (split == "heldout"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            found.append((name, text))
    if not found:
        raise InputError(f"{WORD}:{split}: no sources of the standard library in {root}")
    return tuple(sorted(found))


def _is_left_out(name: str) -> bool:
    *folders, _ = name.split("/")
    if any(_LEFT_OUT_FOLDERS.fullmatch(folder) for folder in folders):
        return True
    return _LEFT_OUT_FILES.fullmatch(name.removesuffix(".py")) is not None
