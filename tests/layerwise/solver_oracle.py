"""The papers' loops, one column at a time, in NumPy float64. Matrices are `[N, K]`."""

from __future__ import annotations

from decimal import Decimal

import numpy as np


def problem(seed, rows, columns, *, dead=0, tokens=None):
    """Weights and the second moment of correlated inputs with outliers, both float32."""
    rng = np.random.default_rng(seed)
    tokens = tokens or 4 * columns
    shared = rng.standard_normal((tokens, max(columns // 4, 1)))
    inputs = shared @ rng.standard_normal((shared.shape[1], columns)) / 8
    inputs += 0.5 * rng.standard_normal((tokens, columns))
    inputs *= np.exp(0.5 * rng.standard_normal(columns))
    inputs[:, rng.choice(columns, dead, replace=False)] = 0
    weight = rng.standard_normal((rows, columns)) / np.sqrt(columns)
    return weight.astype(np.float32), (inputs.T @ inputs).astype(np.float32)


def error(weight, result, moment):
    """Squared error of the outputs, all rows together."""
    change = np.asarray(result, np.float64) - np.asarray(weight, np.float64)
    return float(np.sum(change @ np.asarray(moment, np.float64) * change))


def upper_factor(moment, damp):
    """U of GPTQ, by its own recipe: the upper Cholesky factor of the inverse."""
    moment = np.array(moment, np.float64)
    dead = np.diag(moment) == 0
    mean = np.diag(moment)[~dead].mean()
    moment[dead, dead] = mean
    moment += damp * mean * np.eye(len(moment))
    return np.linalg.cholesky(np.linalg.inv(moment)).T, dead


class Integers:
    """Min-max integers; a scale is widened by `nudge`."""

    def __init__(self, bits, symmetric, nudge=1.0):
        self.bits, self.symmetric, self.nudge = bits, symmetric, nudge

    def find(self, weight):
        top = 2**self.bits - 1
        if self.symmetric:
            scale, zero = (
                np.abs(weight).max(1) * 2 / top,
                np.full(len(weight), 2 ** (self.bits - 1)),
            )
        else:
            low, high = np.minimum(weight.min(1), 0), np.maximum(weight.max(1), 0)
            scale = (high - low) / top
            zero = np.round(-low / scale)
        return scale * self.nudge, zero

    def snap(self, weight, parameters):
        scale, zero = parameters
        codes = np.clip(np.round(weight / scale + zero), 0, 2**self.bits - 1)
        return (codes - zero) * scale


def solve(
    weight,
    moment,
    *,
    grid=None,
    group=None,
    static=True,
    n_m=None,
    sparsity=0.0,
    keep=None,
    act_order=False,
    damp=0.01,
    block=128,
):
    """Q and the mask of what is kept."""
    weight = np.array(weight, np.float64)
    columns = weight.shape[1]
    upper, dead = upper_factor(moment, damp)
    weight[:, dead] = 0
    group = group or columns
    groups = np.arange(columns) // group
    parameters = {}
    if grid and static:
        for g in range(columns // group):
            parameters[g] = grid.find(weight[:, groups == g])
    order = np.arange(columns)
    if act_order:
        diagonal = np.diag(moment).astype(np.float64)
        diagonal[dead] = diagonal[~dead].mean()
        run = n_m[1] if n_m else 1
        runs = np.argsort(-diagonal.reshape(-1, run).sum(1), kind="stable")
        order = (run * runs[:, None] + np.arange(run)).ravel()
        permuted = np.array(moment, np.float64)[order][:, order]
        upper, _ = upper_factor(permuted, damp)
    weight = weight[:, order]
    keep = np.ones(weight.shape, bool) if keep is None else np.array(keep)[:, order]
    total = int(Decimal(repr(float(sparsity))) * weight.size)
    diagonal = np.diag(upper)
    for i in range(columns):
        if sparsity and i % block == 0:
            end = min(i + block, columns)
            scores = np.abs(weight[:, i:end] / diagonal[i:end])
            count = total * end // columns - total * i // columns
            # Of equal scores the first in the order of columns, then of rows.
            lowest = np.argsort(scores.T.ravel(), kind="stable")[:count]
            gone = np.zeros(scores.size, bool)
            gone[lowest] = True
            keep[:, i:end] = ~gone.reshape(scores.shape[::-1]).T
        if n_m and i % n_m[1] == 0:
            n, m = n_m
            scores = np.abs(weight[:, i : i + m] / diagonal[i : i + m])
            lowest = np.argsort(scores, axis=1, kind="stable")[:, : m - n]
            np.put_along_axis(keep[:, i : i + m], lowest, False, axis=1)
        if grid and not static and i % group == 0:
            parameters[i // group] = grid.find(weight[:, i : i + group])
        column = weight[:, i].copy()
        if grid:
            column = grid.snap(column, parameters[groups[order[i]]])
        column[~keep[:, i]] = 0
        weight[:, i + 1 :] -= np.outer((weight[:, i] - column) / upper[i, i], upper[i, i + 1 :])
        weight[:, i] = column
    back = np.argsort(order)
    return weight[:, back], keep[:, back]
