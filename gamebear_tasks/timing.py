"""Where the time of a task goes: the record of it, kept beside the task's log.

The record is JSON, written when a task's job has ended, well or not, and replaced when the next one has::

    {"version": 1, "task": "umtprd", "digest": "…", "builder": "ssh://pi@buildpi", "state": "done", "had": "built",
     "begun": "2020-01-31T12:00:00.000Z", "seconds": 41.3, "bytes": {"up": 70123, "down": 51234},
     "phases": [{"name": "hash", "start": 0.0, "seconds": 0.012}, …]}

`begun` is when doit began the task, by this machine's clock; the starts of the phases count from there, in seconds, and
are negative for what was before: the loading of doit, a build that another doit had begun. The phases do not overlap,
but for the builder's own, which go on while it is followed. `had` says how the result was had: `built`, `followed`
(it was being built already) or `fetched` (it had been built before).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .runner.files import write_bytes
from .runner.phases import Phases

VERSION = 1
"""Of the record."""

CLIENT = ("load", "connect", "hash", "sources", "upload", "fetch", "place")
"""The phases on this machine: from doit's start to its first task; reaching the builder; hashing the job's files;
having its sources; sending what the builder lacks; getting the outputs; making targets of them."""

BUILDER = ("queue", "prepare", "container", "packages", "build", "commit", "keep")
"""The phases on the builder: waiting for a slot; laying out the job; making and removing containers; having the images
of `packages_image`; the script, which is running its commands; committing images; hashing the outputs."""


@dataclass(frozen=True)
class Phase:
    """A span of time.

    Attributes:
        name: one of `CLIENT` or `BUILDER`.
        start: seconds since the task was begun, or since the builder was told of the job.
        seconds: how long it was.
    """

    name: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Record:
    """How a task went.

    Attributes:
        task: its name.
        digest: its job's.
        builder: the builder's URL, as it may be shown.
        state: how the job ended.
        had: `built`, `followed` or `fetched`.
        begun: when, in seconds since 1970.
        seconds: how long it took.
        up: bytes sent to the builder.
        down: bytes that came from it.
        phases: in the order of their start.
    """

    task: str
    digest: str
    builder: str
    state: str
    had: str
    begun: float
    seconds: float
    up: int
    down: int
    phases: tuple[Phase, ...]

    def totals(self) -> dict[str, float]:
        """Return the seconds of each phase that there was, in the order in which they first began."""
        totals: dict[str, float] = {}
        for phase in self.phases:
            totals[phase.name] = round(totals.get(phase.name, 0.0) + phase.seconds, 3)
        return totals

    def line(self) -> str:
        """Return the record as a sentence."""
        totals = self.totals()
        totals.pop("load", None)  # it was before
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in totals.items() if seconds >= 0.05)
        text = f"{self.task}: {self.had} in {_duration(self.seconds)} on {self.builder}"
        return f"{text} ({spent})" if spent else text

    def write(self, path: Path) -> None:
        """Write the record; raises OSError."""
        milliseconds = round(self.begun * 1000)
        begun = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
        record = {
            "version": VERSION,
            "task": self.task,
            "digest": self.digest,
            "builder": self.builder,
            "state": self.state,
            "had": self.had,
            "begun": f"{begun}.{milliseconds % 1000:03}Z",
            "seconds": self.seconds,
            "bytes": {"up": self.up, "down": self.down},
            "phases": [asdict(phase) for phase in self.phases],
        }
        write_bytes(path, json.dumps(record, indent=1).encode() + b"\n", mode=0o644)


def _duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Stopwatch:
    """Takes the time of a task, and counts what goes to the builder and comes back."""

    def __init__(self) -> None:
        self.begun = time.time()
        self.up = 0
        self.down = 0
        self._phases = Phases()
        self._told = float("inf")
        self._builders: tuple[Phase, ...] = ()
        loading = _loading()
        if loading is not None:
            self._phases.add("load", self._phases.began - loading, self._phases.began)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let `phase`, `sent` and `received` of this thread count for this task while the block runs."""
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)

    def elapsed(self) -> float:
        """Return the seconds since the task was begun."""
        return time.monotonic() - self._phases.began

    def builder_spent(self, phases: Iterable[Phase]) -> None:
        """Note where a builder says that the time of a job went which ends now; its clock is not ours."""
        phases = tuple(phases)
        self._told = self.elapsed() - max((phase.start + phase.seconds for phase in phases), default=0.0)
        self._builders = tuple(replace(phase, start=round(self._told + phase.start, 3)) for phase in phases)

    def record(self, task: str, digest: str, builder: str, state: str, had: str) -> Record:
        """Return how the task went until now; its parameters are the record's."""
        phases = [self._until_told(Phase(*span)) for span in self._phases.spans] + list(self._builders)
        phases.sort(key=lambda phase: phase.start)
        elapsed = round(self.elapsed(), 3)
        return Record(task, digest, builder, state, had, self.begun, elapsed, self.up, self.down, tuple(phases))

    def _until_told(self, phase: Phase) -> Phase:
        """Return an upload without what the builder did of the job before it answered."""
        if phase.name != "upload" or not phase.start < self._told < phase.start + phase.seconds:
            return phase
        return replace(phase, seconds=round(self._told - phase.start, 3))


_running: ContextVar[Stopwatch | None] = ContextVar("_running", default=None)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Take the time of a block as a phase of the task that this thread works for, if it works for one."""
    watch = _running.get()
    if watch is None:
        yield
        return
    with watch._phases.phase(name):
        yield


def sent(count: int) -> None:
    """Count bytes that went to the builder for the task that this thread works for."""
    if watch := _running.get():
        watch.up += count


def received(count: int) -> None:
    """Count bytes that came from the builder for the task that this thread works for."""
    if watch := _running.get():
        watch.down += count


_loaded = False


def _loading() -> float | None:
    """Return the seconds since doit was started, once in a process; None where that is not known (no procfs)."""
    global _loaded
    if _loaded:
        return None
    _loaded = True
    parent = multiprocessing.parent_process()  # of `doit -n`
    try:
        stat = Path(f"/proc/{parent.pid if parent else os.getpid()}/stat").read_text("utf-8", "replace")
        started = int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")  # proc_pid_stat(5): starttime
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (AttributeError, IndexError, OSError, ValueError):
        return None
