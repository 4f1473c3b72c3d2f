"""Child processes that end with the process that started them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path


def ended_with_us(command: Sequence[str | Path], path: str | None = None) -> list[str | Path]:
    """Wrap a command so that its process receives SIGTERM when the thread that started it dies.

    That thread must wait for the process. A thread dies with its own process, even if that is killed. util-linux's
    setpriv sets the signal (PR_SET_PDEATHSIG, prctl(2)), because a process with threads must not run Python between
    fork and exec. Fallback without this setpriv: the program ends when it notices that its pipes are closed.

    Args:
        command: the words of the command.
        path: search path for programs; by default, this process's `PATH`.
    """
    prefix = _prefix()
    if not prefix or shutil.which(command[0], path=path) is None:  # the caller gets FileNotFoundError on the start
        return list(command)
    return [*prefix, *command]


@cache
def _prefix() -> tuple[str, ...]:
    prefix = ("setpriv", "--pdeathsig", "TERM", "--")
    if sys.platform != "linux":
        return ()
    try:
        done = subprocess.run([*prefix, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError:
        return ()
    return () if done.returncode else prefix  # BusyBox's setpriv lacks the option
