"""Report model: tasks of the last runs, compared with their previous runs."""

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
"""Phases by kind of activity. Each kind has a colour in the report."""

KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}

ALIKE = 0.02
"""Relative change of a duration below which it counts as unchanged."""


@dataclass(frozen=True)
class TaskRun:
    """A task of a run, and the records to compare it with.

    Attributes:
        entry: the task's record and log.
        before: its previous successful record with a result of the same `origin`; None without one.
        made_before: its outputs before this run, by path.
        is_newest: whether no later run has a record of the task, so that the task's files belong to this run.
    """

    entry: Entry
    before: Record | None
    made_before: Mapping[str, Made]
    is_newest: bool

    @property
    def record(self) -> Record:
        """The task's record."""
        return self.entry.record

    @property
    def change(self) -> float | None:
        """Relative change of the duration since the previous record; None if they cannot be compared."""
        if self.before is None or self.record.state != "done" or self.before.seconds <= 0:
            return None
        return self.record.seconds / self.before.seconds - 1

    def growth(self, output: Made) -> float | None:
        """Return the relative growth of an output since the previous run; None if they cannot be compared."""
        before = self.made_before.get(output.path)
        if before is None or not before.size:
            return None
        return output.size / before.size - 1

    def is_same(self, output: Made) -> bool:
        """Return whether an output has the same content as before this run."""
        before = self.made_before.get(output.path)
        return before is not None and before.sha256 == output.sha256 != ""


def compared(runs: Sequence[Run]) -> list[list[TaskRun]]:
    """Return the tasks of each run, unsuccessful ones first.

    Args:
        runs: the runs, newest first. The result has the same order.
    """
    later: set[str] = set()
    newest: list[set[str]] = []
    for run in runs:
        names = {entry.record.task for entry in run.entries}
        newest.append(names - later)
        later |= names
    previous: dict[tuple[str, str], Record] = {}
    previous_outputs: dict[str, dict[str, Made]] = {}
    found: list[list[TaskRun]] = []
    for run, tasks in zip(reversed(runs), reversed(newest), strict=True):
        here = []
        for entry in run.entries:
            record = entry.record
            key = record.task, record.origin
            before = dict(previous_outputs.get(record.task, {}))
            here.append(TaskRun(entry, previous.get(key), before, record.task in tasks))
            if record.state == "done":
                previous[key] = record
                previous_outputs[record.task] = {output.path: output for output in record.outputs}
        here.sort(key=lambda each: (each.record.state == "done", each.record.begun))
        found.append(here)
    return found[::-1]


def counts(run: Run) -> dict[str, int]:
    """Return the number of tasks of a run by result (see `way`), unsuccessful results first, and without zeros."""
    found = dict.fromkeys(("failed", "error", "cancelled", "interrupted", "built", "baked", "followed", "fetched"), 0)
    for entry in run.entries:
        key = way(entry.record)
        found[key] = found.get(key, 0) + 1
    found["up to date"] = len(run.up_to_date)
    return {key: count for key, count in found.items() if count}


def way(record: Record) -> str:
    """Return a task's result, in a word: the `origin` if it was successful, else the state."""
    return record.origin if record.state == "done" else record.state


def span(run: Run) -> tuple[float, float]:
    """Return the start and end of a run's timeline, in seconds since the run's start.

    The start is negative if phases of another doit's build precede the run. It is at most the run's duration earlier.
    """
    starts = [entry.record.begun - run.begun + phase.start for entry in run.entries for phase in entry.record.phases]
    length = max(run.seconds, 0.1)
    return max(min([0.0, *starts]), -length), length


def totals(records: Iterable[Record]) -> tuple[int, int]:
    """Return the total bytes sent and received by tasks."""
    up = down = 0
    for record in records:
        up += record.up
        down += record.down
    return up, down


def ticks(first: float, last: float) -> list[float]:
    """Return the positions of a timeline's labels, in seconds: at most six round numbers."""
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
