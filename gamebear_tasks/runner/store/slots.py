"""Slots: how many jobs run at once on a builder, and who is next."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from ..util.atomic_files import locked
from . import builder_config
from .store import Lock, Store

SLOTS_VARIABLE = "GAMEBEAR_SLOTS"
"""The environment variable by which what starts a runner says how many jobs run at once."""


def wait_for_one(store: Store, name: str, check_stop: Callable[[], None], say: Callable[[str], None]) -> Lock:
    """Return one of the builder's slots, held; wait for it, first come first served.

    Args:
        store: whose slots.
        name: tells this waiter from the others.
        check_stop: called while waiting; what it raises ends the wait.
        say: tells a person that there is something to wait for.
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
            say("waiting for a free slot on the builder")
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
    """Return the names of those who wait for a slot, first who is next."""
    return [path.name.split("-", 2)[2] for path in _those_who_wait(store.slots)]


def _those_who_wait(folder: Path) -> list[Path]:
    """Return the tickets of those who wait, first who is next; those of the dead are removed."""
    return [ticket for ticket in sorted(folder.glob("wait-*")) if not _is_dead(ticket)]


def _ticket(folder: Path, name: str, waiting: list[Path]) -> Lock:
    """Return a place at the end of the line, held for as long as we live; its file is there only once it is held.

    The line is counted and not timed: clocks are put back, and those of small machines begin anywhere.
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
    """Return how many jobs run at once: `slots` in `builder.json`, else one for four processors and a GiB of memory.

    That is: what there is enough of for each of them, and at least one. A compiler takes a few hundred MiB.
    A Dask worker says it in the environment instead, by its resources.
    """
    said = os.environ.get(SLOTS_VARIABLE, "")
    if re.fullmatch("[1-9][0-9]{0,5}", said):
        return int(said)
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
    """Say whether nobody who still lives came before."""
    for other in sorted(folder.glob("wait-*")):
        if other.name >= ticket.path.name:
            return True
        if not _is_dead(other):
            return False
    return True


def _is_dead(ticket: Path) -> bool:
    """Say whether nobody holds a ticket any more; if so it is removed."""
    if not ticket.exists():
        return True
    with Lock.opened(ticket) as lock:
        if not lock.is_free():
            return False
        ticket.unlink(missing_ok=True)
    return True
