"""Programs of this machine end with the process that started them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path


def ended_with_us(command: Sequence[str | Path], path: str | None = None) -> list[str | Path]:
    """Return a program's command, so that the program gets SIGTERM when the thread that started it dies.

    That thread has to wait for the program. It dies with its process, however that ends. util-linux's setpriv sets the
    signal (PR_SET_PDEATHSIG, prctl(2)), because a process with threads may run no Python between fork and exec. Where
    there is no such setpriv, a program ends when it finds its pipes closed.

    Args:
        command: its words.
        path: where programs are looked for; our own `PATH` by default.
    """
    prefix = _prefix()
    if not prefix or shutil.which(command[0], path=path) is None:  # who starts it says that it is missing
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
    return () if done.returncode else prefix  # BusyBox has another setpriv
