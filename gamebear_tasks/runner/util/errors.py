"""Errors with a suggested fix."""

from __future__ import annotations

import signal

OUT_OF_MEMORY = "Check with `dmesg` whether the builder ran out of memory; if so, run fewer processes"
"""Suggested fix for a program that was killed by SIGKILL, without its period."""


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


def ended_by(status: int) -> str:
    """Describe how a program ended by its exit status: negative for a signal, or 128 plus its number as in a shell."""
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        return f"was killed by {signal.Signals(number).name}"
    return f"exited with {status}"
