"""The doit action behind `artifact()`: make the job, have a builder build it, bring its outputs to the targets."""

from __future__ import annotations

import atexit
import os
import threading
import time
from typing import Any, TextIO

from doit.action import BaseAction
from doit.exceptions import BaseFail, TaskError, TaskFailed

from . import tasklog
from .builders import Builder, Order, Status, open_builder
from .config import Settings, settings
from .errors import GamebearError, JobError
from .interrupt import Interest, say_so_without_a_traceback, terminated_as_interrupted
from .place import Mismatch, check_place, place
from .plan import Plan, check_choice
from .report import notice, notice_once, printable, size
from .tasklog import TaskLog

TAIL = 15
"""How many of the log's last lines a failure shows."""

LATE = 600.0
"""Seconds after a job's time limit for which its builder may still say that it runs."""

OWN_LINES = "gamebear: "
"""What the runner's own lines in a log begin with."""

TRIES = 3
"""How often one doit run starts a job over that was lost, or whose result was damaged, before it gives up."""


class Build(BaseAction):  # type: ignore[misc]  # doit has no types
    """Builds a plan's job and places its outputs."""

    def __init__(self, plan: Plan) -> None:
        say_so_without_a_traceback()  # here, because it is the main process of a `doit -n` that shows it
        self.plan = plan
        self.task: Any = None
        self.out: str | None = None
        self.err: str | None = None
        self.result: Any = None
        self.values: dict[str, Any] = {}
        self._answered = 0.0

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
            with terminated_as_interrupted():
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
        log = tasklog.path_of(self.task.name if self.task else self.plan.name)
        for path in (*self.plan.targets.values(), log):
            check_place(path)
        builder = builder_of_this_run(chosen.builder)
        order = self.plan.order(chosen)
        with TaskLog(log, out) as kept:
            status = self._have_built(builder, order, kept, chosen)
        digest = order.job.digest
        self.values = {"digest": digest, "builder": builder.url, "phases": dict(status.phases)}
        if status.valid is not None:
            self.values["valid"] = {"since": self._answered, "seconds": status.valid}
        self.result = digest
        return None

    def _have_built(self, builder: Builder, order: Order, log: TaskLog, chosen: Settings) -> Status:
        """See the job through to its outputs at their targets; start it over where a builder lost it."""
        digest = order.job.digest
        again = False
        for count in range(1, TRIES + 1):
            with Interest(builder, digest, self.plan.name, chosen.interrupt) as interest:
                status = builder.submit(order, again)
                interest.attempt = status.attempt
                log.begin(digest, status.attempt)
                if status.expired:
                    notice(f"{self.plan.name} is built again on {builder.url}, as {status.expired}")
                if status.joined and status.state == "done":
                    notice(f"{self.plan.name} was built on {builder.url} before; fetching")
                    if not log.offset:
                        log.hide()
                elif status.joined and not status.is_final:
                    notice(f"{self.plan.name} is being built on {builder.url} already; following")
                status = self._follow(builder, order, status, log)
                self._answered = time.time()
                notice_once(builder.url, status.notices)
            if status.state == "done":
                self._check_unchanged(order, chosen)
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
            elif not again or count == TRIES:
                raise self._failure(builder, status, log)
        raise JobError(
            f"{builder.url} lost {self.plan.name} {TRIES} times (job {digest[:12]}).",
            f"See on the builder whether it restarts or runs out of memory; the log is {log.path}.",
        )

    def _follow(self, builder: Builder, order: Order, status: Status, log: TaskLog) -> Status:
        """Follow a job to its end, within bounds: a builder may say for ever that it runs, or talk without end."""
        since: float | None = None
        while True:
            status, data = builder.follow(order.job.digest, status.attempt, log.offset)
            log.write(data)
            if status.is_final and not data:
                return status
            if since is None and status.state == "running":
                since = time.monotonic()
            if since is not None and order.time_limit and time.monotonic() - since > order.time_limit + LATE:
                raise self._overdue(builder, order)
            if status.state != "running" and log.offset > 2 * tasklog.LIMIT:  # what runs is bounded by its time
                raise JobError(
                    f"The log of {self.plan.name} on {builder.url} goes on after {size(log.offset)}, and no job may"
                    " write so much.",
                    "See on the builder what runs there.",
                )

    def _check_unchanged(self, order: Order, chosen: Settings) -> None:
        """Refuse to place what was built from files that are others by now: doit would take those for built."""
        if self.plan.order(chosen).job.digest != order.job.digest:
            raise JobError(
                f"What {self.plan.name} is built from changed while it was built, so its outputs were not placed.",
                "Run doit again.",
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

    def _failure(self, builder: Builder, status: Status, log: TaskLog) -> JobError:
        if status.state == "cancelled":
            return JobError(f"{self.plan.name} was cancelled on {builder.url}.", "Run doit again to build it.")
        message = status.failure.message if status.failure else "It failed."
        tail = "".join(f"\n  | {line}" for line in log.last_lines(TAIL) if not line.startswith(OWN_LINES))
        return JobError(
            f"{self.plan.name}, built by {builder.url}, failed. {message}"
            + (f"\nThe last lines of its log:{tail}" if tail else "")
            + f"\nThe whole log is {log.path}."
        )


_builders: dict[tuple[int, str], Builder] = {}
_builders_lock = threading.Lock()


def builder_of_this_run(url: str) -> Builder:
    """Return the builder of a URL, opened once per process however many tasks and threads ask; closed at exit."""
    with _builders_lock:
        key = (os.getpid(), url)
        if key not in _builders:
            _builders[key] = builder = open_builder(url)
            builder.patience = settings().patience
        return _builders[key]


def _close_builders() -> None:
    for (pid, _), builder in list(_builders.items()):
        if pid == os.getpid():
            builder.close()


atexit.register(_close_builders)
