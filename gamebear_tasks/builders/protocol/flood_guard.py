"""Limit on the number of requests that a builder can cause by claiming each time that there is more."""

from __future__ import annotations

from ...errors import INVALID_REPLY, BuilderError

ROUNDS = 1000
"""Maximum number of small answers, after which the builder is considered faulty."""

WORTH = 4 << 10
"""Bytes of log from which an answer is not small; the total number of bytes is bounded elsewhere."""


class Rounds:
    """Counter of a builder's answers that each claim that there is more.

    Args:
        what: the items that never end; begins the error message.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._count = 0

    def another(self, is_worth_it: bool = False) -> None:
        """Count an answer, unless it is large enough to be worth a request.

        Raises:
            BuilderError: there were too many small answers.
        """
        self._count += not is_worth_it
        if self._count > ROUNDS:
            raise BuilderError(f"{self._what} arrive in too many small pieces.", INVALID_REPLY)
