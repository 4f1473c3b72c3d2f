"""The one way to tell a person something that is neither a job's log nor an error."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import TextIO

from .text import in_line

_lock = threading.Lock()


def notice(text: str) -> None:
    """Write a line of our own to standard error, if that takes it; lines of several threads never mix."""
    _tell(f"gamebear: {in_line(text)}")


def complain(text: object) -> None:
    """Write to standard error why a command could not do what it was asked, if that takes it."""
    _tell(f"ERROR: {text}")


def _tell(text: str) -> None:
    with _lock:
        stream = sys.__stderr__
        if stream is not None:
            try:
                print(text, file=stream, flush=True)
            except (OSError, ValueError):
                drop(stream)


def drop(stream: TextIO) -> None:
    """Let go of a stream that takes nothing any more: Python would try again at its end, and complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
