"""The last runs of doit that did anything: what ran, how it went, what was up to date; lines of JSON, a file each.

Each file of `build/logs/runs` is a run, whose lines are, in the order in which they came to be::

    {"version": 1, "begun": 1580472000.25}
    {"record": {…}, "log": {"end": "…", "size": 51234}, "asked": ["umtprd"]}
    {"up_to_date": ["usbgx", …], "seconds": 41.5, "asked": []}

A record is a task's (see `task_record`) without its `job`. `log` has the end of its log and the bytes of the whole;
`asked` has what of the command line names the tasks of the line. The last line is written when doit ends, and is
missing where it was killed. Whatever ran, in whichever process or thread of the run, adds its own line. `run_reader`
reads them.

This module is loaded with every `dodo.py`: what it needs for more than a list of names is imported where it is needed.
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
"""Where the runs are kept, below the folder of `dodo.py`."""

REPORT = "build/report.html"
"""Where `doit report` writes its page, below the folder of `dodo.py`."""

VERSION = 1
"""Of the files."""

KEPT = 20
"""How many runs are kept."""

MOST = 16 << 20
"""How many bytes they take together; the last one is kept all the same."""

ENOUGH = 4 << 20
"""Bytes of a run after which no more ends of logs are put into it."""

END = 16 << 10
"""Bytes of a log's end that are kept."""

END_OF_FAILED = 64 << 10
"""Bytes of the log's end where the task failed."""

NAMES = 10_000
"""How many tasks that were up to date are named."""

up_to_date: list[str] = []
"""The tasks whose `uptodate` found them so; doit may have run them all the same, because of a file."""


def _file_of_this_run() -> str:
    pid, started = doit_process()
    return f"{RUNS}/{started}-{pid}.jsonl"


@contextlib.contextmanager
def noted(note: Callable[[str, str], object]) -> Iterator[None]:
    """While the block runs a task does: where it does not end well, tell `note` how (a record's state) and why."""
    from ..errors import GamebearError, ImageError

    _underway[id(note)] = note
    try:
        yield
    except (GamebearError, OSError) as error:
        note("failed" if isinstance(error, ImageError) else "error", str(error).partition("\n")[0])
        raise
    except BaseException:  # Ctrl-C, or a fault of ours
        note("interrupted", "")
        raise
    finally:
        del _underway[id(note)]


_underway: dict[int, Callable[[str, str], object]] = {}


def keep(record: Record, log: Path | None) -> None:
    """Write a task's record beside its log, and into the run that this process belongs to.

    Args:
        record: how it went.
        log: its log; None where nothing of it is in one.
    """
    from .task_log import record_of

    own = record_of(record.task)
    with contextlib.suppress(OSError):  # nothing depends on it
        own.parent.mkdir(parents=True, exist_ok=True)
        record.write(own)
    document = record.document()
    del document["job"]
    with contextlib.suppress(OSError):
        os.makedirs(RUNS, exist_ok=True)
        _add(_file_of_this_run(), {"record": document, "asked": _asked([record.task])}, log)


def last(task: str) -> Record | None:
    """Return the record of a task's last run; None where there is none."""
    from .task_log import record_of
    from .task_record import Record

    record = Record.read(record_of(task))
    return record if record is not None and record.task == task else None  # an older release mixed up some names


def _add(path: str, line: dict[str, Any], log: Path | None = None) -> None:
    """Add a line to a run's file, with the end of a log if there is room; raises OSError."""
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
        elif os.pread(fd, 1, have - 1) != b"\n":  # whoever wrote it was killed
            write_all(fd, b"\n")
        if log is not None and have < ENOUGH:
            line["log"] = _end_of(log, END if line["record"]["state"] == "done" else END_OF_FAILED)
        write_all(fd, json.dumps(line).encode() + b"\n")
        fcntl.flock(fd, fcntl.LOCK_UN)  # close() alone would not, if another thread has forked meanwhile
    finally:
        os.close(fd)


def _begun() -> float:
    """Return when doit was started, in seconds since 1970."""
    import time

    from .task_record import since_start

    return round(time.time() - (since_start() or 0.0), 3)


def _end_of(log: Path, most: int) -> dict[str, Any]:
    """Return the end of a log, from the beginning of a line if there is one, and the size of the whole."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        whole = file.seek(0, os.SEEK_END)
        file.seek(max(0, whole - most))
        data = file.read(most)
        if whole > most:
            data = data.partition(b"\n")[2] or data
        return {"end": data.decode("utf-8", "replace"), "size": whole}
    return {"end": "", "size": 0}


def _forget_old(newest: str) -> None:
    """Remove the oldest runs, until as many are left as are kept."""
    kept = [os.stat(newest)]
    others = []
    for entry in os.scandir(RUNS):
        if entry.name.endswith(".jsonl") and entry.path != newest:
            with contextlib.suppress(FileNotFoundError):  # another doit forgets it at this moment
                others.append((entry.stat(), entry.path))
    for about, path in sorted(others, key=lambda other: other[0].st_mtime_ns, reverse=True):
        if len(kept) < KEPT and sum(each.st_size for each in kept) + about.st_size <= MOST:
            kept.append(about)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _asked(tasks: Iterable[str]) -> list[str]:
    """Return the words of the command line that name some tasks, or their groups."""
    words = sys.argv[1:]
    if not words:
        return []
    names = {name for task in tasks for name in (task, task.partition(":")[0])}
    return [word for word in words if word in names]


def _at_end() -> None:
    """Note what is still under way in threads, which end with the process; in a run with records, what was skipped."""
    for note in list(_underway.values()):
        note("interrupted", "")
    path = _file_of_this_run()
    if not os.path.exists(path):
        return
    from .task_record import since_start

    names = up_to_date[:NAMES]
    with contextlib.suppress(OSError):
        _add(path, {"up_to_date": names, "seconds": round(since_start() or 0.0, 3), "asked": _asked(up_to_date)})


atexit.register(_at_end)
