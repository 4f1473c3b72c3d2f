"""What the page tells of the runs: how a task went compared with the time before, what failed and still does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..records.run_reader import Entry, Run
from ..records.task_record import Made, Record

KINDS: Mapping[str, tuple[str, ...]] = {
    "waiting": ("load", "connect", "queue"),
    "transfer": ("sources", "upload", "fetch", "unpack"),
    "files": ("hash", "prepare", "keep", "place", "check"),
    "packages": ("packages",),
    "containers": ("container", "commit"),
    "building": ("build", "compose", "grow", "write", "compress"),
}
"""The phases by what goes on in them, which is what has a colour."""

KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}

ALIKE = 0.02
"""What part of a time or size may come or go without a word."""


@dataclass(frozen=True)
class Told:
    """A task of a run, and what it is compared with.

    Attributes:
        entry: the task, its log.
        before: its last record that was had in the same way and went well; None where there is none.
        made_before: its outputs before this run, by path.
        is_newest: whether no later run has a record of the task: its files are those of this one.
    """

    entry: Entry
    before: Record | None
    made_before: Mapping[str, Made]
    is_newest: bool

    @property
    def record(self) -> Record:
        """How it went."""
        return self.entry.record

    @property
    def change(self) -> float | None:
        """By which part of the time before this one was longer; None where that cannot be said."""
        if self.before is None or self.record.state != "done" or self.before.seconds <= 0:
            return None
        return self.record.seconds / self.before.seconds - 1

    def growth(self, made: Made) -> float | None:
        """Return by which part an output has grown, 0 for none; None where there is nothing to compare with."""
        before = self.made_before.get(made.path)
        if before is None or not before.size:
            return None
        return made.size / before.size - 1

    def is_same(self, made: Made) -> bool:
        """Say whether an output has the content that it had before."""
        before = self.made_before.get(made.path)
        return before is not None and before.sha256 == made.sha256 != ""


def told(runs: Sequence[Run]) -> list[list[Told]]:
    """Return the tasks of each run, what failed first; the runs are given, and returned, with the last one first."""
    later: set[str] = set()
    newest: list[set[str]] = []
    for run in runs:
        names = {entry.record.task for entry in run.entries}
        newest.append(names - later)
        later |= names
    went: dict[tuple[str, str], Record] = {}
    made: dict[str, dict[str, Made]] = {}
    found: list[list[Told]] = []
    for run, tasks in zip(reversed(runs), reversed(newest), strict=True):
        here = []
        for entry in run.entries:
            record = entry.record
            key = record.task, record.had
            here.append(Told(entry, went.get(key), dict(made.get(record.task, {})), record.task in tasks))
            if record.state == "done":
                went[key] = record
                made[record.task] = {output.path: output for output in record.outputs}
        here.sort(key=lambda each: (each.record.state == "done", each.record.begun))
        found.append(here)
    return found[::-1]


def counts(run: Run) -> dict[str, int]:
    """Return how many tasks of a run went in which way, none left out: first what did not go well."""
    found = dict.fromkeys(("failed", "error", "cancelled", "interrupted", "built", "baked", "followed", "fetched"), 0)
    for entry in run.entries:
        key = way(entry.record)
        found[key] = found.get(key, 0) + 1
    found["up to date"] = len(run.up_to_date)
    return {key: count for key, count in found.items() if count}


def way(record: Record) -> str:
    """Return in a word how a task went: how it was had, or how it ended."""
    return record.had if record.state == "done" else record.state


def span(run: Run) -> tuple[float, float]:
    """Return the first and last second of a run's timeline, counted from its beginning.

    What another doit had begun before may be in it, but not more than as much again.
    """
    starts = [entry.record.begun - run.begun + phase.start for entry in run.entries for phase in entry.record.phases]
    length = max(run.seconds, 0.1)
    return max(min([0.0, *starts]), -length), length


def totals(records: Iterable[Record]) -> tuple[int, int]:
    """Return the bytes that went up and came down for some tasks."""
    up = down = 0
    for record in records:
        up += record.up
        down += record.down
    return up, down


def ticks(first: float, last: float) -> list[float]:
    """Return the seconds of a timeline to write a number at: round ones, at most six."""
    step = next(step for step in _steps() if (last - first) / step <= 6)
    number = -int(-first // step) if first < 0 else 0
    found = []
    while number * step < last:
        found.append(number * step)
        number += 1
    return found


def _steps() -> Iterable[float]:
    yield from (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)
    step = 28800.0
    while True:
        yield step
        step *= 2
