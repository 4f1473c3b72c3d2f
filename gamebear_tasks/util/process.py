"""Which process is doit's own, whichever of its children asks; whom its files are for. Loaded with every `dodo.py`."""

from __future__ import annotations

import os
import signal
import sys

UMASK = os.umask(0o077)
os.umask(UMASK)
"""The permissions that files which we make are not to have, see umask(2); asked for before there are threads."""

FILE_MODE = 0o666 & ~UMASK
"""The permissions of a file of ours that is no program."""


def doit_process() -> tuple[int, int]:
    """Return the number of doit's own process, and when it was started: clock ticks since boot, 0 if not known."""
    multiprocessing = sys.modules.get("multiprocessing.process")  # of `doit -n`
    parent = multiprocessing.parent_process() if multiprocessing else None
    pid = parent.pid if parent else os.getpid()
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return pid, int(file.read().rpartition(b")")[2].split()[19])  # proc_pid_stat(5): starttime
    except (OSError, ValueError, IndexError):
        return pid, 0


def check_not_interrupted(status: int) -> None:
    """Raise KeyboardInterrupt where Ctrl-C has ended a program of ours, which may hear of it before doit does.

    Args:
        status: how the program ended, as `subprocess` has it.
    """
    if status == -signal.SIGINT:
        raise KeyboardInterrupt
