"""The one way to tell a person something that is neither a job's log nor an error."""

from __future__ import annotations

import sys
import threading

_lock = threading.Lock()


def notice(text: str) -> None:
    """Write a line of our own to standard error; lines of several threads never mix."""
    with _lock:
        stream = sys.__stderr__
        if stream is not None:
            print(f"gamebear: {text}", file=stream, flush=True)


def printable(text: str) -> str:
    """Return a text without what a terminal would act on."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def size(count: int) -> str:
    """Return a number of bytes for people to read, in binary units."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
