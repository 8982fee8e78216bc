"""The best number format for every parameter under a budget, as an integer programme.

With one binary variable for each parameter and candidate, of which one of each parameter's is 1,
the sum of the costs is minimal while bytes, or seconds, stay within the budget (Dong et al.,
"HAWQ-V2", arXiv:1911.03852, section 3.2; Yao et al., "HAWQ-V3", arXiv:2011.10680, section 4, as an
integer programme). Costs of several parameters are taken to add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.quantization.candidates import Candidate
from jaxcompress.quantization.sensitivity import Sensitivities

LARGEST_COST = 1e5  # as the solver sees it, so that its absolute gap of 1e-6 is nothing
SECOND = 1e9  # times are whole nanoseconds


@dataclass(frozen=True)
class Allocation:
    """A candidate for every parameter.

    Attributes:
      table: what was chosen from.
      choice: int `[P]`: the index of each parameter's candidate.
      prices: what a unit of a budget ("bytes", "seconds") is worth in costs where parts of
        formats could be chosen: the programme's dual variables. Each parameter then gets the
        format of the least cost plus price times size, up to what is left over of the budget.
      seconds: `[P, C]` where a latency was given, else None.
    """

    table: Sensitivities
    choice: np.ndarray
    prices: Mapping[str, float] = field(default_factory=dict)
    seconds: np.ndarray | None = None

    @property
    def bytes(self) -> int:
        """Of all parameters."""
        return int(self._chosen(self.table.bytes).sum())

    @property
    def bits(self) -> float:
        """Per entry, scales and zero points counted."""
        return 8 * self.bytes / int(self.table.entries.sum())

    @property
    def cost(self) -> float:
        """The sum of the parameters' costs: what the model is predicted to lose."""
        return float(self._chosen(self.table.costs).sum())

    @property
    def latency(self) -> float | None:
        """Seconds of all products, where they were given."""
        return None if self.seconds is None else float(self._chosen(self.seconds).sum())

    def candidates(self) -> dict[str, Candidate]:
        """By path."""
        chosen = (self.table.candidates[i] for i in self.choice)
        return dict(zip(self.table.paths, chosen, strict=True))

    def overrides(self) -> dict[str, dict[str, Any]]:
        """Options by path, as `compress(..., overrides=...)` takes them; without dense ones."""
        chosen = self.candidates().items()
        return {path: dict(c.options) for path, c in chosen if c.options is not None}

    def dense(self) -> list[str]:
        """Paths that are left as they are: for `compress(..., exclude=...)`."""
        return [path for path, c in self.candidates().items() if c.options is None]

    def _chosen(self, values: np.ndarray) -> np.ndarray:
        return values[np.arange(len(values)), self.choice]


def allocate(
    table: Sensitivities,
    *,
    budget_bytes: int | None = None,
    bits: float | None = None,
    latency: np.ndarray | None = None,
    budget_seconds: float | None = None,
    tied: bool = True,
) -> Allocation:
    """The candidates of the least summed cost within the budgets; exact.

    Args:
      table: costs and sizes.
      budget_bytes: of all parameters of the table.
      bits: instead, bits per entry on average, scales and zero points counted.
      latency: seconds of each parameter's product in each format, float `[P, C]`: see
        `quantization.latency`.
      budget_seconds: of all products.
      tied: parameters that read the same values get the same format, as engines that fuse them
        need.

    Raises:
      InputError: no budget, one that no assignment meets, or a parameter that no candidate fits.
    """
    if budget_bytes is not None and bits is not None:
        raise InputError("budget: give bytes or bits, not both")
    if (latency is None) != (budget_seconds is None):
        raise InputError("budget: a latency and budget_seconds go together")
    if bits is not None:
        budget_bytes = math.floor(bits * int(table.entries.sum()) / 8)
    groups = _groups(table, tied)
    costs = _summed(table.costs, groups)
    if empty := [g for g, row in zip(groups, costs, strict=True) if not np.isfinite(row).any()]:
        path = table.paths[empty[0][0]]
        raise InputError(f"{path}: no candidate fits it; add one, such as bits 8 by rows")
    limits = []
    if budget_bytes is not None:
        limits.append(_Limit("bytes", _summed(table.bytes, groups), budget_bytes))
    if latency is not None and budget_seconds is not None:
        if latency.shape != table.costs.shape:
            raise InputError(f"latency: has shape {latency.shape}, not {table.costs.shape}")
        whole = np.rint(np.where(np.isfinite(latency), latency, 0) * SECOND).astype(np.int64)
        most = math.floor(budget_seconds * SECOND)
        limits.append(_Limit("seconds", _summed(whole, groups), most))
    if not limits:
        raise InputError("budget: give budget_bytes, bits, or a latency and budget_seconds")
    for limit in limits:
        limit.check(np.isfinite(costs), table)
    chosen = _solve(costs, limits)
    choice = np.empty(len(table.paths), np.int64)
    for group, index in zip(groups, chosen, strict=True):
        choice[group] = index
    return Allocation(table, choice, _prices(costs, limits), latency)


def uniform(table: Sensitivities, candidate: str) -> Allocation:
    """Every parameter in the candidate of this name.

    Raises:
      InputError: no such candidate, or one that does not fit a parameter.
    """
    names = [c.name for c in table.candidates]
    if candidate not in names:
        raise InputError(f"candidate {candidate!r}: there are {', '.join(names)}")
    index = names.index(candidate)
    if without := [p for p, c in zip(table.paths, table.costs[:, index]) if not np.isfinite(c)]:
        raise InputError(f"candidate {candidate}: does not fit {without[0]}")
    return Allocation(table, np.full(len(table.paths), index))


def frontier(
    table: Sensitivities,
    budgets: Sequence[int] | None = None,
    *,
    points: int = 16,
    tied: bool = True,
) -> list[Allocation]:
    """The best assignments over a sweep of budgets, by ascending bytes, each once.

    Args:
      table: costs and sizes.
      budgets: bytes; None: `points` of them, in equal ratios from the least possible to where
        more bytes bring nothing.
      points: how many.
      tied: see `allocate`.

    Raises:
      InputError: a budget that no assignment meets.
    """
    if budgets is None:
        costs = _summed(table.costs, groups := _groups(table, tied))
        sizes = _summed(table.bytes, groups)
        least = np.where(np.isfinite(costs), sizes, np.iinfo(np.int64).max).min(1).sum()
        best = costs == costs.min(1, keepdims=True)
        most = np.where(best, sizes, np.iinfo(np.int64).max).min(1).sum()
        budgets = [int(b) for b in np.rint(np.geomspace(least, most, points))]
        budgets[0], budgets[-1] = int(least), int(most)
    found: dict[tuple[int, ...], Allocation] = {}
    for budget in sorted(budgets):
        allocation = allocate(table, budget_bytes=budget, tied=tied)
        found.setdefault(tuple(allocation.choice), allocation)
    return sorted(found.values(), key=lambda a: (a.bytes, -a.cost))


@dataclass(frozen=True)
class _Limit:
    """A budget: the sum of the chosen amounts, whole numbers `[groups, C]`, is `most` at most."""

    name: str
    amounts: np.ndarray
    most: int

    @property
    def step(self) -> int:
        """What all differences of amounts are multiples of."""
        differences = self.amounts - self.amounts[:, :1]
        return int(np.gcd.reduce(np.abs(differences), axis=None)) or 1

    @property
    def scaled(self) -> tuple[np.ndarray, int]:
        """Amounts above each group's least and what is left for them, in steps.

        As small whole numbers as can be: the solver's tolerance is absolute.
        """
        least = self.amounts.min(1, keepdims=True)
        return (self.amounts - least) // self.step, (self.most - int(least.sum())) // self.step

    def check(self, usable: np.ndarray, table: Sensitivities) -> None:
        """Raise `InputError` where the least possible is more than the budget."""
        largest = np.iinfo(np.int64).max
        least = int(np.where(usable, self.amounts, largest).min(1).sum())
        if least <= self.most:
            return
        if self.name == "bytes":
            entries = int(table.entries.sum())
            raise InputError(
                f"budget {self.most} bytes ({8 * self.most / entries:.3f} bits a weight): the "
                f"least possible is {least} bytes ({8 * least / entries:.3f} bits); allow that, or "
                "add candidates of fewer bits"
            )
        raise InputError(
            f"budget {self.most / SECOND:.3g} s: the least possible is {least / SECOND:.3g} s"
        )


def _groups(table: Sensitivities, tied: bool) -> list[np.ndarray]:
    """Indices of the paths that share a format."""
    place = {path: i for i, path in enumerate(table.paths)}
    groups = table.groups if tied else tuple((path,) for path in table.paths)
    return [np.array([place[path] for path in group]) for group in groups]


def _summed(values: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([values[group].sum(0) for group in groups])


def _solve(costs: np.ndarray, limits: Sequence[_Limit]) -> np.ndarray:
    """The best candidate of every group, int `[groups]`."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second that only this needs

    usable = np.isfinite(costs)
    objective = _objective(costs)
    rows = [LinearConstraint(_one_each(costs), 1, 1)]
    for limit in limits:
        amounts, most = limit.scaled
        rows.append(LinearConstraint(np.where(usable, amounts, 0).reshape(1, -1), -np.inf, most))
    while True:
        found = milp(
            objective.ravel(),
            integrality=np.ones(costs.size),
            bounds=Bounds(0, usable.astype(float).ravel()),
            constraints=rows,
            options={"mip_rel_gap": 0.0},
        )
        if found.status == 2:
            names = " and ".join(limit.name for limit in limits)
            raise InputError(f"budget: no assignment meets the budgets of {names} together")
        if found.x is None:
            raise RuntimeError(f"integer programme: {found.message}")
        chosen = found.x.reshape(costs.shape).argmax(1)
        places = np.arange(len(chosen)), chosen
        if all(int(limit.amounts[places].sum()) <= limit.most for limit in limits):
            return chosen
        # Over a budget by less than the solver's tolerance: all but this assignment.
        this = np.zeros(costs.shape)
        this[places] = 1
        rows.append(LinearConstraint(this.reshape(1, -1), -np.inf, len(chosen) - 1))


def _prices(costs: np.ndarray, limits: Sequence[_Limit]) -> dict[str, float]:
    """Dual variables of the budgets in the linear programme, in costs per byte or second."""
    from scipy.optimize import linprog

    usable = np.isfinite(costs)
    scaled = [limit.scaled for limit in limits]
    found = linprog(
        _objective(costs).ravel(),
        A_ub=np.stack([np.where(usable, amounts, 0).ravel() for amounts, _ in scaled]),
        b_ub=[most for _, most in scaled],
        A_eq=_one_each(costs),
        b_eq=np.ones(len(costs)),
        bounds=np.stack([np.zeros(costs.size), usable.ravel()], 1),
    )
    scale = _scale(costs)
    prices = {}
    for limit, dual in zip(limits, found.ineqlin.marginals, strict=True):
        unit = SECOND if limit.name == "seconds" else 1
        prices[limit.name] = max(-float(dual), 0.0) / scale / limit.step * unit
    return prices


def _scale(costs: np.ndarray) -> float:
    """What takes costs to those that the solver sees."""
    largest = float(costs[np.isfinite(costs)].max())
    return LARGEST_COST / largest if largest > 0 else 1.0


def _objective(costs: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(costs), costs, 0.0) * _scale(costs)


def _one_each(costs: np.ndarray) -> Any:
    """The rows of the constraint that every group gets one candidate, sparse."""
    from scipy.sparse import csr_array, eye_array, kron

    groups, candidates = costs.shape
    return csr_array(kron(eye_array(groups), np.ones((1, candidates))))
