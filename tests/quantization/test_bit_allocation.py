"""The integer programme against brute force, its budgets, its reasons and its files."""

import csv
import itertools
import json
import math
from xml.etree import ElementTree

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxcompress.core.errors import InputError
from jaxcompress.quantization import frontier as records
from jaxcompress.quantization.allocation import allocate, frontier, uniform
from jaxcompress.quantization.candidates import Candidate
from jaxcompress.quantization.sensitivity import Sensitivities

BITS = (2, 3, 4, 8)


def table(costs, sizes, groups=None):
    """A table of invented numbers."""
    costs, sizes = np.array(costs, np.float64), np.array(sizes, np.int64)
    paths = tuple(f"layers/{i}/kernel" for i in range(len(costs)))
    groups = groups or tuple((i,) for i in range(len(costs)))
    return Sensitivities(
        paths=paths,
        candidates=tuple(Candidate.of({"bits": b}) for b in BITS[: costs.shape[1]]),
        costs=costs,
        bytes=sizes,
        entries=np.full(len(costs), 1024),
        groups=tuple(tuple(paths[i] for i in group) for group in groups),
        by="kl",
    )


def brute(given, limits, tied):
    """The least cost over all assignments, infinite where none meets the limits."""
    place = {path: i for i, path in enumerate(given.paths)}
    groups = given.groups if tied else [(path,) for path in given.paths]
    best = math.inf
    for chosen in itertools.product(range(len(given.candidates)), repeat=len(groups)):
        pairs = [(place[p], c) for group, c in zip(groups, chosen, strict=True) for p in group]
        if all(sum(int(amounts[pair]) for pair in pairs) <= most for amounts, most in limits):
            best = min(best, sum(float(given.costs[pair]) for pair in pairs))
    return best


@st.composite
def problems(draw):
    """A table with ties among parameters and formats that do not fit, and a budget of bytes."""
    parameters, candidates = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    shape = parameters, candidates
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    largest = draw(st.sampled_from([9, 1000, 10**10]))
    costs = np.exp(rng.uniform(-14, 1, shape)) * rng.integers(0, 2, shape) ** draw(
        st.integers(0, 1)
    )
    costs[rng.random(shape) < draw(st.sampled_from([0.0, 0.2]))] = np.inf
    costs[:, rng.integers(candidates)] = rng.random(parameters)  # something fits everywhere
    sizes = rng.integers(1, largest, shape)
    cuts = sorted({0, parameters, *rng.integers(0, parameters + 1, 2).tolist()})
    groups = tuple(tuple(range(a, b)) for a, b in itertools.pairwise(cuts))
    least, most = int(sizes.min(1).sum()), int(sizes.max(1).sum())
    return table(costs, sizes, groups), int(rng.integers(least, most + 1)), seed


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(problems(), st.booleans())
def test_is_the_best_of_all_assignments(problem, tied):
    given, budget, _ = problem
    want = brute(given, [(given.bytes, budget)], tied)
    if want == math.inf:
        with pytest.raises(InputError, match="the least possible is"):
            allocate(given, budget_bytes=budget, tied=tied)
        return
    found = allocate(given, budget_bytes=budget, tied=tied)
    assert found.bytes <= budget
    np.testing.assert_allclose(found.cost, want, rtol=1e-9, atol=1e-14)
    chosen = dict(zip(given.paths, found.choice.tolist(), strict=True))
    if tied:
        assert all(len({chosen[path] for path in group}) == 1 for group in given.groups)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(problems())
def test_two_budgets(problem):
    given, budget, seed = problem
    rng = np.random.default_rng(seed)
    nanoseconds = rng.integers(100, 9000, given.costs.shape)
    most = int(rng.integers(nanoseconds.min(1).sum(), nanoseconds.max(1).sum() + 1))
    want = brute(given, [(given.bytes, budget), (nanoseconds, most)], True)
    asked = {"latency": nanoseconds * 1e-9, "budget_seconds": (most + 0.5) * 1e-9}
    if want == math.inf:
        with pytest.raises(InputError, match="budget"):
            allocate(given, budget_bytes=budget, **asked)
        return
    found = allocate(given, budget_bytes=budget, **asked)
    assert found.bytes <= budget
    assert found.latency <= (most + 0.5) * 1e-9
    np.testing.assert_allclose(found.cost, want, rtol=1e-9, atol=1e-14)


def example(count=12, groups=None):
    """Costs that fall fourfold with each bit, of parameters that differ."""
    rng = np.random.default_rng(0)
    costs = np.exp(rng.normal(0, 1.5, (count, 1))) * 4.0 ** -np.array(BITS)
    sizes = 1024 * np.array(BITS)[None] // 8 * np.ones((count, 1), int)
    return table(costs, sizes, groups)


def test_beats_the_uniform_format_at_its_bytes():
    given = example()
    same = uniform(given, "int4 g128")
    assert same.bits == 4.0
    found = allocate(given, bits=4.0)
    assert found.bytes <= same.bytes
    assert found.cost < 0.9 * same.cost
    assert set(found.overrides()) == set(given.paths)
    assert found.overrides()[given.paths[0]] == {"bits": BITS[found.choice[0]]}


def test_infeasible_says_the_least_possible():
    with pytest.raises(InputError, match=r"least possible is 3072 bytes \(2.000 bits\)") as error:
        allocate(example(), bits=1.9)
    assert "\n" not in str(error.value)
    slow = np.full((12, 4), 1e-6)
    with pytest.raises(InputError, match=r"1e-05 s: the least possible is 1.2e-05 s"):
        allocate(example(), latency=slow, budget_seconds=1e-5)


def test_refuses():
    given = example()
    with pytest.raises(InputError, match="not both"):
        allocate(given, bits=4.0, budget_bytes=10)
    with pytest.raises(InputError, match="give budget_bytes, bits"):
        allocate(given)
    with pytest.raises(InputError, match="go together"):
        allocate(given, budget_seconds=1.0)
    with pytest.raises(InputError, match="has shape"):
        allocate(given, latency=np.ones((2, 2)), budget_seconds=1.0)
    with pytest.raises(InputError, match="no candidate fits"):
        allocate(table([[np.inf, np.inf]], [[1, 1]]), budget_bytes=10)
    with pytest.raises(InputError, match="there are int2"):
        uniform(given, "int5 g128")
    with pytest.raises(InputError, match="does not fit layers/1"):
        uniform(table([[1, 2], [np.inf, 1]], [[1, 2], [1, 2]]), "int2 g128")


def test_prices_are_the_dual():
    """They make the best bound from below that any price gives, and the choice is close to it."""
    given, budget = example(40), math.floor(3.7 * 40 * 1024 / 8)
    found = allocate(given, budget_bytes=budget, tied=False)
    price = found.prices["bytes"]

    def bound(price):
        return (given.costs + price * given.bytes).min(1).sum() - price * budget

    assert price > 0
    for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2.0):
        assert bound(price * factor) <= bound(price) * (1 + 1e-9)
    assert bound(price) <= found.cost <= bound(price) + price * 512
    np.testing.assert_allclose(
        records.with_prices(found), given.costs + price * given.bytes, rtol=1e-12
    )
    free = allocate(given, bits=8.0)
    assert free.prices["bytes"] == 0.0
    assert (free.choice == 3).all()


def test_frontier_is_the_best_at_every_size():
    given = example(5, groups=((0, 1), (2,), (3, 4)))
    found = frontier(given, points=9)
    sizes, costs = [a.bytes for a in found], [a.cost for a in found]
    assert sizes == sorted(set(sizes))
    assert costs == sorted(costs, reverse=True)
    assert (found[0].choice == 0).all()
    assert (found[-1].choice == 3).all()
    for one in found:
        np.testing.assert_allclose(one.cost, brute(given, [(given.bytes, one.bytes)], True))


def test_reasons_name_every_alternative():
    costs = [[9, 1, 0.1], [np.inf, 5, 4], [5, 3, 2]]
    given = table(costs, np.tile([[256, 384, 512]], (3, 1)), groups=((0,), (1, 2)))
    found = allocate(given, bits=3.34)
    lines = records.reasons(found).splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == list(given.paths)
    assert [line.count("**") for line in lines[4:]] == [2, 2, 2]
    assert "does not fit" in lines[5]
    assert "with what shares its input" in lines[6]
    assert "with what shares its input" not in lines[4]
    for line, row, chosen in zip(lines[4:], costs, found.choice, strict=True):
        cells = [cell.strip().strip("*") for cell in line.split("|")[2:5]]
        for cell, cost in zip(cells, row, strict=True):
            assert cell == "does not fit" or float(cell.split()[0]) == pytest.approx(cost)
        assert line.split("|")[2 + chosen].strip().startswith("**")


def test_files(tmp_path):
    found = frontier(example(4), points=6)
    names = [file.name for file in records.write(tmp_path / "new", found)]
    assert names == ["frontier.json", "frontier.csv", "frontier.svg"]
    kept = json.loads((tmp_path / "new" / names[0]).read_text())
    assert [one["bytes"] for one in kept["frontier"]] == [a.bytes for a in found]
    assert len(kept["uniform"]) == 4
    first = kept["table"]["parameters"]["layers/0/kernel"]["int4 g128"]
    assert first == {"cost": found[0].table.costs[0, 2], "bytes": 512}
    rows = list(csv.DictReader((tmp_path / "new" / names[1]).open()))
    assert len(rows) == len(found) + 4
    assert rows[0]["layers/0/kernel"] == "int2 g128"
    ElementTree.fromstring((tmp_path / "new" / names[2]).read_text())


def test_dense_is_left_out():
    given = example(3)
    candidates = (*given.candidates[:3], Candidate.of("dense"))
    found = allocate(
        Sensitivities(
            given.paths, candidates, given.costs, given.bytes, given.entries, given.groups, "kl"
        ),
        bits=6.0,
    )
    assert found.dense()
    assert set(found.dense()) | set(found.overrides()) == set(given.paths)
    assert not set(found.dense()) & set(found.overrides())
