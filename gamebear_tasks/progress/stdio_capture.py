"""Capture of standard output and error while the live view controls the terminal.

Captured text is shown above the view. Redirecting the file descriptors also captures programs that tasks start, and
the worker processes of `doit -n`.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import sys

from ..util.text import printable

_MOVES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-ln-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-Z\\^-~])")
"""Terminal escape sequences, except colours."""

_COLOURS = re.compile(r"(\x1b\[[0-9;:]*m)")

LONG = 64 << 10
"""Number of characters from which on an incomplete line is shown."""


class Capture:
    """Capture of standard output and error, as far as they are terminals.

    Attributes:
        reader: descriptor of the pipe's non-blocking read end, for a selector.
    """

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        os.set_blocking(self.reader, False)
        self._ours = {fd: os.dup(fd) for fd in (1, 2) if os.isatty(fd)}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.rest = ""
        """Beginning of a line that is not complete yet."""
        self.begin()

    def begin(self) -> None:
        """Start or resume capturing."""
        _flush()
        for fd in self._ours:
            os.dup2(self._writer, fd)

    def pause(self) -> None:
        """Restore the original file descriptors."""
        _flush()
        for fd, own in self._ours.items():
            os.dup2(own, fd)

    def read(self) -> list[str]:
        """Return the lines captured since the last call, without blocking."""
        try:
            data = os.read(self.reader, 1 << 16)
        except OSError:
            return []
        *lines, self.rest = (self.rest + self._decoder.decode(data)).split("\n")
        if len(self.rest) > LONG:
            lines.append(self.rest)
            self.rest = ""
        return lines


def still(text: str) -> str:
    """Sanitize a captured line: keep its colours, remove all other escape sequences."""
    text = text.rstrip("\r")
    if "\r" in text:
        text = text.rpartition("\r")[2]
    if text.isprintable():
        return text
    parts = _COLOURS.split(_MOVES.sub("", text.expandtabs()))
    shown = "".join(part if number % 2 else printable(part) for number, part in enumerate(parts))
    return f"{shown}\x1b[0m" if len(parts) > 1 else shown


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
