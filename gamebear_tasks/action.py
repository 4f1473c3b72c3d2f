"""The doit action behind `artifact()`: make the job, have a builder build it, bring its outputs to the targets."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from doit.action import BaseAction
from doit.exceptions import BaseFail, TaskError, TaskFailed

from . import functions
from .builders import Builder, Order, Status, open_builder
from .config import Settings, settings
from .errors import GamebearError, JobError
from .functions import Function
from .job import File, Job, Json
from .place import Mismatch, place
from .report import notice, printable, size
from .sources import Declared, Either, Lock, Source, check_preference

LOGS = Path("build") / "logs"
"""Where the log of each task's last build is kept, below the folder of `dodo.py`."""

TAIL = 15
"""How many of the log's last lines a failure shows."""

LOG_LIMIT = 1 << 30
"""Bytes of a log that are kept; what comes after them is only shown."""

LATE = 600.0
"""Seconds after a job's time limit for which its builder may still say that it runs."""

OWN_LINES = "gamebear: "
"""What the runner's own lines in a log begin with."""

TRIES = 3
"""How often one doit run starts a job over that was lost, or whose result was damaged, before it gives up."""


@dataclass(frozen=True)
class Plan:
    """What an `artifact()` declares.

    Attributes:
        program: the buildscript, or the function.
        identity: what the function was when dodo.py was loaded, as `functions.identity` has it.
        targets: the outputs' places by the outputs' names.
        modules: local modules by their path below the program's folder.
        inputs: files by the names that the program finds them under.
        sources: upstream trees by name.
        args: values by name.
        arch: Debian's name of an architecture; empty for the setting's.
        time_limit: seconds; None for the setting's.
        lock: where the lock file is.
    """

    program: Path | Function
    targets: Mapping[str, Path]
    identity: str = ""
    modules: Mapping[str, Path] = field(default_factory=dict)
    inputs: Mapping[str, Path] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)
    args: Mapping[str, Json] = field(default_factory=dict)
    arch: str = ""
    time_limit: float | None = None
    lock: Path = Path("gamebear.lock")

    @property
    def name(self) -> str:
        """What the program is called."""
        return self.program.name if isinstance(self.program, Path) else functions.name_of(self.program)

    def order(self, chosen: Settings) -> Order:
        """Make the job from what the files hold now.

        Raises:
            SourceError: a source is not pinned.
            JobError: a file cannot be read.
        """
        files: dict[str, Path] = {}

        def hashed(path: Path) -> File:
            sha256, executable = _hash(path)
            files[sha256] = path
            return File(sha256, executable)

        program = self.program
        lock = read_lock(self.lock)
        job = Job(
            arch=self.arch or chosen.arch,
            program=self.name,
            identity=hashed(program).sha256 if isinstance(program, Path) else self.identity,
            is_function=not isinstance(self.program, Path),
            outputs=tuple(self.targets),
            modules={name: File(hashed(path).sha256) for name, path in self.modules.items()},
            inputs={name: hashed(path) for name, path in self.inputs.items()},
            sources={name: source.identity(lock) for name, source in self.sources.items()},
            args=self.args,
        )

        return Order(
            job=job,
            files=files,
            fetch_trees=lambda: self._fetch_trees(lock),
            time_limit=chosen.time_limit if self.time_limit is None else self.time_limit,
            base=chosen.base,
            python=None if isinstance(self.program, Path) else functions.python_version(),
        )

    def _fetch_trees(self, lock: Lock) -> dict[str, Path]:
        from .cache import keep, sources_folder

        trees = {name: source.fetch(sources_folder(), lock) for name, source in self.sources.items()}
        if not isinstance(self.program, Path):
            trees["/function.pickle"] = keep(functions.pickled(self.program))
            trees["/cloudpickle.zip"] = keep(functions.cloudpickle_archive())
        return trees


class Build(BaseAction):  # type: ignore[misc]  # doit has no types
    """Builds a plan's job and places its outputs."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.task: Any = None
        self.out: str | None = None
        self.err: str | None = None
        self.result: Any = None
        self.values: dict[str, Any] = {}

    def __str__(self) -> str:
        return f"Build: {self.plan.name} -> {', '.join(map(str, self.plan.targets.values()))}"

    def __repr__(self) -> str:
        return f"<{self}>"

    def execute(self, out: TextIO | None = None, err: TextIO | None = None) -> BaseFail | None:
        """Build.

        Args:
            out: where the log is shown live; None for nowhere (doit's verbosity 0 and 1).
            err: unused; the log is one stream.
        """
        try:
            with _terminated_as_interrupted():
                return self._execute(out)
        except JobError as error:
            return TaskFailed(printable(str(error)))
        except GamebearError as error:
            return TaskError(printable(str(error)))
        except OSError as error:
            what = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
            return TaskError(printable(what))

    def _execute(self, out: TextIO | None) -> BaseFail | None:
        chosen = settings()
        check_choice(chosen.sources)
        log = LOGS / _log_name(self.task.name if self.task else self.plan.name)
        for path in (*self.plan.targets.values(), log):
            _check_place(path)
        builder = builder_of_this_run(chosen.builder)
        order = self.plan.order(chosen)
        with _Log(log, out) as kept:
            status = self._have_built(builder, order, kept, chosen)
            if self.plan.order(chosen).job.digest != order.job.digest:
                raise JobError(
                    f"What {self.plan.name} is built from changed while it was built, so its outputs were not placed.",
                    "Run doit again.",
                )
            digest = order.job.digest
            self.values = {"digest": digest, "builder": builder.url, "phases": dict(status.phases)}
            self.result = digest
        return None

    def _have_built(self, builder: Builder, order: Order, log: _Log, chosen: Settings) -> Status:
        """See the job through to its outputs at their targets; start it over where a builder lost it."""
        digest = order.job.digest
        again = False
        for count in range(1, TRIES + 1):
            status = builder.submit(order, again)
            log.begin(digest, status.attempt)
            if status.joined and not status.is_final:
                notice(f"{self.plan.name} is being built on {builder.url} already; following")
            with _Interest(builder, digest, status.attempt, self.plan.name, chosen.interrupt):
                since: float | None = None
                while True:
                    status, data = builder.follow(digest, status.attempt, log.offset)
                    log.write(data)
                    if status.is_final and not data:
                        break
                    if since is None and status.state == "running":
                        since = time.monotonic()
                    if since is not None and order.time_limit and time.monotonic() - since > order.time_limit + LATE:
                        raise self._overdue(builder, order)
            if status.state == "done":
                try:
                    self._place(builder, order, status)
                    return status
                except Mismatch as error:
                    if count == TRIES:
                        raise
                    notice(f"{error} Trying again.")
                    builder.discard(digest, status.attempt)
                    continue
            again = status.state == "failed" and status.failure is not None and status.failure.kind == "blob"
            if status.state == "lost":
                notice(f"{self.plan.name} was lost on {builder.url} (the builder restarted, or ran out of memory)")
            elif not again:
                raise self._failure(builder, status, log)
        raise JobError(
            f"{builder.url} lost {self.plan.name} {TRIES} times (job {digest[:12]}).",
            f"See on the builder whether it restarts or runs out of memory; the log is {log.path}.",
        )

    def _place(self, builder: Builder, order: Order, status: Status) -> None:
        if set(status.outputs) != set(self.plan.targets):
            raise JobError(
                f"{builder.url} has outputs other than those of {self.plan.name}:"
                f" {repr(sorted(status.outputs))[:400]}.",
                "Run doit again; if it stays so, see on the builder what runs there as ~/.cache/gamebear/v1/runner.",
            )
        place(
            self.plan.targets,
            status.outputs,
            lambda name, offset, target, limit: builder.fetch(
                order.job.digest, status.attempt, name, offset, target, limit
            ),
        )

    def _overdue(self, builder: Builder, order: Order) -> JobError:
        return JobError(
            f"{builder.url} still says that it builds {self.plan.name}, whose time limit of"
            f" {order.time_limit:g} seconds is long over.",
            f"See on the builder what it does (job {order.job.digest[:12]}); doit again waits for it again.",
        )

    def _failure(self, builder: Builder, status: Status, log: _Log) -> JobError:
        if status.state == "cancelled":
            return JobError(f"{self.plan.name} was cancelled on {builder.url}.", "Run doit again to build it.")
        message = status.failure.message if status.failure else "It failed."
        tail = "".join(f"\n  | {line}" for line in log.last_lines(TAIL) if not line.startswith(OWN_LINES))
        return JobError(
            f"{self.plan.name}, built by {builder.url}, failed. {message}"
            + (f"\nThe last lines of its log:{tail}" if tail else ""),
            f"\nThe whole log is {log.path}.",
        )


_LAST = 16384
"""Bytes of the log's end in which its last lines are looked for."""


def _check_place(path: Path) -> None:
    """Refuse a path where no file can be made; raises JobError."""
    if path.is_dir():
        raise JobError(f"{path} is a folder, and should become a file.", "Move it out of the way.")
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise JobError(f"{folder} is a file, and should be a folder for {path}.", "Move it out of the way.")


def _log_name(task: str) -> str:
    return task.replace("/", "_").replace("\0", "_")[:200] + ".log"


class _Log:
    """A task's log: kept in a file, shown as it comes.

    Beside the file there is a note of which attempt of which job it holds, so that a later run goes on where this one
    was interrupted.
    """

    def __init__(self, path: Path, out: TextIO | None) -> None:
        self.path = path
        self._note = path.with_name(f".{path.stem}.json")
        self._out = out
        self._digest = ""
        self._attempt = ""
        self._last = b""
        self.offset = 0

    def __enter__(self) -> _Log:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def begin(self, digest: str, attempt: str) -> None:
        """Go on with an attempt's log where it was left, or begin it."""
        self.offset = 0
        try:
            note = json.loads(self._note.read_bytes())
            if note == {"digest": digest, "attempt": attempt}:
                self.offset = os.fstat(self._file.fileno()).st_size
                return
        except (OSError, ValueError):
            pass
        self._file.truncate(0)
        self._note.write_text(json.dumps({"digest": digest, "attempt": attempt}), "utf-8")

    def write(self, data: bytes) -> None:
        """Keep and show what came."""
        if not data:
            return
        room = max(0, LOG_LIMIT - self.offset)
        self._keep(memoryview(data)[:room])
        if room and len(data) > room:
            notice(f"{self.path} is full with the log's first {size(LOG_LIMIT)}; the rest is only shown")
        self._last = (self._last + data)[-_LAST:]
        self.offset += len(data)
        if self._out is not None:
            self._out.write(data.decode("utf-8", "replace"))
            self._out.flush()

    def _keep(self, data: memoryview) -> None:
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise JobError(
                f"The log {self.path} cannot be written: {error.strerror}.",
                "Make room, then run doit again: what is being built goes on, and is found.",
            ) from error

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines, as a person may see them."""
        data = self._last
        if self.offset <= LOG_LIMIT:
            with self.path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST))
                data = file.read()
        lines = data.decode("utf-8", "replace").splitlines()[-count:]
        return [printable(line)[:400] for line in lines]


class _Interest:
    """While the block runs we wait for a job; an interruption in it ends the job (or leaves it, as is set)."""

    def __init__(self, builder: Builder, digest: str, attempt: str, name: str, interrupt: str) -> None:
        self._cancel: Callable[[], object] = lambda: builder.cancel(digest, attempt)
        self._builder = builder
        self._name = name
        self._interrupt = interrupt

    def __enter__(self) -> None:
        if self._interrupt == "cancel":
            with _waiting_lock:
                _waiting[id(self)] = self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with _waiting_lock:
            mine = _waiting.pop(id(self), None)
        if kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit):
            if self._interrupt == "detach":
                notice(f"{self._name} goes on on {self._builder.url}; run doit again and it is found")
            elif mine is not None:
                self.stop()

    def stop(self) -> None:
        """End the job on the builder."""
        notice(f"ending {self._name} on {self._builder.url} (Ctrl-C again to leave at once)")
        try:
            ended = self._cancel()
        except KeyboardInterrupt:
            notice(f"{self._name} may still run on {self._builder.url}; run doit again and it is found")
            raise
        except GamebearError as error:
            notice(f"{self._name} may still run on {self._builder.url}: {error}")
        else:
            if not ended:
                notice(f"{self._name} goes on on {self._builder.url}: somebody else waits for it too")


_waiting: dict[int, _Interest] = {}
_waiting_lock = threading.Lock()
_builders: dict[tuple[int, str], Builder] = {}
_builders_lock = threading.Lock()


def builder_of_this_run(url: str) -> Builder:
    """Return the builder of a URL, opened once per process however many tasks and threads ask; closed at exit."""
    with _builders_lock:
        key = (os.getpid(), url)
        if key not in _builders:
            _builders[key] = open_builder(url)
        return _builders[key]


def _leave() -> None:
    """Before the process ends: end what its threads still wait for (doit's threads die with it), close the builders."""
    with _waiting_lock:
        left = list(_waiting.values())
        _waiting.clear()
    with contextlib.suppress(KeyboardInterrupt):
        for interest in left:
            interest.stop()
    for (pid, _), builder in list(_builders.items()):
        if pid == os.getpid():
            builder.close()


atexit.register(_leave)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """In a process of `doit -n`, take SIGTERM as Ctrl-C: doit sends it to them when it is interrupted itself."""
    if multiprocessing.parent_process() is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    seen: list[int] = []

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        seen.append(number)
        if len(seen) == 1 or number == signal.SIGINT:
            raise KeyboardInterrupt  # a SIGTERM after the first signal is doit's, and not a second wish

    before = signal.signal(signal.SIGTERM, interrupt), signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


declared: dict[str, Declared] = {}
"""Every source that an `artifact()` of this dodo.py declares, by a text that tells it from the others."""


def check_choice(preference: str) -> None:
    """Refuse a setting `sources` that names nothing there is to choose from, where there is something.

    Raises:
        SettingsError: it is misspelt.
    """
    if any(isinstance(source, Either) for source in declared.values()):
        check_preference(preference, declared.values())


def read_lock(path: Path) -> Lock:
    """Return the lock file's content, read once as long as it stays the same."""
    try:
        about = path.stat()
    except OSError:
        return Lock.read(path)
    key = (str(path.absolute()), about.st_mtime_ns, about.st_size)
    lock = _locks.get(key)
    if lock is None:
        lock = _locks[key] = Lock.read(path)
    return lock


_locks: dict[tuple[str, int, int], Lock] = {}


def _hash(path: Path) -> tuple[str, bool]:
    """Return a file's SHA-256 and whether it is executable."""
    try:
        with path.open("rb", buffering=0) as file:
            digest = hashlib.sha256()
            while data := file.read(1 << 20):
                digest.update(data)
            return digest.hexdigest(), bool(os.fstat(file.fileno()).st_mode & 0o100)
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror}.", "A job needs all of its files.") from error
