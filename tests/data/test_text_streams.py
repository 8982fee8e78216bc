"""Streams of documents: exact resumption, each process its part, and refusals."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.core.errors import InputError
from jaxcompress.data import bpe
from jaxcompress.data.streaming import StreamBatches
from jaxcompress.models.tokenizer import Tokenizer

TOKENIZER = Tokenizer(bpe.train_tokenizer(["one two three"], 258))
ALONE = {"process_index": 0, "process_count": 1}


def document(number):
    return chr(ord("a") + number) * (1 + 7 * number % 23)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """24 documents over three files, one of them empty."""
    folder = tmp_path_factory.mktemp("stream")
    for part in range(3):
        rows = [{"text": document(8 * part + n), "other": n} for n in range(8)]
        rows += [{"text": "", "other": 8}] if part == 1 else []
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "*.jsonl")


def windows_of(documents, ctx, count):
    """Brute force: the first windows of the endless repetition of documents."""
    epoch = [i for text in documents for i in [*TOKENIZER.encode(text), 0]]
    ids = epoch * (ctx * count // len(epoch) + 1)
    return np.asarray(ids[: ctx * count]).reshape(count, ctx)


def test_without_shuffling_windows_are_those_of_the_documents(source):
    batches = StreamBatches(source, TOKENIZER, 7, 4, block=1, **ALONE)
    epoch = sum(len(document(n)) + 1 for n in range(24))
    steps = epoch // 28
    found = np.concatenate([next(batches)["ids"] for _ in range(steps)])
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, windows_of(map(document, range(24)), 7, 4 * steps))


def test_an_epoch_holds_every_token_once(source):
    """Later epochs read the files in another order, so tokens are counted."""
    epoch = [i for n in range(24) for i in [*TOKENIZER.encode(document(n)), 0]]
    batches = StreamBatches(source, TOKENIZER, 1, 1, block=1, **ALONE)
    for _ in range(3):
        found = [int(next(batches)["ids"][0, 0]) for _ in epoch]
        assert sorted(found) == sorted(epoch)


def test_blocks_are_shuffled_each_in_itself(source):
    def rows(seed, block):
        batches = StreamBatches(source, TOKENIZER, 5, 3, seed=seed, block=block, **ALONE)
        return np.concatenate([next(batches)["ids"] for _ in range(8)])

    straight, shuffled = rows(0, 1), rows(0, 6)
    assert (straight != shuffled).any()
    assert (shuffled != rows(1, 6)).any()
    for at in range(0, 24, 6):
        some = slice(at, at + 6)
        assert sorted(straight[some].tolist()) == sorted(shuffled[some].tolist())


@given(
    ctx=st.integers(1, 40),
    block=st.integers(1, 9),
    before=st.integers(0, 12),
    processes=st.sampled_from([1, 2, 3]),
    prefetch=st.sampled_from([0, 2]),
)
def test_resumption_goes_on_as_if_unbroken(source, ctx, block, before, processes, prefetch):
    for index in range(processes):

        def new(index=index):
            return StreamBatches(
                source,
                TOKENIZER,
                ctx,
                2 * processes,
                seed=3,
                block=block,
                process_index=index,
                process_count=processes,
                prefetch=prefetch,
            )

        unbroken = new()
        for _ in range(before):
            next(unbroken)
        state = json.loads(json.dumps(unbroken.state()))
        expected = [next(unbroken)["ids"] for _ in range(9)]
        resumed = new()
        next(resumed)
        for _ in range(2):
            resumed.restore(state)
            assert json.loads(json.dumps(resumed.state())) == state
            np.testing.assert_array_equal([next(resumed)["ids"] for _ in range(9)], expected)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_read_disjoint_parts(source, processes):
    """Two take every second document, three a file each."""
    tokens = [sum(len(document(n)) + 1 for n in range(24))]
    seen = []
    for index in range(processes):
        of_it = [
            document(n)
            for n in range(24)
            if (n // 8 if processes == 3 else (n + (n > 15)) % 2) == index
        ]
        count = sum(len(text) + 1 for text in of_it)
        batches = StreamBatches(
            source,
            TOKENIZER,
            1,
            processes,
            block=1,
            process_index=index,
            process_count=processes,
        )
        found = [next(batches)["ids"] for _ in range(count)]
        np.testing.assert_array_equal(np.concatenate(found), windows_of(of_it, 1, count))
        seen.append(count)
    assert sum(seen) == tokens[0]


def test_what_cannot_go_on_is_refused(source, tmp_path):
    def new(**other):
        arguments = {"ctx": 5, "batch_size": 4, "seed": 1} | ALONE | other
        return StreamBatches(arguments.pop("source", source), TOKENIZER, **arguments)

    state = new().state()
    (tmp_path / "one.txt").write_text("one document")
    for other, reason in [
        ({"ctx": 6}, "ctx 5 then, 6 now"),
        ({"seed": 2}, "seed 1 then, 2 now"),
        ({"source": tmp_path / "one.txt"}, "source"),
        ({"process_count": 2}, "processes 1 then, 2 now"),
        ({"block": 7}, "block 1024 then, 7 now"),
    ]:
        with pytest.raises(InputError, match=reason):
            new(**other).restore(state)
    with pytest.raises(InputError, match="process 0 then, 1 now"):
        new(process_index=1, process_count=2).restore(new(process_count=2).state())
    with pytest.raises(InputError, match="lacks place"):
        new().restore({name: value for name, value in state.items() if name != "place"})
    with pytest.raises(InputError, match="no document for process 1"):
        next(new(source=tmp_path / "one.txt", process_index=1, process_count=2))
    with pytest.raises(InputError, match="block 0"):
        new(block=0)
