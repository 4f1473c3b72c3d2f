"""What is known of each task of a run, as told by doit and by the builds themselves."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field

from .events import Event

WINDOW = 3.0
"""Seconds over which a rate is taken."""

DOING = {
    "connect": "connecting",
    "hash": "hashing",
    "sources": "sources",
    "upload": "uploading",
    "fetch": "fetching",
    "place": "placing",
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
"""What to call each phase of a task that is in it."""

TRANSFERS = ("upload", "fetch")
"""The phases whose bytes are of interest."""


@dataclass
class Running:
    """A task that runs.

    Attributes:
        name: the task's.
        begun: when, by the monotonic clock.
        phase: on this machine; empty for none.
        there: the phase on the builder.
        ahead: how many jobs are before it in the builder's queue.
        builder: its URL.
        expected: how many seconds it took the last time.
        up: bytes sent.
        down: bytes received.
        start: both together when the transfer began that goes on.
        goal: how many bytes that transfer has; 0: not known.
        line: the log's last.
        tells: its build has told something.
        had: how it was had, where that is known already.
        seconds: how long it took; negative as long as that is not known.
        line_at_end: how it went, in a line.
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
    tells: bool = False
    had: str = ""
    seconds: float = -1.0
    line_at_end: str = ""
    _samples: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def doing(self) -> str:
        """What it does now, in a word."""
        return DOING.get(self.phase or self.there, "running" if not self.builder else "starting")

    @property
    def moved(self) -> int:
        """How many bytes of the transfer that goes on have moved; 0 where none does."""
        return self.up + self.down - self.start if self.transfers else 0

    @property
    def transfers(self) -> bool:
        """Whether bytes are on their way."""
        return self.phase in TRANSFERS

    def rate(self, now: float) -> float:
        """Return bytes a second, lately."""
        while len(self._samples) > 1 and now - self._samples[0][0] > WINDOW:
            self._samples.popleft()
        if not self._samples:
            return 0.0
        since, before = self._samples[0]
        return (self.up + self.down - before) / (now - since) if now - since > 0.2 else 0.0

    def take(self, event: Event) -> None:
        """Note what was told."""
        self.tells = True
        begins = not self.goal and event.get("phase", self.phase) != self.phase
        if begins or "goal" in event:
            self.start = event.get("up", self.up) + event.get("down", self.down)
            self._samples.clear()
        if self.there == "queue" and event.get("there", "queue") != "queue":
            self.line = ""  # it said that it waits
        for name in ("phase", "there", "ahead", "builder", "expected", "up", "down", "goal", "line", "had", "seconds"):
            if name in event:
                setattr(self, name, event[name])
        self.line_at_end = event.get("line_at_end", self.line_at_end)
        if "up" in event and self.phase in TRANSFERS:
            self._samples.append((time.monotonic(), self.up + self.down))


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Attributes:
        name: its name.
        how: `built`, `fetched`, `followed`, `baked`; `done`, where it was another's; or `failed`.
        seconds: how long it took.
        up: bytes sent.
        down: bytes received.
        builder: its URL; empty where it had none.
        text: what there is to say of a failure.
        line: how it went, in a line; empty where that is all there is to say.
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
        begun: when the run was, by the monotonic clock.
        total: how many tasks there are to see to.
        running: those that run, by name, in the order in which they began.
        counts: how many have ended, by how.
        failed: the names of those that have failed.
        up: bytes sent, by those that have ended.
        down: bytes received.
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
        """How many tasks have ended."""
        return sum(self.counts.values())

    @property
    def is_idle(self) -> bool:
        """Nothing has run."""
        return not self.running and not self._ended

    def start(self, name: str) -> None:
        """Note that a task has begun; what it does may have been told before."""
        if name not in self._ended:
            self.running.setdefault(name, Running(name, time.monotonic()))

    def take(self, event: Event) -> None:
        """Note what a build tells."""
        self.start(event["task"])
        if running := self.running.get(event["task"]):
            running.take(event)

    def end(self, name: str, how: str, text: str = "") -> Outcome:
        """Note that a task has ended."""
        now = time.monotonic()
        was = self.running.pop(name, None) or Running(name, now)
        self._ended.add(name)
        how = was.had or how if how == "done" else how
        self.counts[how] += 1
        if how == "failed":
            self.failed.append(name)
        self.up += was.up
        self.down += was.down
        seconds = was.seconds if was.seconds >= 0 else now - was.begun
        return Outcome(name, how, seconds, was.up, was.down, was.builder, text, was.line_at_end)

    def skip(self, how: str) -> None:
        """Count a task that did not have to run: `up to date`, or `ignored`."""
        self.counts[how] += 1

    def summary(self) -> str:
        """Return how many tasks ended how, in words."""
        order = ("built", "followed", "baked", "fetched", "done", "failed", "not run", "ignored", "up to date")
        parts = [f"{self.counts[how]:,} {how}" for how in order if self.counts[how]]
        if self.total > self.done:
            parts.append(f"{self.total - self.done:,} not finished")
        return ", ".join(parts) or "nothing to do"
