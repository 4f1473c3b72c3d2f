"""The log, the phase and the end of a job, for clients that follow it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..protocol import requests, wire
from ..store.phases import current_phase
from ..store.slots import line
from ..store.store import FINAL, State, Store, StoredJob, size_of
from ..util.atomic_files import read_json
from .channel import write
from .submission import Supervisors, submit, told
from .uploads import Body

if TYPE_CHECKING:
    from ..protocol.replies import JobReply
    from .channel import Answer

SMALL = 64 << 10
"""Maximum bytes of outputs sent inline with the final state, and maximum log size that a submit reply includes
unrequested."""

LOG_CHUNK = 256 << 10
"""Maximum bytes of log in one reply."""


def submit_and_wait(supervisors: Supervisors, request: requests.Submit, body: Body) -> Answer:
    """Accept a job, and include its end if it finishes within `wait` seconds: see `submit` and `_with_end`."""
    reply = submit(supervisors, request, body)
    stored = supervisors.store.job(request.digest)
    attempt = reply.get("attempt", "")
    if reply.get("started"):
        until = time.monotonic() + min(request.wait, 60.0)
        state = _wait(supervisors, stored, attempt, until, lambda _: False)
        if state.get("attempt") == attempt and state["state"] in FINAL:
            reply.update(told(state))
    if reply["state"] in ("queued", "running"):
        reply["now"] = _now(supervisors.store, stored, attempt)
    if reply["state"] not in FINAL or size_of(stored.log) > SMALL:
        return reply, None
    return _with_end(supervisors.store, reply, stored, attempt, 0, request.client)


def follow(supervisors: Supervisors, request: requests.Follow) -> Answer:
    """Return the log from an offset and the state; wait up to `wait` seconds for a change of either or of `now`.

    The state is read before the log, so that a final state is sent with the complete log. An observer (`client` is
    empty) does not count as waiting for the job, does not acknowledge how it ended, and receives no outputs.
    """
    stored = supervisors.store.job(request.digest)
    stored.touch_client(request.client)
    attempt, offset = request.attempt, request.offset

    def has_news(log_size: int) -> bool:
        return log_size > offset or (
            request.now is not None and _now(supervisors.store, stored, attempt) != request.now
        )

    state = _wait(supervisors, stored, attempt, time.monotonic() + min(request.wait, 60.0), has_news)
    reply = told(state)
    if state.get("attempt") != attempt:
        reply["log_size"] = 0
        return reply, None
    if state["state"] in ("queued", "running"):
        reply["now"] = _now(supervisors.store, stored, attempt)
    return _with_end(supervisors.store, reply, stored, attempt, offset, request.client)


def _now(store: Store, stored: StoredJob, attempt: str) -> list[str | int | None]:
    """Return a job's current phase and, while it waits for a slot, the number of jobs ahead of it in the queue."""
    phase = current_phase(stored.folder)
    waiting = line(store) if phase == "queue" else []
    return [phase, waiting.index(attempt) if attempt in waiting else None]


def _wait(
    supervisors: Supervisors, stored: StoredJob, attempt: str, until: float, is_enough: Callable[[int], bool]
) -> State:
    """Wait until an attempt is over, its log is long enough, or the deadline passes; return the state.

    The supervisor's end wakes the session that started it. Everything else is polled, with backoff up to 0.25
    seconds.

    Args:
        supervisors: those that this session started.
        stored: the job.
        attempt: the attempt to wait for.
        until: deadline, by the monotonic clock.
        is_enough: returns whether a log of the passed size in bytes ends the wait.
    """
    pause = 0.005
    while True:
        state = stored.state()
        over = state.get("attempt") != attempt or state["state"] not in ("queued", "running")
        if over or is_enough(size_of(stored.log)) or time.monotonic() >= until:
            return state
        if not supervisors.wait(attempt, pause):
            return state  # a client sends nothing while it waits: its end of the stream is closed
        pause = min(pause * 1.5, 0.25)


def _with_end(store: Store, reply: JobReply, stored: StoredJob, attempt: str, offset: int, client: str) -> Answer:
    """Return a reply with the log from an offset and, if the log and the job are complete, the small outputs.

    The body is `log` bytes of log, followed by the concatenated outputs; `contents` has the name and the size in
    bytes of each. The client then no longer counts as waiting for the job. An observer (`client` is empty) receives
    the log only.
    """
    size = size_of(stored.log)
    log = _part_of(stored.log, offset, min(size - offset, LOG_CHUNK)) if size > offset else b""
    reply.update({"log": len(log), "log_size": size})
    body = [log]
    if client and reply["state"] in FINAL and offset + len(log) >= size:
        stored.note_seen(attempt)
        stored.forget_client(client)
        reply["notices"] = read_json(store.notices)
        contents = _small_outputs(stored, reply)
        reply["contents"] = [(name, len(data)) for name, data in contents]
        body += [data for _, data in contents]
        stored.touch()
    return reply, lambda reply: write(b"".join([wire.encode(reply, sum(map(len, body))), *body]))


def _part_of(path: Path, offset: int, length: int) -> bytes:
    """Return part of a file, shorter at its end.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(length)


def _small_outputs(stored: StoredJob, state: JobReply) -> list[tuple[str, bytes]]:
    """Return names and contents of a finished job's smallest outputs, up to `SMALL` bytes in total."""
    found: list[tuple[str, bytes]] = []
    left = SMALL
    with stored.held_outputs(state["attempt"]), contextlib.suppress(OSError):
        for name, about in sorted((state.get("outputs") or {}).items(), key=lambda item: item[1]["size"]):
            left -= about["size"]
            if left < 0:
                break
            data = _part_of(stored.outputs(state["attempt"]) / name, 0, about["size"] + 1)
            if len(data) == about["size"]:  # otherwise the client detects the corruption when it fetches
                found.append((name, data))
    return found
