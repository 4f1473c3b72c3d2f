"""Descendants of a process, and ending a program together with its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping


def end(process: subprocess.Popen[bytes], grace: float = 0.0) -> None:
    """Kill a program with its descendants, and close its pipes. A program that has exited leaves its descendants alone.

    Descendants in other sessions and process groups are killed too, except daemons whose parent has exited. Without
    proc(5), only the program itself is killed.

    Args:
        process: the program.
        grace: seconds between SIGTERM, which all of them receive at once, and SIGKILL; 0 for SIGKILL only. An exception
            such as KeyboardInterrupt ends this wait early.
    """
    family: dict[int, int] = {}
    try:
        if grace and process.poll() is None:
            family = descendants(process.pid)
            _signal(process, family, signal.SIGTERM)
            deadline = time.monotonic() + grace
            while time.monotonic() < deadline and (process.poll() is None or any(map(_lives, family.items()))):
                time.sleep(0.02)
    finally:
        alive = [pid for pid, _ in filter(_lives, family.items())]
        for pid in [process.pid, *alive] if process.poll() is None else alive:
            family.update(descendants(pid))  # started meanwhile
        _signal(process, family, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()
        process.wait()


def descendants(ancestor: int) -> dict[int, int]:
    """Return the living descendants of a process, the nearest ones first, without zombies.

    Returns:
        The start time of each by its id, in clock ticks since boot: an id is reused after the end of its process.
    """
    children: dict[int, list[int]] = {}
    started: dict[int, int] = {}
    with contextlib.suppress(FileNotFoundError):  # no proc(5)
        for entry in os.scandir("/proc"):
            if entry.name.isdigit() and (status := _status(int(entry.name))):
                started[int(entry.name)] = status[1]
                children.setdefault(status[0], []).append(int(entry.name))
    found: dict[int, int] = {}
    waiting = [ancestor]
    while waiting:
        for pid in children.pop(waiting.pop(0), ()):
            found[pid] = started[pid]
            waiting.append(pid)
    return found


def _signal(process: subprocess.Popen[bytes], family: Mapping[int, int], number: int) -> None:
    process.send_signal(number)
    for pid, _ in filter(_lives, family.items()):
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def _lives(member: tuple[int, int]) -> bool:
    pid, started = member
    status = _status(pid)
    return status is not None and status[1] == started


def _status(pid: int) -> tuple[int, int] | None:
    """Return a living process's parent and start time (proc_pid_stat(5))."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return None if fields[0] == b"Z" else (int(fields[1]), int(fields[19]))
    except (OSError, ValueError, IndexError):
        return None
