"""Build of one task: submit its job to the builder, follow it, install its outputs.

A job that the builder lost, or whose output arrived damaged, is retried a bounded number of times.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from ..builders.base import Builder, Keeper, Order, Output, Sink, Status
from ..builders.protocol.flood_guard import WORTH, Rounds
from ..builders.registry import open_builder
from ..config import origin_in_errors, settings, variables_of_this_run
from ..errors import INVALID_REPLY, JobError
from ..jobspec.plan import SAVED, Plan, check_choice
from ..progress.events import EventSender
from ..records import run_journal, task_log, task_record
from ..records.task_log import TaskLog
from ..util.messages import notice
from ..util.text import in_line, printable, size
from ..util.urls import shown
from . import cancellation
from .builder_notices import notice_once
from .cancellation import Interest, cancel_waiting
from .install_outputs import Fetch, Mismatch, check_place, place
from .order import order_of
from .placement_marks import placing
from .rebuild_reasons import ASKED, forced, missing, reasons

TAIL = 15
"""Number of last log lines in a failure's error, unless the log itself was shown."""

LATE = 600.0
"""Seconds after a job's time limit for which the builder may still report it as running."""

OWN_LINES = "gamebear: "
"""Prefix of the runner's own lines in a log."""

ENDS = (".", "!", "?", "…")
"""Characters that end a sentence."""

TRIES = 3
"""Maximum number of attempts per doit run for a job that was lost or whose outputs were damaged."""


class Building:
    """The build of one task.

    Args:
        plan: the task's declaration.
        task: the task's name.
        out: stream for the live log; None to hide the log.
    """

    def __init__(self, plan: Plan, task: str, out: TextIO | None) -> None:
        self.plan = plan
        self.task = task
        self.out = out
        self.events = EventSender(task)
        self.watch = task_record.Stopwatch(self.events)
        self.chosen = settings()
        self.origin = "built"
        self.valid: dict[str, float] | None = None
        self.why: tuple[str, ...] = ()
        self._url = ""
        self._state = ""
        self._order: Order | None = None
        self._status: Status | None = None
        self._record: task_record.Record | None = None

    def run(self) -> dict[str, Any]:
        """Build the job and install its outputs.

        Returns:
            The values that doit saves for the task.

        Raises:
            GamebearError: the build failed.
            OSError: a local file cannot be written.
        """
        with self.watch.running(), run_journal.recording_failures(self.note):
            order = self._run()
        record = self.note("done")
        if self.chosen.provenance:
            from . import provenance

            url = self.chosen.builder_for(self.plan.arch or self.chosen.arch)
            provenance.write(self.task, self.plan, record, builder_of_this_run(url))
        self.events.ended(record)
        if self.origin != "fetched" and not self.events.has_listener:
            notice(record.line())
        # doit reads these values in every run, so they are few; the record has the rest
        values: dict[str, Any] = {"digest": order.job.digest, SAVED: self._state}
        if self.valid is not None:
            values["valid"] = self.valid
        return values

    @property
    def result(self) -> str:
        """What doit compares for tasks that depend on this one's result: the job's digest and the outputs' SHA-256.

        A job that is built again, because its result has grown too old, may have other outputs.
        """
        outputs = sorted(self._status.outputs.items()) if self._status else []
        digest = self._order.job.digest if self._order else ""
        return " ".join([digest, *(output.sha256 for _, output in outputs)])

    def _run(self) -> Order:
        check_choice(self.chosen.sources)
        log = task_log.path_of(self.task)
        for name, path in self._targets().items():
            check_place(path, is_folder=name in self.plan.folders)
        check_place(log)
        builder = builder_of_this_run(self.chosen.builder_for(self.plan.arch or self.chosen.arch))
        self._url = shown(builder.url)
        absent = missing(self.plan.targets.values())
        with task_record.phase("hash"):
            contents = self.plan.read(self.chosen.arch)
            self._state = self.plan.state(contents)
            self._order = order = order_of(self.plan, self.chosen, contents)
        last = run_journal.last(self.task)
        self.why = reasons(self.plan, order.job, last, absent)
        if self.chosen.fresh:
            self.why = forced(self.why)
        for name, source in self.plan.sources.items():
            if contents.lock is not None and (warning := source.warning(contents.lock)):
                notice(f"source {name} of {self.task}: {warning}")
        self.events.begins(self._url, last)
        with self.events.shown(self.out) as out, TaskLog(self.task, out, self.events.last_line) as kept:
            self._have_built(builder, order, kept)
        return order

    def _targets(self) -> dict[str, Path]:
        return {name: Path(path) for name, path in self.plan.targets.items()}

    def note(self, state: str, failure: str = "") -> task_record.Record:
        """Write the task's record next to its log, and return it. Only the first call writes.

        Args:
            state: the record's state (see `Record`).
            failure: the error message; empty if there was no failure.
        """
        if self._record is not None:
            return self._record
        if state != "done" and cancellation.ending.is_set():
            state = "interrupted"
        job = self._order.job if self._order else None
        outputs = self._status.outputs if self._status and state == "done" else {}
        self._record = record = replace(
            self.watch.record(self.task, job.digest if job else "", self._url, state, self.origin),
            attempt=self._status.attempt if self._status else "",
            why=self.why,
            failure=printable(failure)[:2000],
            outputs=tuple(
                task_record.Made(name, path, outputs[name].size, outputs[name].sha256)
                for name, path in self.plan.targets.items()
                if name in outputs
            ),
            valid=self.valid,
            job=job.document() if job else {},
        )
        run_journal.keep(record, task_log.path_of(self.task) if self._status else None)
        return record

    def _have_built(self, builder: Builder, order: Order, log: TaskLog) -> None:
        """Submit the job, follow it and install its outputs; retry if it was lost or an output was damaged."""
        name = self.task
        digest = order.job.digest
        again = False
        for count in range(1, TRIES + 1):
            with Interest(builder, digest, name, self.chosen.interrupt) as interest:
                with task_record.phase("upload"):
                    status = builder.submit(order, again)
                interest.attempt = status.attempt
                self.origin = "built" if not status.joined else "fetched" if status.is_final else "followed"
                log.begin(digest, status.attempt)
                if status.expired:
                    notice(f"{name} is rebuilt on {builder.url.removesuffix(':')}: {status.expired}")
                    expired = f"the builder's result expired: {in_line(status.expired)}"
                    self.why = (*(reason for reason in self.why if reason != ASKED), expired)
                if status.joined and status.state == "done":
                    self.events.remark(f"{name} was built on {builder.url} before; downloading")
                    if not log.offset:
                        log.hide()
                elif status.joined and not status.is_final:
                    self.events.remark(f"{name} is already being built on {builder.url}; following")
                self._status = status
                self._status = status = self._follow(builder, order, status, log)
                notice_once(builder.url, status.notices)
            self.valid = None if status.valid is None else {"since": time.time(), "seconds": status.valid}
            if self.origin != "fetched":
                self.watch.builder_spent(status.phases)
            if status.state == "done":
                self._check_unchanged()
                try:
                    self._place(builder, order, status)
                    return
                except Mismatch as error:
                    if count == TRIES:
                        raise
                    notice(f"{error.message} Retrying.")
                    builder.discard(digest, status.attempt)
                    continue
            again = status.state == "failed" and status.failure is not None and status.failure.kind == "blob"
            if status.state == "lost":
                notice(f"{name} was lost on {builder.url}: the builder restarted or ran out of memory")
            elif not again or count == TRIES:
                self.note(status.state, run_journal.failure(*_texts(status)) if status.failure else "")
                raise self._failure(builder, status, log)
        raise JobError(
            f"{self._failed_on}: the job was lost {TRIES} times.",
            "Check with `dmesg` and `uptime` whether the builder ran out of memory or restarts.",
            [f"The log is {log.path}."],
        )

    def _follow(self, builder: Builder, order: Order, status: Status, log: TaskLog) -> Status:
        """Follow a job until its final state and the end of its log.

        The builder is untrusted, so the time, the number of responses and the size of the log are bounded.
        """
        since: float | None = None
        rounds = Rounds(f"The lines of the log of {self.task} on {builder.url}")
        while True:
            phase = status.phase or ("queue" if status.state == "queued" else "build")
            self.events.builds("" if status.is_final else phase, status.ahead)
            status, data = builder.follow(order.job.digest, status.attempt, log.offset)
            log.write(data)
            if status.is_final and not data:
                return status
            if since is None and status.state == "running":
                since = time.monotonic()
            if since is not None and order.time_limit and time.monotonic() - since > order.time_limit + LATE:
                raise self._overdue(builder, order)
            if status.state == "running":
                continue  # a running job is bounded by its time limit
            if data:
                rounds.another(len(data) >= WORTH)
            if log.offset > 2 * task_log.LIMIT:
                raise JobError(
                    f"{self._failed_on}: its log exceeds the limit of a job ({size(log.offset)}).",
                    "Check which runner the builder runs.",
                )

    def _check_unchanged(self) -> None:
        """Check that the job's files did not change during the build: its outputs would be out of date at once.

        Raises:
            JobError: a file changed.
        """
        with task_record.phase("hash"):
            is_same = self.plan.state(self.plan.read(self.chosen.arch)) == self._state
        if not is_same:
            raise JobError(
                f"{self.task} failed: its files changed during the build, so the outputs were not installed.",
                "Run doit again.",
            )

    def _place(self, builder: Builder, order: Order, status: Status) -> None:
        if set(status.outputs) != set(self.plan.targets):
            raise JobError(
                f"{self._failed_on}: the builder returned other outputs: {repr(sorted(status.outputs))[:400]}.",
                INVALID_REPLY,
            )

        def fetch(name: str, offset: int, target: Sink, limit: int) -> None:
            with task_record.phase("fetch"):
                builder.fetch(order.job.digest, status.attempt, name, offset, target, limit)

        task_record.expected(sum(output.room for output in status.outputs.values()))
        with task_record.phase("place"):
            self._install(status.outputs, fetch)

    def _install(self, outputs: Mapping[str, Output], fetch: Fetch) -> None:
        with placing(self.plan.targets.values(), self._state):
            place(self._targets(), outputs, fetch, self.plan.folders)

    def _overdue(self, builder: Builder, order: Order) -> JobError:
        return JobError(
            f"{self._failed_on}: it still runs {LATE / 60:.0f} min after its time limit of {order.time_limit:g} s.",
            "Check what the builder does (gamebear jobs), or run doit again to wait longer.",
        )

    @property
    def _failed_on(self) -> str:
        """Object and place of a failure, the beginning of its message."""
        return f"{self.task} failed on {self._url.removesuffix(':')}"

    def _failure(self, builder: Builder, status: Status, log: TaskLog) -> JobError:
        if status.state == "cancelled":
            again = shlex.join(["doit", self.task, *typed_settings()])
            return JobError(f"{self.task} was cancelled on {self._url}.", f"Build it again: {again}")
        cause, hint = _texts(status)
        lines = [] if log.is_shown else log.last_lines(TAIL)
        tail = [f"  | {line}" for line in lines if not line.startswith(OWN_LINES)]
        step = self._next_step(builder, status)
        return JobError(
            f"{self._failed_on}: {cause}",
            hint,
            [
                f"The log is {log.path}{' and ends with:' if tail else '.'}",
                *tail,
                *([step] if step else []),
            ],
        )

    def _next_step(self, builder: Builder, status: Status) -> str:
        """Return a line on how to open a shell in a failed job's container; empty if that is not possible."""
        if not isinstance(builder, Keeper) or status.failure is None:
            return ""
        task = shlex.join([self.task, *typed_settings()])
        if status.failure.kept:
            return f"The container is kept. Open a shell in it: gamebear shell {task}"
        if status.failure.containers:
            return f"To keep its container for a shell: doit {task} keep_failed=yes; gamebear shell {task}"
        return ""


def _texts(status: Status) -> tuple[str, str]:
    """Return the cause of a failure, as a sentence, and its fix."""
    cause = status.failure.message.strip() if status.failure else ""
    cause = cause or "the builder reported no cause"
    hint = status.failure.hint if status.failure else ""
    return cause if cause.endswith(ENDS) else f"{cause}.", hint or "Read the log, fix the cause, then run doit again."


def typed_settings() -> tuple[str, ...]:
    """Return the settings on doit's command line that another command needs to find the same job, as `name=value`.

    Variables of dodo.py itself are omitted, because they may be secret.
    """
    typed = variables_of_this_run() or {}
    names = [name for name in ("builder", "arch", "sources", "base") if name in typed]
    return tuple(f"{name}={shown(typed[name]) if name == 'builder' else typed[name]}" for name in names)


_builders: dict[tuple[int, str], Builder] = {}
_builders_lock = threading.Lock()


def builder_of_this_run(url: str) -> Builder:
    """Return the builder for a URL, opened once per process for all tasks and threads, and closed at exit."""
    with _builders_lock:
        key = (os.getpid(), url)
        if key not in _builders:
            chosen = settings()
            with origin_in_errors("builder") if url in chosen.builders else contextlib.nullcontext():
                _builders[key] = builder = open_builder(url)
            builder.patience = chosen.patience
        return _builders[key]


def _end() -> None:
    """At exit, cancel the jobs that the process waits for; then close the builders, which cancelling needs."""
    cancel_waiting()
    for (pid, _), builder in list(_builders.items()):
        if pid == os.getpid():
            builder.close()


atexit.register(_end)
