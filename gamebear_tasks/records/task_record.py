"""Where the time of a task goes, and how it went: the record of it, kept beside the task's log.

The record is JSON, written when a task has ended, well or not, and replaced when it has run again::

    {"version": 1, "task": "umtprd", "digest": "…", "attempt": "…", "builder": "ssh://pi@buildpi",
     "state": "done", "failure": "", "had": "built", "why": ["buildscripts/umtprd.py changed"],
     "begun": "2020-01-31T12:00:00.000Z", "seconds": 41.3, "bytes": {"up": 70123, "down": 51234},
     "outputs": [{"name": "umtprd", "path": "build/umtprd", "size": 51234, "sha256": "…"}],
     "valid": {"since": 1580472000.0, "seconds": 2592000.0},
     "phases": [{"name": "hash", "start": 0.0, "seconds": 0.012}, …],
     "job": {"arch": "armhf", "script": {"name": "umtprd.py", "sha256": "…"}, …}}

`begun` is when doit began the task, by this machine's clock; the starts of the phases count from there, in seconds, and
are negative for what was before: the loading of doit, a build that another doit had begun. The phases do not overlap,
but for the builder's own, which go on while it is followed. `had` says how the result was had: `built`, `followed`
(it was being built already) or `fetched` (it had been built before); an image that was baked here is `baked`. `job` is
the job's document (see `job`), its arguments as they are.
"""

from __future__ import annotations

import calendar
import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..jobspec.spec import Json
from ..runner.store.phases import Phases
from ..runner.util.atomic_files import read_json, written_aside
from ..util.process import FILE_MODE, doit_process
from ..util.text import duration

VERSION = 1
"""Of the record."""

MOST_SECONDS = 1e11
"""No time of a record is longer, or longer ago: three thousand years."""

CLIENT = ("load", "connect", "hash", "sources", "upload", "fetch", "place")
"""The phases on this machine: from doit's start to its first task; reaching the builder; hashing the job's files;
having its sources; sending what the builder lacks; getting the outputs; making targets of them."""

BUILDER = ("queue", "prepare", "container", "packages", "build", "commit", "keep")
"""The phases on the builder: waiting for a slot; laying out the job; making and removing containers; having the images
of `packages_image`; the script, which is running its commands; committing images; hashing the outputs."""

BAKER = ("unpack", "check", "compose", "grow", "write", "compress", "place")
"""The phases of baking an image, besides `load`: unpacking the base; checking file systems, first the base's and in
the end the image's; reading it and deciding on what goes in; making room; writing; compressing; renaming."""


@dataclass(frozen=True)
class Phase:
    """A span of time.

    Attributes:
        name: one of `CLIENT`, `BUILDER` or `BAKER`.
        start: seconds since the task was begun, or since the builder was told of the job.
        seconds: how long it was.
    """

    name: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Made:
    """An output that became a target.

    Attributes:
        name: the output's.
        path: the target's.
        size: in bytes.
        sha256: of its content; empty where that was not taken.
    """

    name: str
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """How a task went.

    Attributes:
        task: its name.
        digest: its job's; empty where it did not come to one.
        builder: the builder's URL, as it may be shown; empty for this machine.
        state: how it ended: `done`; as the job did: `failed`, `cancelled`; `interrupted` by Ctrl-C; `error`, where
            the job may be well, but the builder, the network or this machine was not.
        had: `built`, `followed`, `fetched` or `baked`.
        begun: when, in seconds since 1970.
        seconds: how long it took.
        up: bytes sent to the builder.
        down: bytes that came from it.
        phases: in the order of their start.
        attempt: the builder's name of this run of the job; empty where it has none.
        why: why it was run, a phrase each (see `reasons`).
        failure: what went wrong, a paragraph; empty where nothing did.
        outputs: what became targets.
        valid: since when (seconds since 1970), and for how many seconds the result holds; None: for ever.
        job: the job's document; empty where it did not come to one.
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
    attempt: str = ""
    why: tuple[str, ...] = ()
    failure: str = ""
    outputs: tuple[Made, ...] = ()
    valid: Mapping[str, float] | None = None
    job: Mapping[str, Json] = field(default_factory=dict)

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
        text = f"{self.task}: {self.had} in {duration(self.seconds)} on {self.builder}"
        return f"{text} ({spent})" if spent else text

    def document(self) -> dict[str, Any]:
        """Return the record as JSON."""
        milliseconds = round(self.begun * 1000)
        begun = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
        return {
            "version": VERSION,
            "task": self.task,
            "digest": self.digest,
            "attempt": self.attempt,
            "builder": self.builder,
            "state": self.state,
            "failure": self.failure,
            "had": self.had,
            "why": list(self.why),
            "begun": f"{begun}.{milliseconds % 1000:03}Z",
            "seconds": self.seconds,
            "bytes": {"up": self.up, "down": self.down},
            "outputs": [asdict(output) for output in self.outputs],
            "valid": None if self.valid is None else dict(self.valid),
            "phases": [asdict(phase) for phase in self.phases],
            "job": dict(self.job),
        }

    def write(self, path: Path) -> None:
        """Write the record, which nothing depends on after a power cut; raises OSError."""
        with written_aside(path, mode=FILE_MODE, sync=False) as file:
            file.write(json.dumps(self.document(), indent=1).encode() + b"\n")

    @classmethod
    def of_document(cls, document: Any) -> Record | None:
        """Return a record from its JSON; None where it is none. What is missing in older ones is empty."""
        try:
            if document["version"] != VERSION:
                return None
            valid = document.get("valid")
            return cls(
                task=str(document["task"]),
                digest=str(document["digest"]),
                builder=str(document["builder"]),
                state=str(document["state"]),
                had=str(document["had"]),
                begun=_seconds_of(document["begun"]),
                seconds=finite(document["seconds"]),
                up=_count(document["bytes"]["up"]),
                down=_count(document["bytes"]["down"]),
                phases=tuple(
                    Phase(str(p["name"]), finite(p["start"]), finite(p["seconds"])) for p in document["phases"]
                ),
                attempt=str(document.get("attempt", "")),
                why=tuple(str(reason) for reason in document.get("why", ())),
                failure=str(document.get("failure", "")),
                outputs=tuple(
                    Made(str(made["name"]), str(made["path"]), _count(made["size"]), str(made["sha256"]))
                    for made in document.get("outputs", ())
                ),
                valid=None if valid is None else {key: finite(valid[key]) for key in ("since", "seconds")},
                job=dict(document.get("job", {})),
            )
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            return None

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """Return the record of a file; None where there is none, or a damaged one."""
        return cls.of_document(read_json(path))


def finite(value: Any) -> float:
    """Return a time of a record in seconds, which may be negative; raises ValueError."""
    number = float(value)
    if not abs(number) < MOST_SECONDS:  # NaN is not less than anything
        raise ValueError("no time")
    return number


def _count(value: Any) -> int:
    """Return a number of bytes of a record; raises ValueError."""
    number = int(value)
    if not 0 <= number < 1 << 63:
        raise ValueError("no number of bytes")
    return number


def _seconds_of(begun: str) -> float:
    """Return a time of a record in seconds since 1970; raises ValueError."""
    whole, _, rest = begun.removesuffix("Z").partition(".")
    return calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) + float(f"0.{rest or 0}")


class Listener(Protocol):
    """Who is told at once what a stopwatch notices."""

    def phase(self, name: str) -> None:
        """A phase has begun, or goes on; empty: none."""
        ...

    def moved(self, up: int, down: int) -> None:
        """So many bytes have gone to the builder by now, and come from it."""
        ...

    def expects(self, up: int, down: int, count: int) -> None:
        """The same, and how many more are about to."""
        ...


class Stopwatch:
    """Takes the time of a task, and counts what goes to the builder and comes back.

    Args:
        listener: who is told at once.
    """

    def __init__(self, listener: Listener | None = None) -> None:
        self._listener = listener
        self._phase = ""
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

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Take the time of a block as a phase."""
        outer = self._phase
        self._enter(name)
        try:
            with self._phases.phase(name):
                yield
        finally:
            self._enter(outer)

    def _enter(self, name: str) -> None:
        self._phase = name
        if self._listener is not None:
            self._listener.moved(self.up, self.down)
            self._listener.phase(name)

    def count(self, up: int = 0, down: int = 0) -> None:
        """Count bytes that went to the builder and came from it."""
        self.up += up
        self.down += down
        if self._listener is not None:
            self._listener.moved(self.up, self.down)

    def expect(self, count: int) -> None:
        """Let it be known how many bytes are about to go or come."""
        if self._listener is not None:
            self._listener.expects(self.up, self.down, count)

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
    with watch.phase(name):
        yield


def sent(count: int) -> None:
    """Count bytes that went to the builder for the task that this thread works for."""
    if watch := _running.get():
        watch.count(up=count)


def received(count: int) -> None:
    """Count bytes that came from the builder for the task that this thread works for."""
    if watch := _running.get():
        watch.count(down=count)


def expected(count: int) -> None:
    """Say how many bytes are about to go or come for the task that this thread works for."""
    if watch := _running.get():
        watch.expect(count)


_loaded = False


def _loading() -> float | None:
    """Return the seconds since doit was started, once in a process; None where that is not known (no procfs)."""
    global _loaded
    if _loaded:
        return None
    _loaded = True
    return since_start()


def since_start() -> float | None:
    """Return the seconds since doit was started; None where that is not known (no procfs)."""
    _, started = doit_process()
    if not started:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
