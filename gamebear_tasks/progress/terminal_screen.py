"""Terminal screen: a block of last lines that is repainted in place; lines printed above it stay.

After each repaint the cursor is at the block's first line. So however the terminal rewraps the block on a resize, and
whatever the user types, everything that must be erased is after the cursor.
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
"""Synchronized output: a terminal that supports it shows the text between them at once."""

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
"""Hide and show the cursor. It is hidden only during a repaint, because a killed process cannot show it again."""

CUT, WRAP = "\x1b[?7l", "\x1b[?7h"
"""Disable and enable automatic wrapping, because the terminal may have become narrower than its last known size."""

SAVE, BACK = "\x1b7", "\x1b8"
"""Save and restore the cursor position."""

REST = "\x1b[K"
"""Clear the rest of the line."""

BELOW = f"{REST}\x1b[C\x1b[J\r"
"""Clear from the beginning of the line to the end of the screen. It takes two steps, because tmux would save a whole
screen that is cleared at once to its history."""


PIECE = 4 << 10
"""Maximum bytes per write, small enough to detect whether a slow terminal accepts data."""


class Screen:
    """Block of lines at the end of a terminal.

    Args:
        fd: descriptor of the terminal; it is not closed.
        encoding: the terminal's encoding.

    Attributes:
        signs: symbols that the terminal's encoding can represent.
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
        """Bytes that the terminal has accepted."""

    def size(self) -> tuple[int, int]:
        """Return the usable columns and lines. The last column stays empty, to prevent wrapping."""
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(self._fd)
            if columns > 0 and rows > 0:
                return max(columns - 1, 1), max(rows - 1, 1)
        return 79, 23

    def paint(self, above: Sequence[Text | str], block: Sequence[Text]) -> None:
        """Print lines permanently, and repaint the block below them; raises OSError.

        Args:
            above: lines to print; a `str` is written unchanged.
            block: new lines of the block.
        """
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
            same = 0 < number < len(known) and known[number] == line  # always repaint the first: typed text is there
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
        """Erase the block; raises OSError."""
        self.paint((), ())

    def drawn(self, line: Text) -> str:
        """Return a line encoded with this terminal's escape sequences."""
        with self._console.capture() as drawn:
            self._console.print(line, soft_wrap=True, end="")
        return drawn.get()

    def _write(self, text: str) -> None:
        data = text.encode(self._encoding, "replace")
        while data:
            count = os.write(self._fd, data[:PIECE])
            self.taken += count
            data = data[count:]
