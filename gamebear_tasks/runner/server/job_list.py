"""List the jobs of a store, in pages: running and queued ones first, then the latest.

Each page costs one stat(2) per stored job, and there may be thousands. Listing does not count as use of a job. Locks
are held only briefly, to check whether a job is running.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..store.slots import line
from ..store.store import COMPANY, FINAL, State, Store, StoredJob, size_of, stamp
from ..util.atomic_files import is_sha256, read_json

if TYPE_CHECKING:
    from ..protocol.replies import ListedJob, ListReply

PAGE = 500
"""Maximum number of jobs in one reply."""

SHORTEST = 8
"""Minimum number of digits of an abbreviated digest."""

NAMES = 8
"""Maximum number of outputs that are named per job."""

CLIENTS = 20
"""Maximum number of waiting clients that are named per job."""


def listing(store: Store, skip: int, limit: int, prefix: str) -> ListReply:
    """Return a page of the store's jobs.

    Args:
        store: store to list.
        skip: number of jobs to skip.
        limit: maximum number of jobs to return.
        prefix: prefix of the digests.

    Returns:
        `total`, the number of matching jobs, and `jobs`. Each job has `digest`; `digits`, the number of leading digits
        that make it unique; `state` and `attempt`; `place` in the queue, from 1, if it is queued and that is known;
        `age`, seconds since it entered this state; `took`, seconds from submission to end; `used`, seconds since its
        last use; `kept`, whether it failed and its containers are retained; `size` of its outputs and `log`, both in
        bytes; `by`, who submitted it; `waiting`, who waits for it now; `arch`, `program`, `outputs` (names) and `more`
        (number of outputs not named), as far as they can be read.
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
    for job in jobs:
        job["digits"] = digits[job["digest"]]
    return {"total": len(order), "jobs": jobs}


def _digits(digests: list[str]) -> dict[str, int]:
    """Return for each of some sorted digests the number of leading digits that distinguish it from all the others."""
    digits = dict.fromkeys(digests, SHORTEST)
    for one, other in zip(digests, digests[1:]):
        shared = next(n for n, (a, b) in enumerate(zip(one, other), 1) if a != b)
        digits[one] = max(digits[one], shared)
        digits[other] = max(digits[other], shared)
    return digits


def _current(store: Store) -> dict[str, State]:
    """Return the states of all queued and running jobs; each of these has a file in `live/`."""
    found = {}
    for entry in os.scandir(store.live):
        if is_sha256(entry.name):
            state = store.job(entry.name).state()
            if state["state"] in ("queued", "running"):
                found[entry.name] = state
    return found


def _described(stored: StoredJob, state: State | None, queue: list[str]) -> ListedJob:
    now = time.time()
    state = state or stored.state()
    name = "lost" if state["state"] == "absent" else state["state"]  # a damaged state, too, causes a rebuild
    attempt = str(state.get("attempt", ""))
    since = _number(state.get("since")) or stamp(stored.folder / "state.json")
    begun = stamp(stored.folder / "order.json")
    outputs = _mapping(state.get("outputs"))
    described: ListedJob = {
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


def _what(path: Path) -> ListedJob:
    """Return architecture, program and outputs of a job, as far as its description can be read."""
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
