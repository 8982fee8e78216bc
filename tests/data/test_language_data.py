"""Packing of documents into windows: brute force, sources of every kind, cache, refusals."""

import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.core.errors import InputError
from jaxcompress.data import bpe, python_stdlib
from jaxcompress.data.language import text_dataset, windows
from jaxcompress.data.text import join_documents, separator_id, token_ids
from jaxcompress.models.tokenizer import Tokenizer

TOKENIZER = Tokenizer(bpe.train_tokenizer(["one two three, one two"] * 9, 270))
TEXTS = ["one two", "three\nfour\n", "", "five, six and seven", "\n\n"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def packed(texts, ctx, separator=0):
    """Brute force: every id in a list."""
    ids = []
    for text in texts:
        encoded = TOKENIZER.encode(text)
        if encoded and ids:
            ids.append(separator)
        ids += encoded
    return [ids[at : at + ctx] for at in range(0, len(ids) - ctx + 1, ctx)]


@given(
    documents=st.lists(st.lists(st.integers(1, 99), max_size=9), max_size=9),
    ctx=st.integers(1, 8),
    separator=st.sampled_from([None, 0]),
)
def test_windows_are_those_of_the_joined_documents(documents, ctx, separator):
    joined = join_documents(documents, separator)
    expected = []
    for ids in documents:
        if ids:
            expected += ([separator] if expected and separator is not None else []) + ids
    assert joined.tolist() == expected
    found = list(windows([np.asarray(ids, np.int32) for ids in documents], ctx, separator))
    whole = len(expected) // ctx * ctx
    assert [i for window in found for i in window.tolist()] == expected[:whole]
    assert {len(window) for window in found} <= {ctx}


def sources_of(folder):
    """The same documents in every form that is read."""
    datasets.disable_progress_bars()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
        (folder / f"{number}.md").write_text(text)
    rows = [{"text": text, "n": 1} for text in TEXTS]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "all.parquet")
    table.rename_column("text", "body").save_to_disk(folder / "saved")
    (folder / "hub" / "data").mkdir(parents=True)
    table.to_parquet(folder / "hub" / "data" / "train-00000-of-00001.parquet")
    table.select([3]).to_parquet(folder / "hub" / "data" / "test-00000-of-00001.parquet")
    (folder / "texts").mkdir()
    (folder / "texts" / "train.txt").write_text(TEXTS[1])
    return {
        "pattern": (str(folder / "*.txt"), TEXTS, {}),
        "files": ([folder / f"{n}.md" for n in range(5)], TEXTS, {}),
        "one file": (folder / "3.md", TEXTS[3:4], {}),
        "jsonl": (folder / "all.jsonl", TEXTS, {}),
        "parquet": (str(folder / "all.parquet"), TEXTS, {}),
        "saved": (folder / "saved", TEXTS, {"column": "body"}),
        "directory": (folder / "hub", TEXTS, {}),
        "split": (folder / "hub", TEXTS[3:4], {"split": "test"}),
        "directory of texts": (folder / "texts", TEXTS[1:2], {}),
    }


def test_every_kind_of_source(tmp_path, cache):
    for kind, (source, texts, options) in sources_of(tmp_path).items():
        found = text_dataset(source, TOKENIZER, 4, cache_dir=cache, **options)
        ids = found[:]["ids"]
        assert ids.dtype == np.int32
        assert ids.tolist() == packed(texts, 4), kind


def test_a_plain_file_is_the_text_that_is_evaluated(tmp_path, cache):
    (tmp_path / "text.txt").write_text("one\r\ntwo " * 50)
    found = text_dataset(tmp_path / "text.txt", TOKENIZER, 16, cache_dir=cache)[:]["ids"]
    ids = token_ids(tmp_path / "text.txt", TOKENIZER)
    assert len(ids) - found.size < 16
    np.testing.assert_array_equal(found.reshape(-1), ids[: found.size])


def test_the_standard_library(cache):
    found = text_dataset("python-stdlib:heldout", TOKENIZER, 512, cache_dir=cache)[:]["ids"]
    texts = [text for _, text in python_stdlib.sources("heldout")]
    assert found.tolist() == packed(texts, 512)


def test_without_an_end_of_text_nothing_stands_between(tmp_path, cache):
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(TOKENIZER.inner.to_str().replace(bpe.END_OF_TEXT, "<s>"))
    assert separator_id(Tokenizer(inner)) is None
    (tmp_path / "two.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    source = tmp_path / "two.jsonl"
    one, two = TOKENIZER.encode("one"), TOKENIZER.encode("two")
    for tokenizer, between in ((Tokenizer(inner), []), (Tokenizer(inner, eos_ids=(7,)), [7])):
        found = text_dataset(source, tokenizer, 1, cache_dir=cache)[:]["ids"].reshape(-1)
        assert found.tolist() == one + between + two


def test_ids_are_windowed_as_they_are():
    found = text_dataset(np.arange(20).reshape(4, 5), ctx=6)
    assert found[:]["ids"].tolist() == np.arange(18).reshape(3, 6).tolist()
    assert found[[2, 0]]["ids"].dtype == np.int32


class Counts:
    """A tokenizer that counts the texts it encodes."""

    def __init__(self, inner):
        self.inner, self.tokenizer, self.eos_ids, self.texts = self, inner, (0,), 0

    def to_str(self):
        return self.tokenizer.to_str()

    def encode_batch(self, texts, **options):
        self.texts += len(texts)
        return self.tokenizer.encode_batch(texts, **options)


def sums(directory, sources, ctx=8):
    """Texts encoded and sum of ids, for each source."""
    found = []
    for source in sources:
        tokenizer = Counts(Tokenizer.from_directory(directory).inner)
        ids = text_dataset(source, tokenizer, ctx, cache_dir=f"{directory}/cache")[:]["ids"]
        found.append([tokenizer.texts, int(ids.sum())])
    return found


def test_what_was_made_once_is_reused_by_another_process(tmp_path):
    bpe.write_tokenizer(tmp_path, TOKENIZER.inner)
    file = tmp_path / "a.txt"
    file.write_text("one two three" * 20)
    sources = [str(file), "python-stdlib:heldout"]
    first = sums(tmp_path, sources)
    assert [texts for texts, _ in first] == [1, len(python_stdlib.HELD_OUT)]
    code = (
        "import json, sys; sys.path[:0] = [sys.argv[1]]; import test_language_data as t;"
        "print(json.dumps(t.sums(sys.argv[2], json.loads(sys.argv[3]))))"
    )
    arguments = [os.path.dirname(__file__), str(tmp_path), json.dumps(sources)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, total] for _, total in first]
    assert sums(tmp_path, sources[:1], ctx=9)[0][0] == 1
    file.write_text("three two one" * 21)
    assert sums(tmp_path, sources[:1])[0][0] == 1
    bpe.write_tokenizer(tmp_path, bpe.train_tokenizer(["three"] * 9, 258))
    assert sums(tmp_path, sources[:1])[0][0] == 1


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("missing.txt", {}, "missing.txt: no such file, directory or data set"),
        ("missing/*.md", {}, "no such file"),
        ("nobody/nothing:small", {}, "cannot load these data from the hub, nor is it a file"),
        ("python-stdlib:test", {}, "no such split; use python-stdlib or"),
        ("{folder}/all.jsonl", {"column": "body"}, "no column body; it has text, n"),
        ("{folder}/all.jsonl", {"split": "test"}, 'Unknown split "test"'),
        ("{folder}/all.jsonl", {"ctx": 4096}, "holds not one window of 4096 tokens"),
        ("{folder}/all.jsonl", {"ctx": 0}, "ctx 0: must be 1 or more"),
        ("{folder}/broken.parquet", {}, "broken.parquet: cannot load these data"),
        ("{folder}/latin.txt", {}, "latin.txt: cannot load these data"),
        (["{folder}/0.txt", "{folder}/all.jsonl"], {}, "files of several kinds .json, text"),
        (np.arange(3), {"ctx": 4}, "3 token ids: hold not one window of 4"),
        (np.arange(9.0), {"ctx": 4}, "token ids must be integers"),
    ],
)
def test_refusals(tmp_path, cache, monkeypatch, source, options, reason):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    sources_of(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    if isinstance(source, str):
        source = source.format(folder=tmp_path)
    elif isinstance(source, list):
        source = [one.format(folder=tmp_path) for one in source]
    with pytest.raises(InputError, match=reason) as raised:
        text_dataset(source, TOKENIZER, **({"ctx": 4, "cache_dir": cache} | options))
    assert "\n" not in str(raised.value)


def test_text_needs_a_tokenizer():
    with pytest.raises(InputError, match="no tokenizer"):
        text_dataset("python-stdlib:heldout", None, 4)
