"""Timing of a job's phases: consecutive named spans, measured from a common start."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LIMIT = 64
"""Maximum number of separate spans; the time of further ones is added to the last span of the same name."""

SHORT = 0.001
"""Seconds below which a span is not recorded."""


def record_phase(folder: Path, name: str) -> None:
    """Record a job's current phase in its folder, for display. Best effort."""
    with contextlib.suppress(OSError):
        (folder / "phase").write_text(name)


def current_phase(folder: Path) -> str:
    """Return a job's current phase; empty if unknown."""
    with contextlib.suppress(OSError, ValueError):
        return (folder / "phase").read_text("ascii")[:20]
    return ""


class Phases:
    """The spans of one activity. Thread-safe.

    Args:
        began: start time by the machine's monotonic clock, which all of its processes share; now by default.
        on_switch: called with the name of each span when it begins or resumes.

    Attributes:
        began: start time by the monotonic clock.
        spans: name, start and length of each span; start and length in seconds.
    """

    def __init__(self, began: float | None = None, on_switch: Callable[[str], None] | None = None) -> None:
        self.began = time.monotonic() if began is None else began
        self.spans: list[tuple[str, float, float]] = []
        self._on_switch = on_switch
        self._lock = threading.Lock()
        self._open = threading.local()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record a block as a span. The span of an enclosing block pauses when this one begins, then resumes."""
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
        if new is not None and new != old and self._on_switch is not None:
            self._on_switch(new)

    def add(self, name: str, start: float, end: float) -> None:
        """Record a span that has ended.

        Args:
            name: name of the span.
            start: its start by the monotonic clock, in seconds.
            end: its end by the monotonic clock, in seconds.
        """
        if not end - start >= SHORT:  # also false for NaN
            return
        begun, seconds = round(start - self.began, 3), round(end - start, 3)
        with self._lock:
            number = next((n for n in reversed(range(len(self.spans))) if self.spans[n][0] == name), None)
            if number is not None:
                _, first, before = self.spans[number]
                is_continued = number == len(self.spans) - 1 and begun - first - before < 3 * SHORT
                if is_continued or len(self.spans) >= LIMIT:
                    self.spans[number] = (name, first, round(before + seconds, 3))
                    return
            if len(self.spans) < 2 * LIMIT:
                self.spans.append((name, begun, seconds))
