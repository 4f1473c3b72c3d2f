"""Reader for the journals of the last runs of doit that `run_journal` writes."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass

from .run_journal import MAX_BYTES, RUNS
from .task_record import Record, finite


@dataclass(frozen=True)
class Entry:
    """A task that ran.

    Attributes:
        record: its record, without the `job`.
        log: the end of its log.
        size: bytes of the whole log.
    """

    record: Record
    log: str
    size: int


@dataclass(frozen=True)
class Run:
    """A run of doit.

    Attributes:
        begun: start time, in seconds since 1970.
        seconds: its duration; up to the end of the last task if doit was killed.
        asked: the words of the command line that name tasks; empty for the default tasks.
        entries: the tasks that ran, in the order in which they ended.
        up_to_date: names of the tasks that were up to date and did not run.
        is_whole: whether the journal is complete; false if doit was killed.
    """

    begun: float
    seconds: float
    asked: tuple[str, ...]
    entries: tuple[Entry, ...]
    up_to_date: tuple[str, ...]
    is_whole: bool


def last_runs() -> list[Run]:
    """Return the runs in the journal, newest first."""
    try:
        paths = [entry.path for entry in os.scandir(RUNS) if entry.name.endswith(".jsonl")]
    except OSError:
        return []
    found = [run for run in map(_read, paths) if run is not None]
    return sorted(found, key=lambda run: run.begun, reverse=True)


def _read(path: str) -> Run | None:
    """Read a run from its file, ignoring damaged lines; None if it contains no valid record."""
    begun = seconds = 0.0
    asked: dict[str, None] = {}
    entries: list[Entry] = []
    skipped: list[str] = []
    is_whole = False
    try:
        with open(path, "rb") as file:
            lines = file.read(2 * MAX_BYTES).splitlines()
    except OSError:
        return None
    for text in lines:
        with contextlib.suppress(
            AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError, MemoryError
        ):
            line = json.loads(text)
            asked.update((str(word), None) for word in line.get("asked", ()))
            if "begun" in line:
                begun = finite(line["begun"])
            elif "up_to_date" in line:
                skipped += map(str, line["up_to_date"])
                seconds = finite(line["seconds"])
                is_whole = True
            elif record := Record.of_document(line["record"]):
                log = line.get("log") or {"end": "", "size": 0}
                entries.append(Entry(record, str(log["end"]), int(log["size"])))
    if not entries:
        return None
    ended = max(entry.record.begun + entry.record.seconds for entry in entries)
    ran = {entry.record.task for entry in entries}
    begun = begun or min(entry.record.begun for entry in entries)
    return Run(
        begun,
        max(seconds, ended - begun),
        tuple(asked),
        tuple(entries),
        tuple(name for name in skipped if name not in ran),
        is_whole,
    )
