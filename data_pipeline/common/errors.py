"""Errors, by who can fix them; entry scripts turn each into one sentence and an exit code."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user asked for. The message is one sentence with the remedy. Exit code 2."""

    exit_code = 2


class DataError(UserError):
    """A data set that is damaged, or does not match what reads it. Exit code 3."""

    exit_code = 3
