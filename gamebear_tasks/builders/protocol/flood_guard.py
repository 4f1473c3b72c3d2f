"""How often a builder is asked on, where nothing but its own word says that there is more."""

from __future__ import annotations

from ...errors import NONSENSE, BuilderError

ROUNDS = 1000
"""The most answers that bring less than what is worth a question, before that is the builder's fault."""

WORTH = 4 << 10
"""Bytes of a log that are worth a question; how many bytes there can be is bounded elsewhere."""


class Rounds:
    """Counts the answers of a builder that says each time that there is more.

    Args:
        what: what has no end otherwise; begins the error.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._count = 0

    def another(self, is_worth_it: bool = False) -> None:
        """Count an answer, unless it brings as much as is worth a question.

        Raises:
            BuilderError: there were too many.
        """
        self._count += not is_worth_it
        if self._count > ROUNDS:
            raise BuilderError(f"{self._what} come in small pieces, without an end.", NONSENSE)
