"""Progress model: the state of each task of a run, updated by doit and by the events of builds."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field

from .events import Event

WINDOW = 3.0
"""Seconds over which a transfer rate is averaged."""

DOING = {
    "connect": "connecting",
    "hash": "hashing",
    "sources": "sources",
    "upload": "uploading",
    "fetch": "fetching",
    "place": "installing",
    "queue": "queued",
    "prepare": "preparing",
    "container": "container",
    "packages": "packages",
    "build": "building",
    "commit": "committing",
    "keep": "saving",
    "unpack": "unpacking",
    "check": "checking",
    "compose": "composing",
    "grow": "growing",
    "write": "writing",
    "compress": "compressing",
}
"""Display text of each phase."""

EVENT_FIELDS = (
    *("phase", "there", "ahead", "builder", "expected"),
    *("up", "down", "goal", "line", "origin", "seconds"),
)
"""Fields of an event that are attributes of `Running`."""

TRANSFERS = ("upload", "fetch")
"""Phases that transfer bytes and show a transfer rate."""


@dataclass
class Running:
    """A running task.

    Attributes:
        name: the task's name.
        begun: start time, by the monotonic clock.
        phase: phase on this machine; empty for none.
        there: phase on the builder; empty for none.
        ahead: number of jobs before it in the builder's queue; None if unknown.
        builder: the builder's URL.
        expected: seconds that its last build took; None if unknown.
        up: bytes sent.
        down: bytes received.
        start: bytes sent and received before the current transfer.
        goal: bytes of the current transfer; 0 if unknown.
        line: last line of the log.
        has_events: its build has sent an event.
        origin: source of its result (see `task_record`); empty until it is known.
        seconds: its duration; negative until it is known.
        line_at_end: one-line summary of its result.
    """

    name: str
    begun: float
    phase: str = ""
    there: str = ""
    ahead: int | None = None
    builder: str = ""
    expected: float | None = None
    up: int = 0
    down: int = 0
    start: int = 0
    goal: int = 0
    line: str = ""
    has_events: bool = False
    origin: str = ""
    seconds: float = -1.0
    line_at_end: str = ""
    _samples: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def doing(self) -> str:
        """Current activity, in a word."""
        return DOING.get(self.phase or self.there, "running" if not self.builder else "starting")

    @property
    def moved(self) -> int:
        """Bytes moved by the current transfer; 0 without one."""
        return self.up + self.down - self.start if self.transfers else 0

    @property
    def transfers(self) -> bool:
        """Whether a transfer is in progress."""
        return self.phase in TRANSFERS

    def rate(self, now: float) -> float:
        """Return the current transfer rate, in bytes per second."""
        while len(self._samples) > 1 and now - self._samples[0][0] > WINDOW:
            self._samples.popleft()
        if not self._samples:
            return 0.0
        since, before = self._samples[0]
        return (self.up + self.down - before) / (now - since) if now - since > 0.2 else 0.0

    def take(self, event: Event) -> None:
        """Apply an event."""
        self.has_events = True
        begins = not self.goal and event.get("phase", self.phase) != self.phase
        if begins or "goal" in event:
            self.start = event.get("up", self.up) + event.get("down", self.down)
            self._samples.clear()
        if self.there == "queue" and event.get("there", "queue") != "queue":
            self.line = ""  # the last line was about waiting
        for name in (
            "phase",
            "there",
            "ahead",
            "builder",
            "expected",
            "up",
            "down",
            "goal",
            "line",
            "origin",
            "seconds",
        ):
            if name in event:
                setattr(self, name, event[name])
        self.line_at_end = event.get("line_at_end", self.line_at_end)
        if "up" in event and self.phase in TRANSFERS:
            self._samples.append((time.monotonic(), self.up + self.down))


@dataclass(frozen=True)
class Outcome:
    """Result of a task.

    Attributes:
        name: the task's name.
        how: `built`, `fetched`, `followed` or `baked`; `done` for a task that is not an artifact; `failed` or
            `not run`.
        seconds: its duration.
        up: bytes sent.
        down: bytes received.
        builder: the builder's URL; empty without a builder.
        text: description of a failure.
        line: one-line summary of the result; empty if its build sent none.
    """

    name: str
    how: str
    seconds: float
    up: int = 0
    down: int = 0
    builder: str = ""
    text: str = ""
    line: str = ""


class Board:
    """The tasks of a run.

    Attributes:
        begun: start time of the run, by the monotonic clock.
        total: number of selected tasks.
        running: the running tasks, by name, in the order in which they started.
        counts: number of finished tasks, by result.
        failed: names of the tasks that failed.
        up: bytes sent by finished tasks.
        down: bytes received by finished tasks.
    """

    def __init__(self, total: int = 0) -> None:
        self.begun = time.monotonic()
        self.total = total
        self.running: dict[str, Running] = {}
        self.counts: Counter[str] = Counter()
        self.failed: list[str] = []
        self.up = 0
        self.down = 0
        self._ended: set[str] = set()

    @property
    def done(self) -> int:
        """Number of finished tasks."""
        return sum(self.counts.values())

    @property
    def is_idle(self) -> bool:
        """Whether no task has run yet."""
        return not self.running and not self._ended

    def start(self, name: str) -> None:
        """Record the start of a task; its events may have arrived earlier."""
        if name not in self._ended:
            self.running.setdefault(name, Running(name, time.monotonic()))

    def take(self, event: Event) -> None:
        """Apply an event of a build."""
        self.start(event["task"])
        if running := self.running.get(event["task"]):
            running.take(event)

    def end(self, name: str, how: str, text: str = "") -> Outcome:
        """Record the end of a task.

        Args:
            name: the task's name.
            how: `done`, `failed` or `not run`. The origin that its build reported replaces `done`.
            text: description of a failure.
        """
        now = time.monotonic()
        was = self.running.pop(name, None) or Running(name, now)
        self._ended.add(name)
        how = was.origin or how if how == "done" else how
        self.counts[how] += 1
        if how == "failed":
            self.failed.append(name)
        self.up += was.up
        self.down += was.down
        seconds = was.seconds if was.seconds >= 0 else now - was.begun
        return Outcome(name, how, seconds, was.up, was.down, was.builder, text, was.line_at_end)

    def skip(self, how: str) -> None:
        """Count a task that did not run.

        Args:
            how: `up to date` or `ignored`.
        """
        self.counts[how] += 1

    def summary(self) -> str:
        """Return the number of tasks by result, as text."""
        order = ("built", "followed", "baked", "fetched", "done", "failed", "not run", "ignored", "up to date")
        parts = [f"{self.counts[how]:,} {how}" for how in order if self.counts[how]]
        if self.total > self.done:
            parts.append(f"{self.total - self.done:,} not finished")
        return ", ".join(parts) or "nothing to do"
