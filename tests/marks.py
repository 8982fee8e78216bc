"""Marks that several test files give their cases."""

import pytest


def slow_but(cases, quick):
    """The cases of a parametrization, all but the quick ones left to the nightly run."""
    marks = {True: (), False: (pytest.mark.slow,)}
    rows = ((case, case if isinstance(case, tuple) else (case,)) for case in cases)
    return [pytest.param(*row, marks=marks[case in quick]) for case, row in rows]
