"""Process information: doit's main process, and the umask. Loaded with every `dodo.py`."""

from __future__ import annotations

import os
import sys


def file_mode(executable: bool = False) -> int:
    """Return the permissions of a new file: 666, or 777 for a program, without the bits of the umask (umask(2)).

    The umask is read from /proc, because setting it would affect other threads. Without /proc, only the owner gets
    permissions.
    """
    try:
        with open("/proc/self/status", "rb") as file:  # proc_pid_status(5); Umask since Linux 4.7
            umask = next(int(line[6:], 8) for line in file if line.startswith(b"Umask:"))
    except (OSError, StopIteration):
        umask = 0o077
    return (0o777 if executable else 0o666) & ~umask


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
