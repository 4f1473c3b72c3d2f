"""Errors that a person can act on."""

from __future__ import annotations

import errno
import os


class RunnerError(Exception):
    """Something failed on the builder in a way that a person can act on.

    Args:
        message: what failed.
        hint: what to do now.
    """

    kind = "runner"

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


def tells_of_full_disk(text: str) -> bool:
    """Say whether what a program says is that there was no room: all have the words of strerror(3), Go's a small n."""
    return os.strerror(errno.ENOSPC).casefold() in text.casefold()
