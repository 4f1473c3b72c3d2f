"""The last runs of doit, as `run_journal` has kept them."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass

from .run_journal import MOST, RUNS
from .task_record import Record, finite


@dataclass(frozen=True)
class Entry:
    """A task that ran.

    Attributes:
        record: how it went; its `job` is not kept.
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
        begun: when, in seconds since 1970.
        seconds: how long it took; until the last task's end, where doit was killed.
        asked: the words of the command line that name tasks; empty for the default ones.
        entries: the tasks that ran, in the order in which they ended.
        up_to_date: the names of those that did not have to.
        is_whole: whether doit said that it ended.
    """

    begun: float
    seconds: float
    asked: tuple[str, ...]
    entries: tuple[Entry, ...]
    up_to_date: tuple[str, ...]
    is_whole: bool


def last_runs() -> list[Run]:
    """Return the runs that are kept, the last one first."""
    try:
        paths = [entry.path for entry in os.scandir(RUNS) if entry.name.endswith(".jsonl")]
    except OSError:
        return []
    found = [run for run in map(_read, paths) if run is not None]
    return sorted(found, key=lambda run: run.begun, reverse=True)


def _read(path: str) -> Run | None:
    """Read a run, as far as its lines are whole; None where it has no record."""
    begun = seconds = 0.0
    asked: dict[str, None] = {}
    entries: list[Entry] = []
    skipped: list[str] = []
    is_whole = False
    try:
        with open(path, "rb") as file:
            lines = file.read(2 * MOST).splitlines()
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
