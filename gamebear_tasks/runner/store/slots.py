"""Slots: limit the number of jobs that run at once on a builder; the others queue in order of arrival."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from ..util.locks import Lock, locked
from . import builder_config
from .store import Store

SLOTS_VARIABLE = "GAMEBEAR_SLOTS"
"""Environment variable with the number of slots, set by a process that starts the runner."""


def wait_for_one(store: Store, name: str, check_stop: Callable[[], None], report: Callable[[str], None]) -> Lock:
    """Wait for one of the builder's slots, first come first served, and return its acquired lock.

    Args:
        store: store whose slots are used.
        name: unique name of this waiter.
        check_stop: called while waiting; an exception that it raises ends the wait.
        report: reports to the user that the job waits for a slot.
    """
    check_stop()
    with locked(store.slots / "line"):
        waiting = _those_who_wait(store.slots)
        slot = None if waiting else _free_slot(store.slots, slot_count())
        if slot is not None:
            return slot
        ticket = _ticket(store.slots, name, waiting)
    with ticket:
        try:
            report("waiting for a free slot on the builder")
            while slot is None:
                time.sleep(0.1)
                check_stop()
                if _is_first_in_line(store.slots, ticket):
                    slot = _free_slot(store.slots, slot_count())
            return slot
        finally:
            with contextlib.suppress(OSError):
                ticket.path.unlink()


def line(store: Store) -> list[str]:
    """Return the names in the queue for a slot, the next one first."""
    return [path.name.split("-", 2)[2] for path in _those_who_wait(store.slots)]


def _those_who_wait(folder: Path) -> list[Path]:
    """Return the tickets in the queue, the next one first; remove tickets of dead processes."""
    return [ticket for ticket in sorted(folder.glob("wait-*")) if not _is_dead(ticket)]


def _ticket(folder: Path, name: str, waiting: list[Path]) -> Lock:
    """Return an acquired ticket at the end of the queue. Its file appears under its final name only once it is locked.

    Tickets are numbered, not ordered by time: clocks are set back, and a small machine without a clock boots with any
    time. The ticket is held until it is released or this process dies.
    """
    for other in folder.glob(".wait-*"):
        _is_dead(other)
    numbers = (re.match(r"wait-([0-9]+)-", other.name) for other in waiting)
    number = max((int(match[1]) for match in numbers if match), default=0) + 1
    aside = folder / f".wait-{name}"
    ticket = Lock(aside)
    ticket.acquire()
    ticket.path = folder / f"wait-{number:020d}-{name}"
    os.rename(aside, ticket.path)
    return ticket


def slot_count() -> int:
    """Return the number of slots: `slots` in `builder.json`, else one per four processors and GiB of memory.

    There is at least one. Each slot needs both, because one compiler process takes a few hundred MiB. A Dask worker
    sets the environment variable instead, from its resources; it has precedence.
    """
    configured = os.environ.get(SLOTS_VARIABLE, "")
    if re.fullmatch("[1-9][0-9]{0,5}", configured):
        return int(configured)
    count = builder_config.read().slots
    if count is not None:
        return count
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min((os.cpu_count() or 1) // 4, memory >> 30))


def _free_slot(folder: Path, count: int) -> Lock | None:
    for number in range(count):
        lock = Lock(folder / str(number))
        if lock.acquire():
            return lock
        lock.release()
    return None


def _is_first_in_line(folder: Path, ticket: Lock) -> bool:
    """Return whether no living process is ahead in the queue."""
    for other in sorted(folder.glob("wait-*")):
        if other.name >= ticket.path.name:
            return True
        if not _is_dead(other):
            return False
    return True


def _is_dead(ticket: Path) -> bool:
    """Return whether nobody holds a ticket any more; if so, remove it."""
    if not ticket.exists():
        return True
    with Lock.opened(ticket) as lock:
        if not lock.is_free():
            return False
        ticket.unlink(missing_ok=True)
    return True
