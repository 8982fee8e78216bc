"""The byte-level tokenizer: lossless, deterministic, the same in transformers."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.core.errors import InputError
from jaxcompress.data import bpe, python_stdlib
from jaxcompress.data.text import token_ids
from jaxcompress.models.tokenizer import Tokenizer

TRAINED_ON = [text for _, text in python_stdlib.sources()][:60]


@pytest.fixture(scope="module")
def raw():
    return bpe.train_tokenizer(TRAINED_ON, 1024)


@pytest.fixture(scope="module")
def directory(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "new"
    bpe.write_tokenizer(folder, raw, max_length=512)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | ids))
    return folder


def test_transformers_and_ours_encode_as_the_library(raw, directory):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer.from_directory(directory)
    assert theirs.model_max_length == 512
    assert theirs.eos_token_id == ours.eos_ids[0] == raw.token_to_id(bpe.END_OF_TEXT) == 0
    for _, text in python_stdlib.sources("heldout"):
        ids = raw.encode(text).ids
        assert ids == theirs(text)["input_ids"] == ours.encode(text) == ours.encode_prompt(text)
        assert text == theirs.decode(ids) == ours.decode(ids)


@given(st.text())
def test_any_text_comes_back(raw, text):
    assert raw.decode(raw.encode(text).ids) == text


def test_same_texts_make_the_same_tokenizer(raw):
    code = (
        "from jaxcompress.data import bpe, python_stdlib\n"
        "texts = [text for _, text in python_stdlib.sources()][:60]\n"
        "print(bpe.train_tokenizer(texts, 1024).to_str())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(raw.to_str())


def test_indentation_is_one_token_and_digits_stand_alone(raw):
    def tokens(text):
        return [raw.decode([i]) for i in raw.encode(text).ids]

    assert tokens("x\n        return") == ["x", "\n       ", " return"]
    assert tokens("2048")[-3:] == ["0", "4", "8"]
    assert max(sum(c.isdigit() for c in raw.decode([i])) for i in range(1024)) == 1


def test_documents_of_the_library_are_separated(raw):
    ids = token_ids("python-stdlib:heldout", Tokenizer(raw))
    held = [text for _, text in python_stdlib.sources("heldout")]
    assert (ids == 0).sum() == len(held) - 1
    assert [raw.decode(part[part != 0]) for part in np.split(ids, np.flatnonzero(ids == 0))] == held


def test_a_vocabulary_must_hold_the_bytes():
    with pytest.raises(InputError, match="vocabulary of 256"):
        bpe.train_tokenizer(["a"], 256)
