"""Duration estimates of tasks: the duration of the last successful build on the same builder."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from ..records import run_journal
from ..records.task_record import Record


def seconds(task: str, builder: str, last: Record | None) -> float | None:
    """Return the seconds that a task's last successful build on a builder took; None if unknown.

    Args:
        task: the task's name.
        builder: the builder's URL without credentials.
        last: the record of the task's last run; None without one.
    """
    if last is None:
        return None
    if last.builder == builder and _has_phases(last):
        return last.seconds
    return _earlier().get((task, builder))


def _has_phases(record: Record) -> bool:
    return record.state == "done" and record.origin in ("built", "baked")


@cache
def _earlier() -> dict[tuple[str, str], float]:
    """Return the seconds of the last successful build in the run journal, by task and builder."""
    found: dict[tuple[str, str], float] = {}
    try:
        runs = sorted(Path(run_journal.RUNS).glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        lines = [line for run in runs for line in run.read_bytes().splitlines() if line.startswith(b'{"record"')]
    except OSError:
        return found
    for line in lines:
        try:
            record = Record.of_document(json.loads(line)["record"])
        except (KeyError, TypeError, ValueError, RecursionError, MemoryError):
            continue  # incomplete line of a killed process
        if record is not None and _has_phases(record):
            found[record.task, record.builder] = record.seconds
    return found
