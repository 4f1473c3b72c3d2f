"""Task records: result, phases, transferred bytes and outputs of a task's last run, saved next to its log.

A record is JSON. It is written when the task ends, whether it succeeded or not, and replaced by the next run::

    {"version": 1, "task": "umtprd", "digest": "…", "attempt": "…", "builder": "ssh://pi@buildpi",
     "state": "done", "failure": "", "origin": "built", "why": ["buildscripts/umtprd.py changed"],
     "begun": "2020-01-31T12:00:00.000Z", "seconds": 41.3, "bytes": {"up": 70123, "down": 51234},
     "outputs": [{"name": "umtprd", "path": "build/umtprd", "size": 51234, "sha256": "…"}],
     "valid": {"since": 1580472000.0, "seconds": 2592000.0},
     "phases": [{"name": "hash", "start": 0.0, "seconds": 0.012}, …],
     "job": {"arch": "armhf", "script": {"name": "umtprd.py", "sha256": "…"}, …}}

`begun` is the time at which doit started the task, by this machine's clock. The starts of the phases are seconds since
`begun`. They are negative for phases before it: loading doit, a build that another doit started. The client's phases
do not overlap each other; the builder's phases overlap the client's. `origin` is `built`, `followed` (the build was
already running), `fetched` (it was built before) or `baked` (an SD-card image, made on this machine). `job` is the
job's document (see `jobspec.spec`), including the values of its arguments.
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

from ..jobspec.canonical_json import Json
from ..runner.store.phases import Phases
from ..runner.util.atomic_files import read_json, written_aside
from ..util.process import doit_process, file_mode
from ..util.text import duration

VERSION = 1
"""Format version of the record."""

MOST_SECONDS = 1e11
"""Seconds beyond which a duration or time in a record is invalid: three thousand years."""

CLIENT = ("load", "connect", "hash", "sources", "upload", "fetch", "place")
"""Phases on this machine: start of doit until its first task; connecting to the builder; hashing the job's files;
fetching its sources; uploading files that the builder lacks; downloading outputs; installing them as targets."""

BUILDER = ("queue", "prepare", "container", "packages", "build", "commit", "keep")
"""Phases on the builder: waiting for a slot; preparing the job's workspace; creating and removing containers;
providing the images of `packages_image`; running the script and its commands; committing images; hashing and storing
the outputs."""

BAKER = ("unpack", "check", "compose", "grow", "write", "compress", "place")
"""Phases of baking an SD-card image, besides `load`: unpacking the base; checking the file systems of the base and
finally of the image; reading the base and composing the contents; growing the file systems; writing; compressing;
renaming."""


@dataclass(frozen=True)
class Phase:
    """A phase of a task or job: a time span.

    Attributes:
        name: one of `CLIENT`, `BUILDER` or `BAKER`.
        start: seconds since the task started; in a builder's report, seconds since the job was submitted.
        seconds: its duration.
    """

    name: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Made:
    """An output that was installed as a target.

    Attributes:
        name: the output's name.
        path: the target's path.
        size: bytes of its content.
        sha256: SHA-256 of its content; empty if it was not computed.
    """

    name: str
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """Record of a task's run.

    Attributes:
        task: the task's name.
        digest: the job's digest; empty if the task failed before it had a job.
        builder: the builder's URL without credentials; empty for this machine.
        state: the result: `done`; `failed` or `cancelled` like the job; `interrupted` by a signal; `error` for a
            failure of the builder, the network or this machine, not of the job.
        origin: source of the result: `built`, `followed`, `fetched` or `baked`.
        begun: start time, in seconds since 1970.
        seconds: its duration.
        up: bytes sent to the builder.
        down: bytes received from the builder.
        phases: its phases, sorted by start.
        attempt: the builder's id of this run of the job; empty without one.
        why: the reasons for the build, a phrase each (see `rebuild_reasons`).
        failure: cause and fix, a line each; empty if there was no error.
        outputs: the outputs that were installed as targets.
        valid: `since` (seconds since 1970) and `seconds` for which the result is valid; None if it never expires.
        job: the job's document; empty if the task failed before it had a job.
    """

    task: str
    digest: str
    builder: str
    state: str
    origin: str
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
        """Return the total seconds by phase name, in the order of the phases' first starts."""
        totals: dict[str, float] = {}
        for phase in self.phases:
            totals[phase.name] = round(totals.get(phase.name, 0.0) + phase.seconds, 3)
        return totals

    def line(self) -> str:
        """Return a one-line summary of the record."""
        totals = self.totals()
        totals.pop("load", None)  # before the task started, so not part of its duration
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in totals.items() if seconds >= 0.05)
        text = f"{self.task}: {self.origin} in {duration(self.seconds)} on {self.builder}"
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
            "origin": self.origin,
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
        """Write the record atomically, without fsync: it may be lost in a power cut. Raises OSError."""
        with written_aside(path, mode=file_mode(), sync=False) as file:
            file.write(json.dumps(self.document(), indent=1).encode() + b"\n")

    @classmethod
    def of_document(cls, document: Any) -> Record | None:
        """Parse a record from JSON; None if it is invalid. Fields that older records lack are empty."""
        try:
            if document["version"] != VERSION:
                return None
            valid = document.get("valid")
            return cls(
                task=str(document["task"]),
                digest=str(document["digest"]),
                builder=str(document["builder"]),
                state=str(document["state"]),
                origin=str(document["origin" if "origin" in document else "had"]),  # `had` before 0.2
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
        """Read a record from a file; None if the file is missing or damaged."""
        return cls.of_document(read_json(path))


def finite(value: Any) -> float:
    """Validate a time in a record, in seconds, possibly negative; raises ValueError."""
    number = float(value)
    if not abs(number) < MOST_SECONDS:  # NaN is not less than anything
        raise ValueError("invalid time")
    return number


def _count(value: Any) -> int:
    """Validate a number of bytes in a record; raises ValueError."""
    number = int(value)
    if not 0 <= number < 1 << 63:
        raise ValueError("invalid number of bytes")
    return number


def _seconds_of(begun: str) -> float:
    """Parse the time stamp of a record to seconds since 1970; raises ValueError."""
    whole, _, rest = begun.removesuffix("Z").partition(".")
    return calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) + float(f"0.{rest or 0}")


class Listener(Protocol):
    """Observer of a stopwatch."""

    def phase(self, name: str) -> None:
        """Handle the start or continuation of a phase; an empty name if no phase is active."""
        ...

    def moved(self, up: int, down: int) -> None:
        """Handle new totals of the bytes sent to the builder and received from it."""
        ...

    def expects(self, up: int, down: int, count: int) -> None:
        """Handle the start of a transfer of `count` bytes; `up` and `down` are the totals before it."""
        ...


class Stopwatch:
    """Measures the phases of a task, and counts the bytes sent to the builder and received from it.

    Args:
        listener: observer that is notified immediately.

    Attributes:
        begun: start time, in seconds since 1970.
        up: bytes sent to the builder.
        down: bytes received from the builder.
    """

    def __init__(self, listener: Listener | None = None) -> None:
        self._listener = listener
        self._phase = ""
        self.begun = time.time()
        self.up = 0
        self.down = 0
        self._phases = Phases()
        self._submitted_at = float("inf")
        self._builders: tuple[Phase, ...] = ()
        loading = _loading()
        if loading is not None:
            self._phases.add("load", self._phases.began - loading, self._phases.began)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Make `phase`, `sent`, `received` and `expected` of this thread apply to this task during the block."""
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block as a phase."""
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
        """Count bytes sent to the builder and received from it."""
        self.up += up
        self.down += down
        if self._listener is not None:
            self._listener.moved(self.up, self.down)

    def expect(self, count: int) -> None:
        """Announce a transfer of `count` bytes to the listener."""
        if self._listener is not None:
            self._listener.expects(self.up, self.down, count)

    def elapsed(self) -> float:
        """Return the seconds since the task started."""
        return time.monotonic() - self._phases.began

    def builder_spent(self, phases: Iterable[Phase]) -> None:
        """Add the builder's phases of a job that ends now.

        Their starts are relative to the job's submission. They are aligned so that the last one ends now, because the
        builder's clock may differ from this machine's.
        """
        phases = tuple(phases)
        self._submitted_at = self.elapsed() - max((phase.start + phase.seconds for phase in phases), default=0.0)
        self._builders = tuple(replace(phase, start=round(self._submitted_at + phase.start, 3)) for phase in phases)

    def record(self, task: str, digest: str, builder: str, state: str, origin: str) -> Record:
        """Return a record of the task up to now; the parameters are attributes of `Record`."""
        phases = [self._until_submission(Phase(*span)) for span in self._phases.spans] + list(self._builders)
        phases.sort(key=lambda phase: phase.start)
        elapsed = round(self.elapsed(), 3)
        return Record(task, digest, builder, state, origin, self.begun, elapsed, self.up, self.down, tuple(phases))

    def _until_submission(self, phase: Phase) -> Phase:
        """Cut an upload phase at the job's submission: the builder may work on the job before it responds."""
        if phase.name != "upload" or not phase.start < self._submitted_at < phase.start + phase.seconds:
            return phase
        return replace(phase, seconds=round(self._submitted_at - phase.start, 3))


_running: ContextVar[Stopwatch | None] = ContextVar("_running", default=None)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Measure a block as a phase of this thread's current task, if it has one."""
    watch = _running.get()
    if watch is None:
        yield
        return
    with watch.phase(name):
        yield


def sent(count: int) -> None:
    """Count bytes sent to the builder for this thread's current task."""
    if watch := _running.get():
        watch.count(up=count)


def received(count: int) -> None:
    """Count bytes received from the builder for this thread's current task."""
    if watch := _running.get():
        watch.count(down=count)


def expected(count: int) -> None:
    """Announce a transfer of `count` bytes for this thread's current task."""
    if watch := _running.get():
        watch.expect(count)


_loaded = False


def _loading() -> float | None:
    """Return the seconds since doit started, on the first call in a process; None later, or without procfs."""
    global _loaded
    if _loaded:
        return None
    _loaded = True
    return since_start()


def since_start() -> float | None:
    """Return the seconds since doit started; None if the start time is unknown (no procfs)."""
    _, started = doit_process()
    if not started:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
