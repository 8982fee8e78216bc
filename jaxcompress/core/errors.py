"""The one exception that a person is meant to read."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: one line that says what, where and what to do. The command exits with 2."""
