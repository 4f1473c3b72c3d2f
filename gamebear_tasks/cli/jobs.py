"""`gamebear jobs`: what runs or has run on the builders; follow one, cancel one, from any machine that reaches them."""

from __future__ import annotations

import codecs
import contextlib
import getopt
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..builders.base import Builder, JobEntry, Listed
from ..builders.protocol.flood_guard import WORTH, Rounds
from ..config import settings
from ..errors import BuilderError, GamebearError, SettingsError
from ..records.task_log import LIMIT, Harmless, noted
from ..util.messages import complain, notice
from ..util.text import age, duration, size
from ..util.urls import shown
from .command import FAILED, ProjectCommand

SHOWN = 20
"""How many jobs of a builder are shown without `--all`."""

TAIL = 256 << 10
"""Bytes of a log's end in which its last lines are looked for."""

FEWEST = 4
"""The fewest digits that name a job."""


@dataclass(frozen=True)
class Found:
    """A job, and where it is.

    Attributes:
        builder: which has it.
        entry: what the builder says of it.
    """

    builder: Builder
    entry: JobEntry

    @property
    def listed(self) -> Listed:
        """The builder, as one that lists its jobs."""
        return _listed(self.builder)

    @property
    def name(self) -> str:
        """What to call the job in messages."""
        return f"{self.entry.digest[: self.entry.digits]} ({_what(self.entry)}) on {shown(self.builder.url)}"


class Jobs(ProjectCommand):
    """Lists, follows and cancels jobs."""

    doc_purpose = "list the jobs of the builders, follow one, cancel one"
    doc_usage = "[follow ID|TASK] [cancel ID|TASK]"
    doc_description = """Without an argument: what runs, waits or has run on the
builders of the settings (builder=URL for another), first what
runs, then the newest.

`gamebear jobs follow ID` prints a job's log and goes on with it to
the job's end; Ctrl-C leaves the job alone. Exit status: 0 where
it is done, 1 where it failed or was cancelled.

`gamebear jobs cancel ID` ends a job, whoever asked for it.

ID is the beginning of a job's digest, as the list shows it, or
the name of a task of this project."""
    cmd_options = (
        {
            "name": "all",
            "short": "a",
            "long": "all",
            "type": bool,
            "default": False,
            "help": f"list all jobs, and not only the first {SHOWN} of each builder",
        },
        {"name": "json", "short": "", "long": "json", "type": bool, "default": False, "help": "list them as JSON"},
        {
            "name": "lines",
            "short": "",
            "long": "lines",
            "type": int,
            "default": -1,
            "metavar": "NUMBER",
            "help": "follow: begin with so many of the log's last lines, and not with its first",
        },
        {
            "name": "force",
            "short": "",
            "long": "force",
            "type": bool,
            "default": False,
            "help": "cancel: also where others wait for the job",
        },
    )

    def parse_execute(self, in_args: Sequence[str]) -> int:
        """Take options also behind the words; return the exit status."""
        with contextlib.suppress(getopt.GetoptError):  # doit says what is wrong
            options, words = getopt.gnu_getopt(in_args, self.cmdparser.get_short(), self.cmdparser.get_long())
            in_args = [*(word for option in options for word in option if word), "--", *words]
        status: int = super().parse_execute(in_args)
        return status

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """List, follow or cancel; return the exit status."""
        if not args:
            return self._list(options)
        verb, *names = args
        if verb not in ("follow", "cancel") or len(names) != 1:
            raise SettingsError(
                f"gamebear jobs does not know what to do with {' '.join(args)!r}.",
                "Say `gamebear jobs`, `gamebear jobs follow ID` or `gamebear jobs cancel ID`.",
            )
        found = self._find(names[0])
        return _follow(found, options["lines"]) if verb == "follow" else _cancel(found, options["force"])

    def _list(self, options: Mapping[str, Any]) -> int:
        limit = None if options["all"] else SHOWN
        lists = []
        status = 0
        for url in settings().builders:
            try:
                lists.append((shown(url), *_listed(_opened(url)).jobs(limit)))
            except BuilderError as error:  # the others may be there
                complain(error)
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
                print(f"  {total - len(entries)} more; --all lists them")
        return status

    def _find(self, name: str) -> Found:
        """Return the job that a person means; raises GamebearError."""
        builders = [_opened(url) for url in settings().builders]
        if re.fullmatch(f"[0-9a-f]{{{FEWEST},64}}", name):
            found = _having(name, builders)
            running = [job for job in found if not job.entry.is_final]
            if len({job.entry.digest for job in found}) == 1:  # several builders may have had it
                return (running or found)[0]
            if found:
                some = ", ".join(job.name for job in found[:5])
                raise SettingsError(f"{len(found)} jobs begin with {name}: {some}.", "Give more digits.")
        self.load_tasks()
        for digest in self._digests(name):
            found = _having(digest, builders)
            if found:
                return next((job for job in found if not job.entry.is_final), found[0])
        urls = " or ".join(shown(builder.url) for builder in builders)
        if name in self.tasks:
            raise SettingsError(
                f"There is no job of the task {name!r} on {urls}.", "`gamebear jobs` lists those there are."
            )
        tasks = ", and no task has that name" if self.tasks else ""
        raise SettingsError(f"No job on {urls} begins with {name!r}{tasks}.", "`gamebear jobs` lists those there are.")

    def _digests(self, name: str) -> list[str]:
        """Return the digests that a task's job has: as its files are now, and as doit last had it built from here."""
        from ..doit_plugin.action import Build

        task = self.tasks.get(name)
        if task is None:
            return []
        digests = []
        for action in task.actions:
            if isinstance(action, Build):
                with contextlib.suppress(GamebearError):  # a file of it is not there yet
                    digests.append(action.plan.order(settings()).job.digest)
        digests.append(noted(name)[0])
        return [digest for digest in digests if digest]


def _opened(url: str) -> Builder:
    from ..client.build import builder_of_this_run

    return builder_of_this_run(url)


def _listed(builder: Builder) -> Listed:
    if isinstance(builder, Listed):
        return builder
    raise BuilderError(
        f"{builder.url} cannot list its jobs.", "The package that its builder comes from does not do that."
    )


def _having(prefix: str, builders: list[Builder]) -> list[Found]:
    """Return the jobs whose digests begin so; a builder that cannot be asked is told of, and left out from then on.

    Raises:
        BuilderError: none can be asked.
    """
    found = []
    for builder in [*builders]:
        try:
            found += [Found(builder, entry) for entry in _listed(builder).jobs(SHOWN, prefix)[0]]
        except BuilderError as error:  # the others may have it
            if len(builders) == 1:
                raise
            complain(error)
            builders.remove(builder)
    return found


def _follow(job: Found, lines: int) -> int:
    """Print a job's log up to its end; return the exit status."""
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
            notice(f"{job.name} goes on; `gamebear jobs cancel {entry.digest[: entry.digits]}` ends it")
        raise
    out.close()
    said = f": {status.failure.message}" if status.failure else ""
    how = {"cancelled": "was cancelled", "lost": "was lost: the builder restarted, or the job was begun again"}
    notice(f"{job.name} {how.get(status.state) or ('is done' if status.state == 'done' else status.state)}{said}")
    return 0 if status.state == "done" else 1


def _cancel(job: Found, force: bool) -> int:
    entry = job.entry
    if entry.is_final:
        raise BuilderError(f"{job.name} does not run: it is {entry.state}.", "`gamebear jobs` lists first what runs.")
    others = job.listed.end(entry.digest, entry.attempt, force)
    if others:
        raise BuilderError(
            f"{job.name} is not cancelled, as others wait for it: {_people(others)}.",
            "--force cancels it all the same.",
        )
    notice(f"{job.name} was cancelled")
    return 0


HEAD = ("ID", "STATE", "WHAT", "BY", "TIME", "SIZE", "LAST USE")


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
        return "not known"
    outputs = ", ".join(entry.outputs[:3])
    more = entry.more + len(entry.outputs[3:])
    return f"{entry.program} -> {outputs}{f' and {more} more' if more else ''}, {entry.arch}"


def _people(names: Sequence[str]) -> str:
    """Return who they are; those that did not say so are counted."""
    known = list(dict.fromkeys(name for name in names if name))
    unknown = len([name for name in names if not name])
    return ", ".join([*known, *([f"{unknown} unknown"] if unknown else [])])


def _nth(place: int) -> str:
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"
