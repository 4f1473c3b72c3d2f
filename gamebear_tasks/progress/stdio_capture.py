"""Standard output and error while a terminal is ours: what is written to them comes to us and is shown in its turn.

That is done with file descriptors, so that it holds for programs that tasks start, and for the processes of `doit -n`.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import sys

from ..util.text import printable

_MOVES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-ln-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-Z\\^-~])")
"""What a terminal takes for a command, but for colours."""

_COLOURS = re.compile(r"(\x1b\[[0-9;:]*m)")

LONG = 64 << 10
"""Characters after which a line without an end is shown."""


class Capture:
    """What is written to standard output and error, those of them that are terminals."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        os.set_blocking(self.reader, False)
        self._ours = {fd: os.dup(fd) for fd in (1, 2) if os.isatty(fd)}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.rest = ""
        """What was written of a line that has no end yet."""
        self.begin()

    def begin(self) -> None:
        """Take what is written from now on."""
        _flush()
        for fd in self._ours:
            os.dup2(self._writer, fd)

    def pause(self) -> None:
        """Let what is written go where it went before."""
        _flush()
        for fd, own in self._ours.items():
            os.dup2(own, fd)

    def read(self) -> list[str]:
        """Return the lines that have come; an empty list where there is nothing to read."""
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
    """Return a line that somebody wrote to the terminal, coloured as it was, but unable to move about on it."""
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
