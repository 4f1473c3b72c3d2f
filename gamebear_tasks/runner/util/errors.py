"""Errors with a suggested fix."""

from __future__ import annotations

import errno
import os


class RunnerError(Exception):
    """A failure on the builder that the user can fix.

    Args:
        message: what failed.
        hint: suggested fix.
    """

    kind = "runner"

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


def tells_of_full_disk(text: str) -> bool:
    """Return whether a program's output reports a full disk.

    It is searched for the text of strerror(3), ignoring case, because Go writes it with a small n.
    """
    return os.strerror(errno.ENOSPC).casefold() in text.casefold()
