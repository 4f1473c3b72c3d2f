"""Run journal: tasks that ran, their results, and tasks that were up to date, for each of the last runs of doit.

Each file in `build/logs/runs` is the journal of a run in which a task ran, as JSON lines in chronological order::

    {"version": 1, "begun": 1580472000.25}
    {"record": {…}, "log": {"end": "…", "size": 51234}, "asked": ["umtprd"]}
    {"up_to_date": ["usbgx", …], "seconds": 41.5, "asked": []}

`record` is a task record (see `task_record`) without its `job`. `log` contains the end of the task's log and the size
of the whole log in bytes. `asked` lists the command line's words that name the tasks of the line. The last line is
written when doit exits; it is missing if doit was killed. Every process and thread of the run appends its own lines
under a file lock. `run_reader` reads the files.

This module is loaded with every `dodo.py`, so its rarely needed imports are inside functions.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..util.process import doit_process

if TYPE_CHECKING:
    from .task_record import Record

RUNS = "build/logs/runs"
"""Folder of the journals, relative to the folder of `dodo.py`."""

REPORT = "build/report.html"
"""Output path of `gamebear report`, relative to the folder of `dodo.py`."""

VERSION = 1
"""Format version of the journals."""

MAX_RUNS = 20
"""Maximum number of stored runs."""

MAX_BYTES = 16 << 20
"""Maximum bytes of all journals together. The newest one is retained regardless of its size."""

ENOUGH = 4 << 20
"""Bytes of a journal from which on no log excerpts are added."""

END = 16 << 10
"""Maximum bytes of a log excerpt: the end of a task's log."""

END_OF_FAILED = 64 << 10
"""Maximum bytes of a log excerpt of a task that did not succeed."""

NAMES = 10_000
"""Maximum number of up-to-date tasks that are listed by name."""

up_to_date: list[str] = []
"""Tasks whose `uptodate` check succeeded. doit may still have run them because a file changed."""


def _file_of_this_run() -> str:
    pid, started = doit_process()
    return f"{RUNS}/{started}-{pid}.jsonl"


@contextlib.contextmanager
def recording_failures(note: Callable[[str, str], object]) -> Iterator[None]:
    """Report the failure or interruption of a task that the block runs.

    Args:
        note: called with the record's state and the error message if the block raises an exception, or if the process
            exits during the block.
    """
    from ..errors import GamebearError, ImageError

    _underway[id(note)] = note
    try:
        yield
    except (GamebearError, OSError) as error:
        text = failure(error.message, error.hint) if isinstance(error, GamebearError) else str(error)
        note("failed" if isinstance(error, ImageError) else "error", text)
        raise
    except BaseException:  # Ctrl-C, or a bug
        note("interrupted", "")
        raise
    finally:
        del _underway[id(note)]


def failure(message: str, hint: str) -> str:
    """Return the text of a failure for a record: cause and fix, a line each."""
    return f"{message}\n→ {hint}" if hint else message


_underway: dict[int, Callable[[str, str], object]] = {}


def keep(record: Record, log: Path | None) -> None:
    """Write a task's record next to its log, and append it to the journal of the current run; best effort.

    Args:
        record: the task's record.
        log: path of the task's log; None without a log.
    """
    from .task_log import record_of

    own = record_of(record.task)
    with contextlib.suppress(OSError):  # best effort: nothing depends on the record
        own.parent.mkdir(parents=True, exist_ok=True)
        record.write(own)
    document = record.document()
    del document["job"]
    with contextlib.suppress(OSError):
        os.makedirs(RUNS, exist_ok=True)
        _add(_file_of_this_run(), {"record": document, "asked": _requested([record.task])}, log)


def last(task: str) -> Record | None:
    """Return the record of a task's last run; None without one."""
    from .task_log import record_of
    from .task_record import Record

    record = Record.read(record_of(task))
    return record if record is not None and record.task == task else None  # older releases had file name collisions


def _add(path: str, line: dict[str, Any], log: Path | None = None) -> None:
    """Append a line to a journal, with a log excerpt if the journal is small enough; raises OSError."""
    import fcntl
    import json

    from ..runner.util.atomic_files import write_all

    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        have = os.fstat(fd).st_size
        if not have:
            write_all(fd, json.dumps({"version": VERSION, "begun": _begun()}).encode() + b"\n")
            _forget_old(path)
        elif os.pread(fd, 1, have - 1) != b"\n":  # the writer of the last line was killed
            write_all(fd, b"\n")
        if log is not None and have < ENOUGH:
            line["log"] = _end_of(log, END if line["record"]["state"] == "done" else END_OF_FAILED)
        write_all(fd, json.dumps(line).encode() + b"\n")
        fcntl.flock(fd, fcntl.LOCK_UN)  # close() does not unlock if another thread has forked in the meantime
    finally:
        os.close(fd)


def _begun() -> float:
    """Return the start time of doit, in seconds since 1970."""
    import time

    from .task_record import since_start

    return round(time.time() - (since_start() or 0.0), 3)


def _end_of(log: Path, most: int) -> dict[str, Any]:
    """Return the end of a log and the size of the whole log in bytes.

    Args:
        log: path of the log.
        most: maximum bytes of the end, which starts at a line's beginning if possible.
    """
    with contextlib.suppress(OSError), log.open("rb") as file:
        whole = file.seek(0, os.SEEK_END)
        file.seek(max(0, whole - most))
        data = file.read(most)
        if whole > most:
            data = data.partition(b"\n")[2] or data
        return {"end": data.decode("utf-8", "replace"), "size": whole}
    return {"end": "", "size": 0}


def _forget_old(newest: str) -> None:
    """Remove the oldest journals that exceed the limits `MAX_RUNS` and `MAX_BYTES`."""
    kept = [os.stat(newest)]
    others = []
    for entry in os.scandir(RUNS):
        if entry.name.endswith(".jsonl") and entry.path != newest:
            with contextlib.suppress(FileNotFoundError):  # race: another doit removes it at the same time
                others.append((entry.stat(), entry.path))
    for about, path in sorted(others, key=lambda other: other[0].st_mtime_ns, reverse=True):
        if len(kept) < MAX_RUNS and sum(each.st_size for each in kept) + about.st_size <= MAX_BYTES:
            kept.append(about)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _requested(tasks: Iterable[str]) -> list[str]:
    """Return the words of doit's command line that name one of the tasks, or its group."""
    words = sys.argv[1:]
    if not words:
        return []
    names = {name for task in tasks for name in (task, task.partition(":")[0])}
    return [word for word in words if word in names]


def _at_end() -> None:
    """At exit, record the tasks that threads still run as interrupted, and complete the run's journal.

    A journal that does not exist is not created: no task ran.
    """
    for note in list(_underway.values()):
        note("interrupted", "")
    path = _file_of_this_run()
    if not os.path.exists(path):
        return
    from .task_record import since_start

    names = up_to_date[:NAMES]
    with contextlib.suppress(OSError):
        _add(path, {"up_to_date": names, "seconds": round(since_start() or 0.0, 3), "asked": _requested(up_to_date)})


atexit.register(_at_end)
