"""Where time goes: spans with a name, one after the other, counted from a beginning."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LIMIT = 64
"""How many spans are kept apart; the time of further ones is added to the last of their name."""

SHORT = 0.001
"""Seconds below which a span is not noted."""


def note(folder: Path, name: str) -> None:
    """Note which phase a job is in, for whoever looks on: in its folder; nothing depends on it."""
    with contextlib.suppress(OSError):
        (folder / "phase").write_text(name)


def noted(folder: Path) -> str:
    """Return the phase that a job is in; empty where that is not known."""
    with contextlib.suppress(OSError, ValueError):
        return (folder / "phase").read_text("ascii")[:20]
    return ""


class Phases:
    """The spans of something that goes on; several threads may add to them.

    Args:
        began: the beginning, by the monotonic clock of the machine, which all of its processes share; now by default.
        tell: called with the name of each span as it begins, or goes on.

    Attributes:
        began: the same.
        spans: name, start and length of each, in seconds.
    """

    def __init__(self, began: float | None = None, tell: Callable[[str], None] | None = None) -> None:
        self.began = time.monotonic() if began is None else began
        self.spans: list[tuple[str, float, float]] = []
        self._tell = tell
        self._lock = threading.Lock()
        self._open = threading.local()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note a block as a span; the span of a block around it ends where this one begins, and goes on after it."""
        outer: str | None = getattr(self._open, "name", None)
        self._switch(outer, name)
        try:
            yield
        finally:
            self._switch(name, outer)

    def _switch(self, old: str | None, new: str | None) -> None:
        now = time.monotonic()
        if old is not None:
            self.add(old, self._open.since, now)
        self._open.name, self._open.since = new, now
        if new is not None and new != old and self._tell is not None:
            self._tell(new)

    def add(self, name: str, start: float, end: float) -> None:
        """Note a span that has ended, by the monotonic clock."""
        if not end - start >= SHORT:  # nor is what is no number
            return
        begun, seconds = round(start - self.began, 3), round(end - start, 3)
        with self._lock:
            number = next((n for n in reversed(range(len(self.spans))) if self.spans[n][0] == name), None)
            if number is not None:
                _, first, before = self.spans[number]
                goes_on = number == len(self.spans) - 1 and begun - first - before < 3 * SHORT
                if goes_on or len(self.spans) >= LIMIT:
                    self.spans[number] = (name, first, round(before + seconds, 3))
                    return
            if len(self.spans) < 2 * LIMIT:
                self.spans.append((name, begun, seconds))
