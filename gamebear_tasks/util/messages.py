"""Messages to the user on standard error, written without raising and without mixing lines of threads."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import TextIO

from .text import in_line

_lock = threading.Lock()


def notice(text: str) -> None:
    """Write a one-line notice to standard error; best effort. Lines of several threads never mix."""
    _write(f"gamebear: {in_line(text)}")


def print_error(text: object) -> None:
    """Write the error of a failed command to standard error; best effort."""
    _write(f"ERROR: {text}")


def _write(text: str) -> None:
    with _lock:
        stream = sys.__stderr__
        if stream is not None:
            try:
                print(text, file=stream, flush=True)
            except (OSError, ValueError):
                drop(stream)


def drop(stream: TextIO) -> None:
    """Redirect a broken stream to /dev/null: Python would otherwise flush it at exit and report an error."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
