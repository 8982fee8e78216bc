"""The standard library's sources as text."""

import hashlib
import pathlib
import subprocess
import sys
import sysconfig

import pytest

from jaxcompress.core.errors import InputError
from jaxcompress.data import python_stdlib
from jaxcompress.data.text import read_text

ROOT = pathlib.Path(sysconfig.get_path("stdlib"))


def test_splits_are_disjoint_sorted_and_share_no_module():
    train, held = (dict(python_stdlib.sources(split)) for split in ("train", "heldout"))
    assert not set(train) & set(held)
    assert not set(train.values()) & set(held.values())
    assert tuple(held) == python_stdlib.HELD_OUT == tuple(sorted(held))
    assert list(train) == sorted(train)


def test_held_out_is_about_a_twentieth():
    train, held = (len(python_stdlib.stdlib_text(split).encode()) for split in python_stdlib.SPLITS)
    assert train > 6_000_000
    assert 0.04 < held / (train + held) < 0.065


def test_modules_are_the_files():
    for name, text in python_stdlib.sources("heldout"):
        assert text == (ROOT / name).read_bytes().decode().replace("\r\n", "\n")


def test_what_is_not_everywhere_is_left_out():
    names = [name for split in python_stdlib.SPLITS for name, _ in python_stdlib.sources(split)]
    parts = {part.removesuffix(".py") for name in names for part in name.split("/")}
    gone = {"test", "tests", "site-packages", "idlelib", "tkinter", "distutils", "pydoc_data"}
    assert not parts & (gone | {"telnetlib", "imp"})
    assert not [part for part in parts if part.startswith("_sysconfigdata")]


def test_of_the_encodings_only_the_package_itself():
    names = [n for n, _ in python_stdlib.sources() if n.startswith("encodings/")]
    assert names == ["encodings/__init__.py"]


def test_digest_is_the_same_in_another_process():
    code = "from jaxcompress.data.python_stdlib import digest; print(digest(), digest('heldout'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [python_stdlib.digest(), python_stdlib.digest("heldout")]
    text = python_stdlib.stdlib_text("heldout")
    assert python_stdlib.digest("heldout") == hashlib.sha256(text.encode()).hexdigest()


def test_words_are_texts():
    assert read_text("python-stdlib:heldout") == python_stdlib.stdlib_text("heldout")
    assert read_text("python-stdlib") == read_text("python-stdlib:train")
    with pytest.raises(InputError, match=r"python-stdlib:valid: no such split.*:heldout"):
        read_text("python-stdlib:valid")
    with pytest.raises(InputError, match="no such split"):
        python_stdlib.sources("test")
