"""Simulated user at a terminal: a program in a pty, keyboard input, visible output, resizing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class Keyboard:
    """A terminal that runs a program.

    Args:
        command: The program.
        folder: Working folder.
        environment: All environment variables.
        size: Rows and columns.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str], size: tuple[int, int] = (24, 80)
    ) -> None:
        self._master, self._slave = os.openpty()
        self.settings = termios.tcgetattr(self._slave)
        """Terminal settings before the program starts."""
        self.resize(*size)
        self._seen = b""
        self._all = b""
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, "TERM": "xterm-256color"},
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def __enter__(self) -> Keyboard:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    @property
    def is_as_before(self) -> bool:
        """Whether the terminal has its initial settings."""
        return termios.tcgetattr(self._slave) == self.settings

    def type(self, text: str | bytes) -> None:
        """Press keys."""
        data = text.encode() if isinstance(text, str) else text
        while data:
            self._read(0.0)  # the echo would otherwise fill the terminal's buffer
            if select.select([], [self._master], [], 1.0)[1]:
                data = data[os.write(self._master, data[:1024]) :]

    def resize(self, rows: int, columns: int) -> None:
        """Resize the window."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def see(self, pattern: str, seconds: float = 90.0) -> str:
        """Wait for a pattern in the unread output. Return the output up to its end, and mark it as read."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern.encode(), self._seen, re.DOTALL)):
            assert time.monotonic() < until, f"{pattern!r} is not to be seen: {self._seen.decode(errors='replace')}"
            self._read(0.1)
        text = self._seen[: found.end()]
        self._seen = self._seen[found.end() :]
        return text.decode("utf-8", "replace")

    def end(self, seconds: float = 90.0) -> int:
        """Wait until the program has exited and return its exit status."""
        until = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < until, f"it does not end: {self.text}"
            self._read(0.05)
        while self._read(0.0):
            pass
        return self.process.returncode

    @property
    def text(self) -> str:
        """All output so far."""
        return self._all.decode("utf-8", "replace")

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        data = os.read(self._master, 1 << 16)
        self._seen += data
        self._all += data
        return bool(data)
