"""How long a task is going to take, as far as earlier runs tell: as long as it took the last time that it was built."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from ..records import run_journal
from ..records.task_record import Record


def seconds(task: str, builder: str, last: Record | None) -> float | None:
    """Return how many seconds a task took on a builder the last time that it was built there; None where none is known.

    Args:
        task: its name.
        builder: the builder's URL, as it may be shown.
        last: how the task went the last time.
    """
    if last is None:
        return None
    if last.builder == builder and _tells(last):
        return last.seconds
    return _earlier().get((task, builder))


def _tells(record: Record) -> bool:
    return record.state == "done" and record.had in ("built", "baked")


@cache
def _earlier() -> dict[tuple[str, str], float]:
    """Return the seconds of each task and builder in the runs that are kept: of the last time that says something."""
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
            continue  # whoever wrote it was killed
        if record is not None and _tells(record):
            found[record.task, record.builder] = record.seconds
    return found
