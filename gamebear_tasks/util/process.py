"""Process information: doit's main process, and the umask. Loaded with every `dodo.py`."""

from __future__ import annotations

import os
import sys

UMASK = os.umask(0o077)
os.umask(UMASK)
"""File mode creation mask, see umask(2). It is read at import, before there are threads, because reading changes it."""

FILE_MODE = 0o666 & ~UMASK
"""Mode of created files that are not executable."""


def doit_process() -> tuple[int, int]:
    """Return the pid and start time of doit's main process, also when called in a worker process of `doit -n`.

    The start time is in clock ticks since boot; 0 if unknown.
    """
    multiprocessing = sys.modules.get("multiprocessing.process")  # loaded by `doit -n`
    parent = multiprocessing.parent_process() if multiprocessing else None
    pid = parent.pid if parent else os.getpid()
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return pid, int(file.read().rpartition(b")")[2].split()[19])  # proc_pid_stat(5): starttime
    except (OSError, ValueError, IndexError):
        return pid, 0
