"""Batches: every row once per epoch, the same for any number of processes, exact resumption."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.core.errors import InputError
from jaxcompress.data.batches import Batches
from jaxcompress.data.digests import digest, summary
from jaxcompress.data.language import text_dataset

ALONE = {"process_index": 0, "process_count": 1}


def rows(count, ctx=3):
    """Windows that tell their number."""
    return text_dataset(np.repeat(np.arange(count), ctx), ctx=ctx)


def numbers(batches, steps):
    return [next(batches)["ids"][:, 0].tolist() for _ in range(steps)]


@given(
    count=st.integers(1, 12),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_every_row_comes_once_per_epoch(count, batch_size, seed, shuffle):
    batches = Batches(rows(count), batch_size, seed=seed, shuffle=shuffle, prefetch=0, **ALONE)
    steps = 3 * count  # batch_size whole runs of three epochs
    seen = np.concatenate(numbers(batches, steps)).reshape(-1, count)
    assert (np.sort(seen, axis=1) == np.arange(count)).all()
    if not shuffle:
        assert (seen == np.arange(count)).all()


def test_order_is_of_seed_and_epoch():
    def epochs(seed, batch_size):
        batches = Batches(rows(32), batch_size, seed=seed, **ALONE)
        return np.concatenate(numbers(batches, 64 // batch_size)).reshape(2, 32)

    first, second = epochs(0, 4)
    assert (first != second).any()
    assert (first != np.arange(32)).any()
    assert (epochs(0, 8) == [first, second]).all()
    assert (epochs(1, 4)[0] != first).any()


@given(
    processes=st.sampled_from([1, 2, 3, 6]),
    batch_size=st.sampled_from([6, 12]),
    prefetch=st.integers(0, 3),
)
def test_processes_share_the_same_global_batch(processes, batch_size, prefetch):
    whole = Batches(rows(20), batch_size, seed=5, prefetch=0, **ALONE)
    parts = [
        Batches(
            rows(20),
            batch_size,
            seed=5,
            process_index=p,
            process_count=processes,
            prefetch=prefetch,
        )
        for p in range(processes)
    ]
    for _ in range(7):
        expected = next(whole)["ids"]
        assert expected.dtype == np.int32
        found = [next(part)["ids"] for part in parts]
        np.testing.assert_array_equal(np.concatenate(found), expected)
        assert {len(part) for part in found} == {batch_size // processes}
        assert all(part.state() == whole.state() for part in parts)


@given(before=st.integers(0, 9), processes=st.sampled_from([1, 2]), prefetch=st.integers(0, 3))
def test_resumption_goes_on_as_if_unbroken(before, processes, prefetch):
    def new(index, count):
        return Batches(
            rows(10),
            4,
            seed=1,
            process_index=index,
            process_count=count,
            prefetch=prefetch,
        )

    unbroken = new(0, 1)
    numbers(unbroken, before)
    state = json.loads(json.dumps(unbroken.state()))
    expected = numbers(unbroken, 6)
    resumed = [new(p, processes) for p in range(processes)]
    for one in resumed:
        numbers(one, 2)
        one.restore(state)
        assert one.state() == state
    found = zip(*(numbers(one, 6) for one in resumed))
    assert [[n for part in parts for n in part] for parts in found] == expected


def test_state_is_of_the_batch_given_out_and_not_of_those_made_ahead():
    batches = Batches(rows(10), 4, prefetch=5, **ALONE)
    assert (batches.state()["epoch"], batches.state()["position"]) == (0, 0)
    numbers(batches, 3)
    assert (batches.state()["epoch"], batches.state()["position"]) == (1, 2)


def test_position_in_other_data_is_refused():
    batches = Batches(rows(10), 4, seed=1, **ALONE)
    state = batches.state()
    other = [
        (Batches(rows(10, ctx=4), 4, seed=1, **ALONE), r"sha256 \w{12}\.\.\. then"),
        (Batches(rows(12), 4, seed=1, **ALONE), "rows 10 then, 12 now"),
        (Batches(rows(10), 2, seed=1, **ALONE), "batch_size 4 then, 2 now"),
        (Batches(rows(10), 4, seed=2, **ALONE), "seed 1 then, 2 now"),
        (Batches(rows(10), 4, seed=1, shuffle=False, **ALONE), "shuffle True then, False now"),
    ]
    for one, reason in other:
        with pytest.raises(InputError, match=reason):
            one.restore(state)
    with pytest.raises(InputError, match="lacks epoch, rows"):
        batches.restore({k: v for k, v in state.items() if k not in ("epoch", "rows")})


def test_a_batch_must_divide_over_the_processes():
    with pytest.raises(InputError, match="batch size 5: must be a positive multiple of the 2"):
        Batches(rows(10), 5, process_index=0, process_count=2)
    with pytest.raises(InputError, match="batch size 0"):
        Batches(rows(10), 0, **ALONE)


def test_an_error_in_the_background_is_raised_where_the_batch_is_taken():
    def broken(batch, places):
        if places.indices[0] == 8:
            raise InputError("row 8")
        return batch

    batches = Batches(rows(10), 4, shuffle=False, transform=broken, prefetch=3, **ALONE)
    numbers(batches, 2)
    with pytest.raises(InputError, match="row 8"):
        next(batches)
    assert batches.state()["position"] == 8


def test_a_program_ends_with_batches_in_the_making():
    code = (
        "import numpy as np\n"
        "from jaxcompress.data.batches import Batches\n"
        "from jaxcompress.data.language import text_dataset\n"
        "batches = Batches(text_dataset(np.arange(99), ctx=3), 4, prefetch=9)\n"
        "print(next(batches)['ids'].shape)"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "(4, 3)"
    assert done.returncode == 0


def test_digest_is_of_the_ids():
    import hashlib

    ids = np.arange(1000, 1031)
    expected = hashlib.sha256(ids[:30].astype("<i4").tobytes()).hexdigest()
    for ctx in (3, 5, 15):
        assert digest(text_dataset(ids, ctx=ctx)) == expected
    assert summary(text_dataset(ids, ctx=5), "numbers", "train") == {
        "name": "numbers",
        "role": "train",
        "sha256": expected,
        "tokens": 30,
    }
    assert digest(text_dataset(ids + 1, ctx=5)) != expected


def test_rows_of_other_columns_have_a_digest_and_a_position():
    from datasets import Dataset

    values = np.arange(24).reshape(6, 2, 2)

    def batches(values, name="inputs"):
        data = Dataset.from_dict({name: values, "note": [b"a"] * 6}).with_format("numpy")
        return Batches(data, 4, seed=3, **ALONE)

    running = batches(values)
    next(running)
    state = json.loads(json.dumps(running.state()))
    again = batches(values)
    again.restore(state)
    np.testing.assert_array_equal(next(again)["inputs"], next(running)["inputs"])
    others = [batches(values[::-1]), batches(values + 1), batches(values, "others")]
    assert len({b.sha256 for b in (running, *others)}) == 4
