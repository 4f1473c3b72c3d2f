"""`gamebear jobs`: list, follow and cancel the jobs on the builders, from any machine that can reach them."""

from __future__ import annotations

import codecs
import contextlib
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..builders.base import Builder, Forgetful, JobEntry, Listed
from ..builders.protocol.flood_guard import WORTH, Rounds
from ..config import settings
from ..errors import BuilderError, GamebearError, SettingsError
from ..records.task_log import LIMIT, Harmless, noted
from ..util.messages import notice, print_error
from ..util.text import age, duration, size
from ..util.urls import shown
from .command import FAILED, ProjectCommand, number

SHOWN = 20
"""Maximum number of jobs per builder that are listed without `--all`."""

TAIL = 256 << 10
"""Bytes at the end of a log that are searched for its last lines."""

MINIMUM_DIGITS = 4
"""Minimum number of hexadecimal digits that identify a job."""


@dataclass(frozen=True)
class Found:
    """A job and its builder.

    Attributes:
        builder: The builder that has the job.
        entry: The builder's description of the job.
    """

    builder: Builder
    entry: JobEntry

    @property
    def listed(self) -> Listed:
        """The builder, with the interface for jobs; raises BuilderError if it lacks that."""
        return _listed(self.builder)

    @property
    def name(self) -> str:
        """Name of the job in messages."""
        return f"{self.entry.digest[: self.entry.digits]} ({_what(self.entry)}) on {shown(self.builder.url)}"


class Jobs(ProjectCommand):
    """Lists, follows, cancels and removes jobs."""

    doc_purpose = "list, follow, cancel or remove jobs on the builders"
    doc_usage = "[follow ID|TASK] [cancel ID|TASK] [forget ID|TASK]"
    doc_description = """Without an argument, lists the jobs on the configured builders
(builder=URL for another): running and queued jobs first, then
finished jobs, newest first.

`gamebear jobs follow ID` prints a job's log until the job ends.
Ctrl-C stops printing; the job continues. Exit status: 0 if the
job succeeded, 1 if it failed or was cancelled.

`gamebear jobs cancel ID` cancels a job, also one of another user.

`gamebear jobs forget ID` removes a finished job with its outputs
and log from the builders. Inputs, images and targets stay. The
next `doit` that needs the job builds it.

ID is a job's digest or its first digits, as in the list. TASK is
a task of dodo.py."""
    cmd_options = (
        {
            "name": "all",
            "short": "a",
            "long": "all",
            "type": bool,
            "default": False,
            "help": f"list all jobs, not only the first {SHOWN} of each builder",
        },
        {"name": "json", "short": "", "long": "json", "type": bool, "default": False, "help": "list the jobs as JSON"},
        {
            "name": "lines",
            "short": "",
            "long": "lines",
            "type": number("--lines"),
            "default": -1,
            "metavar": "NUMBER",
            "help": "follow: start with the last NUMBER lines of the log, not at its beginning",
        },
        {
            "name": "force",
            "short": "",
            "long": "force",
            "type": bool,
            "default": False,
            "help": "cancel: even if other users wait for the job",
        },
    )

    def parse_execute(self, in_args: Sequence[str]) -> int:
        """Accept options after the arguments too; return the exit status."""
        return super().parse_execute(self.options_first(in_args))

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """List, follow, cancel or forget; return the exit status."""
        if not args:
            return self._list(options)
        verb, *names = args
        if verb not in ("follow", "cancel", "forget") or len(names) != 1:
            raise SettingsError(
                f"gamebear jobs has invalid arguments: {' '.join(args)!r}.",
                "Run gamebear jobs, or gamebear jobs follow ID, cancel ID or forget ID.",
            )
        if verb == "forget":
            return self._forget(names[0])
        found = self._find(names[0])
        return _follow(found, options["lines"]) if verb == "follow" else _cancel(found, options["force"])

    def _list(self, options: Mapping[str, Any]) -> int:
        limit = None if options["all"] else SHOWN
        lists = []
        status = 0
        for url in settings().builders:
            try:
                lists.append((shown(url), *_listed(_opened(url)).jobs(limit)))
            except BuilderError as error:  # continue with the other builders
                print_error(error)
                status = FAILED
        if options["json"]:
            import json

            print(json.dumps([{"builder": url, **asdict(entry)} for url, entries, _ in lists for entry in entries]))
            return status
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        for url, entries, total in lists:
            print(url)
            for line in _table([_row(entry) for entry in entries]):
                print(line[:width] if width else line)
            if not entries:
                print("  no jobs")
            if total > len(entries):
                print(f"  {total - len(entries)} more (list all: gamebear jobs --all)")
        return status

    def _find(self, name: str) -> Found:
        """Return the job with an id, or of a task; raises GamebearError."""
        builders = [_opened(url) for url in settings().builders]
        if found := self._find_all(name, builders):
            return next((job for job in found if not job.entry.is_final), found[0])
        urls = " or ".join(shown(builder.url) for builder in builders)
        if name in self.tasks:
            raise SettingsError(f"Task {name!r} has no job on {urls}.", "List the jobs: gamebear jobs --all")
        kind = "job or task" if self.tasks else "job"
        raise SettingsError(f"No {kind} {name!r} on {urls}.", "List the jobs: gamebear jobs --all")

    def _find_all(self, name: str, builders: list[Builder]) -> list[Found]:
        """Return the job with an id, or of a task, once for each builder that has it.

        Raises:
            GamebearError: The id is ambiguous, or no builder can be reached.
        """
        if _is_id(name):
            found = _matching(name, builders)
            if len({job.entry.digest for job in found}) > 1:
                some = ", ".join(job.name for job in found[:5])
                raise SettingsError(f"Job id {name} is ambiguous: {some}.", "Use more digits.")
            if found:
                return found
        self.load_tasks()
        for digest in self._digests(name):
            if found := _matching(digest, builders):
                return found
        return []

    def _forget(self, name: str) -> int:
        """Remove a job from all builders that have it; without such a job, do nothing. Return the exit status."""
        builders = [_opened(url) for url in settings().builders]
        count = len(builders)
        found = self._find_all(name, builders)
        if not found and not _is_id(name) and name not in self.tasks:
            self._find(name)  # raises SettingsError
        for job in found:
            if not job.entry.is_final:
                raise BuilderError(
                    f"Job {job.name} cannot be removed: it is {job.entry.state}.",
                    f"Cancel it first: gamebear jobs cancel {job.entry.digest[: job.entry.digits]}",
                )
        for job in {job.builder.url: job for job in found}.values():
            if not isinstance(job.builder, Forgetful):
                raise BuilderError(
                    f"Builder {shown(job.builder.url)} cannot remove single jobs.",
                    "Use a builder that can: local:, ssh:// or dask://.",
                )
            freed = job.builder.forget(job.entry.digest)
            notice(f"{job.name} was removed; {size(freed or 0)} freed")
        if not found:
            urls = " or ".join(shown(builder.url) for builder in builders)
            notice(f"there is no job {name} on {urls}")
        return 0 if len(builders) == count else FAILED

    def _digests(self, name: str) -> list[str]:
        """Return the digests of a task's job: with its current files, and of its last build in this folder."""
        from ..client.order import order_of
        from ..doit_plugin.action import Build

        task = self.tasks.get(name)
        if task is None:
            return []
        digests = []
        for action in task.actions:
            if isinstance(action, Build):
                with contextlib.suppress(GamebearError):  # an input does not exist yet
                    digests.append(order_of(action.plan, settings()).job.digest)
        digests.append(noted(name)[0])
        return [digest for digest in digests if digest]


def _is_id(name: str) -> bool:
    return re.fullmatch(f"[0-9a-f]{{{MINIMUM_DIGITS},64}}", name) is not None


def _opened(url: str) -> Builder:
    from ..client.build import builder_of_this_run

    return builder_of_this_run(url)


def _listed(builder: Builder) -> Listed:
    if isinstance(builder, Listed):
        return builder
    raise BuilderError(
        f"Builder {shown(builder.url)} cannot list its jobs.", "Use a builder that can: local:, ssh:// or dask://."
    )


def _matching(prefix: str, builders: list[Builder]) -> list[Found]:
    """Return the jobs whose digests have a prefix. Report builders that fail, and remove them from the list.

    Raises:
        BuilderError: No builder can be reached.
    """
    found = []
    for builder in [*builders]:
        try:
            found += [Found(builder, entry) for entry in _listed(builder).jobs(SHOWN, prefix)[0]]
        except BuilderError as error:  # another builder may have the job
            if len(builders) == 1:
                raise
            print_error(error)
            builders.remove(builder)
    return found


def _follow(job: Found, lines: int) -> int:
    """Print a job's log until the job ends; return the exit status."""
    entry = job.entry
    offset = max(0, entry.log - TAIL) if lines >= 0 else 0
    skip = entry.log if lines >= 0 else 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    out = Harmless(sys.stdout)
    rounds = Rounds(f"The lines of the log of {job.name}")
    try:
        if skip:
            begin = bytearray()
            while len(begin) < skip - offset:
                _, data = job.listed.watch(entry.digest, entry.attempt, offset + len(begin))
                if not data:
                    break
                begin += data
                rounds.another(len(data) >= WORTH)
            offset += len(begin)
            kept = bytes(begin).splitlines(keepends=True)
            out.write(decoder.decode(b"".join(kept[len(kept) - lines :] if lines else [])))
        while True:
            status, data = job.listed.watch(entry.digest, entry.attempt, offset)
            out.write(decoder.decode(data))
            out.flush()
            offset += len(data)
            if status.is_final and not data:
                break
            if status.state != "running" and data:
                rounds.another(len(data) >= WORTH and offset <= 2 * LIMIT)
    except KeyboardInterrupt:
        out.close()
        if not entry.is_final:
            notice(f"{job.name} continues; cancel it with: gamebear jobs cancel {entry.digest[: entry.digits]}")
        raise
    out.close()
    cause = f": {status.failure.message} {status.failure.hint}".rstrip() if status.failure else ""
    results = {
        "done": "succeeded",
        "cancelled": "was cancelled",
        "lost": "was lost: the builder restarted, or the job was started again",
    }
    notice(f"{job.name} {results.get(status.state, status.state)}{cause}")
    return 0 if status.state == "done" else 1


def _cancel(job: Found, force: bool) -> int:
    entry = job.entry
    if entry.is_final:
        raise BuilderError(
            f"Job {job.name} cannot be cancelled: its state is {entry.state}.",
            "List the jobs, running ones first: gamebear jobs",
        )
    others = job.listed.end(entry.digest, entry.attempt, force)
    if others:
        raise BuilderError(
            f"Job {job.name} was not cancelled: others wait for it: {_people(others)}.",
            f"Cancel it anyway: gamebear jobs cancel --force {entry.digest[: entry.digits]}",
        )
    notice(f"{job.name} was cancelled")
    return 0


HEAD = ("ID", "STATE", "JOB", "USER", "TIME", "SIZE", "LAST USE")


def _row(entry: JobEntry) -> tuple[str, ...]:
    state = entry.state
    if entry.place is not None:
        state = f"queued, {_nth(entry.place)} in line"
    if entry.kept:
        state += ", kept"
    took = entry.took if entry.is_final else entry.age
    people = _people([entry.by, *(who for who in entry.waiting if who != entry.by)] if entry.by else entry.waiting)
    return (
        entry.digest[: entry.digits],
        f"{state} at {entry.where}" if entry.where else state,
        _what(entry),
        people or "?",
        duration(took) if took is not None else "-",
        size(entry.size) if entry.state == "done" else "-",
        f"{age(entry.used)} ago",
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (HEAD, *rows)
    ]


def _what(entry: JobEntry) -> str:
    if not entry.program:
        return "unknown"
    outputs = ", ".join(entry.outputs[:3])
    more = entry.more + len(entry.outputs[3:])
    return f"{entry.program} -> {outputs}{f' and {more} more' if more else ''}, {entry.arch}"


def _people(names: Sequence[str]) -> str:
    """Join names of users without duplicates, and the number of unknown users."""
    known = list(dict.fromkeys(name for name in names if name))
    unknown = len([name for name in names if not name])
    return ", ".join([*known, *([f"{unknown} unknown"] if unknown else [])])


def _nth(place: int) -> str:
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"
