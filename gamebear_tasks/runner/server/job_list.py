"""Which jobs a store has: what runs first, then the newest, a page at a time; thousands cost a look at each one's date.

Nothing is taken for used because it was listed, and no lock is held but for a moment, by what says that it runs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ..store.slots import line
from ..store.store import COMPANY, FINAL, State, Store, StoredJob, size_of, stamp
from ..util.atomic_files import is_sha256, read_json

PAGE = 500
"""The most jobs in one answer."""

SHORTEST = 8
"""The fewest digits of a digest that a person is shown."""

NAMES = 8
"""The most outputs of a job that are named."""

CLIENTS = 20
"""The most who are said to wait for a job."""


def listing(store: Store, skip: int, limit: int, prefix: str) -> dict[str, Any]:
    """Return a page of the store's jobs.

    Args:
        store: which.
        skip: how many to leave out at the beginning.
        limit: how many to give at the most.
        prefix: what the digests begin with.

    Returns:
        `jobs`, and `total`: how many there are. Each job has `digest`; `digits`, how many of these no other has;
        `state` and `attempt`; `place` in the line, counted from 1, where it is queued and that is known; `age`, seconds
        since it came to this state; `took`, seconds from its begin to its end; `used`, seconds since somebody asked for
        it; `kept`, whether it failed and its containers are kept; `size` in bytes of its outputs; `log`, bytes of it;
        `by`, who had it built; `waiting`, who waits for it now; `arch`, `program`, `outputs` (names) and `more` (how
        many are not named), as far as that can be read.
    """
    digests = sorted(entry.name for entry in os.scandir(store.jobs) if is_sha256(entry.name))
    digits = _digits(digests)
    current = _current(store)
    dates = {
        digest: date
        for digest in digests
        if digest.startswith(prefix) and (date := stamp(store.jobs / digest / "state.json"))
    }
    order = sorted(dates, key=lambda digest: (digest not in current, -dates[digest], digest))
    queue = line(store)
    chosen = order[skip : skip + max(0, min(limit, PAGE))]
    jobs = [_described(store.job(digest), current.get(digest), queue) for digest in chosen]
    return {"total": len(order), "jobs": [{**job, "digits": digits[job["digest"]]} for job in jobs]}


def _digits(digests: list[str]) -> dict[str, int]:
    """Return how many digits of each of some sorted digests tell it from all the others."""
    digits = dict.fromkeys(digests, SHORTEST)
    for one, other in zip(digests, digests[1:]):
        shared = next(n for n, (a, b) in enumerate(zip(one, other), 1) if a != b)
        digits[one] = max(digits[one], shared)
        digits[other] = max(digits[other], shared)
    return digits


def _current(store: Store) -> dict[str, State]:
    """Return the states of the jobs that wait or run; each has its mark."""
    found = {}
    for entry in os.scandir(store.live):
        if is_sha256(entry.name):
            state = store.job(entry.name).state()
            if state["state"] in ("queued", "running"):
                found[entry.name] = state
    return found


def _described(stored: StoredJob, state: State | None, queue: list[str]) -> dict[str, Any]:
    now = time.time()
    state = state or stored.state()
    name = "lost" if state["state"] == "absent" else state["state"]  # what is damaged is built again, too
    attempt = str(state.get("attempt", ""))
    since = _number(state.get("since")) or stamp(stored.folder / "state.json")
    begun = stamp(stored.folder / "order.json")
    outputs = _mapping(state.get("outputs"))
    described = {
        "digest": stored.digest,
        "state": name,
        "attempt": attempt,
        "age": max(0.0, now - since),
        "used": max(0.0, now - stored.last_use()),
        "kept": name == "failed" and stored.kept.exists(),
        "size": sum(about["size"] for about in outputs.values()),
        "log": size_of(stored.log),
        "by": stored.begun_by(),
        "waiting": [] if name in FINAL else stored.other_clients("", COMPANY)[:CLIENTS],
        **_what(stored.folder / "job.json"),
    }
    if name in FINAL and 0 < begun <= since:
        described["took"] = since - begun
    if name == "queued" and attempt in queue:
        described["place"] = queue.index(attempt) + 1
    return described


def _what(path: Path) -> dict[str, Any]:
    """Return what a job is, as far as its description can be read."""
    document = _mapping(read_json(path))
    program = _mapping(document.get("script") or document.get("function")).get("name")
    outputs = document.get("outputs")
    names = [name[:200] for name in outputs if isinstance(name, str)] if isinstance(outputs, list) else []
    return {
        "arch": str(document.get("arch") or "")[:20],
        "program": str(program or "")[:200],
        "outputs": names[:NAMES],
        "more": len(names[NAMES:]),
    }


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
