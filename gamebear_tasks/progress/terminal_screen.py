"""A terminal whose last lines are ours: they are painted anew in place, and what is shown above them stays.

After each painting the cursor is at the first of them. So whatever a terminal makes of them when it gets another size,
and whatever was typed meanwhile, all that has to go is behind the cursor.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from .render import ASCII, Signs

BEGIN, END = "\x1b[?2026h", "\x1b[?2026l"
"""Around what a terminal is to show at once, if it knows that (synchronized output)."""

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
"""Hide and show the cursor: it is hidden only while it moves, for whoever is killed cannot show it again."""

CUT, WRAP = "\x1b[?7l", "\x1b[?7h"
"""Cut what is longer than a line, or wrap it: a terminal may be narrower by now than it has told us."""

SAVE, BACK = "\x1b7", "\x1b8"
"""Note the cursor's place, and return to it."""

REST = "\x1b[K"
"""Clear the rest of the line."""

BELOW = f"{REST}\x1b[C\x1b[J\r"
"""Clear from a line's begin to the end; in two steps, for tmux would keep a whole screen that is cleared in one."""


PIECE = 4 << 10
"""Bytes told at once: so it is seen whether a slow terminal takes anything."""


class Screen:
    """The end of a terminal.

    Args:
        fd: the terminal; it is not closed.
        encoding: what it understands.
    """

    def __init__(self, fd: int, encoding: str) -> None:
        self._fd = fd
        self._encoding = encoding
        try:
            "⠋✓✗━…".encode(encoding)
            self.signs = Signs()
        except (UnicodeError, LookupError):
            self.signs = ASCII
        self._console = Console(
            file=io.StringIO(), force_terminal=True, highlight=False, markup=False, emoji=False, legacy_windows=False
        )
        self._painted: list[str] = []
        self._size = (0, 0)
        self.taken = 0
        """How much the terminal has taken of what it was told, in bytes."""

    def size(self) -> tuple[int, int]:
        """Return the columns and lines that there are for us: the last column stays empty, so that nothing wraps."""
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(self._fd)
            if columns > 0 and rows > 0:
                return max(columns - 1, 1), max(rows - 1, 1)
        return 79, 23

    def paint(self, above: Sequence[Text | str], block: Sequence[Text]) -> None:
        """Show lines for good, and below them ours, which replace the ones before; raises OSError."""
        size = self.size()
        lines = [self.drawn(line) for line in block][: size[1]]
        if not above and lines == self._painted and size == self._size:
            return
        out = [BEGIN, HIDE]
        if self._painted:
            out.append(BACK if size == self._size else "")
        out.append("\r")
        fresh = bool(above) or size != self._size
        if fresh:
            out.append(BELOW)
        out += [f"{line if isinstance(line, str) else self.drawn(line)}\r\n" for line in above]
        out.append(CUT)
        known = [] if fresh else self._painted
        for number, line in enumerate(lines):
            same = 0 < number < len(known) and known[number] == line  # what is typed is shown in the first
            out.append("\r\n" if number else "")
            out.append("" if same else line + REST)
        if not fresh and len(lines) < len(self._painted):
            out.append(("\r\n" if lines else "") + BELOW + ("\x1b[A" if lines else ""))
        if len(lines) > 1:
            out.append(f"\x1b[{len(lines) - 1}A")
        out.append("\r" + WRAP + (SAVE if lines else "") + SHOW + END)
        self._painted, self._size = lines, size
        self._write("".join(out))

    def clear(self) -> None:
        """Take our lines away; raises OSError."""
        self.paint((), ())

    def drawn(self, line: Text) -> str:
        """Return a line as this terminal is told it."""
        with self._console.capture() as drawn:
            self._console.print(line, soft_wrap=True, end="")
        return drawn.get()

    def _write(self, text: str) -> None:
        data = text.encode(self._encoding, "replace")
        while data:
            count = os.write(self._fd, data[:PIECE])
            self.taken += count
            data = data[count:]
