"""Outputs of a job: send them to the client, and discard a result whose outputs are corrupted."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ..protocol import requests, wire
from ..store.store import Store
from ..util.atomic_files import CHUNK, data_extents
from ..util.errors import RunnerError
from .channel import write

if TYPE_CHECKING:
    from ..protocol.replies import DiscardReply, FetchReply, Reply
    from .channel import Answer

USE_INTERVAL = 10.0
"""Seconds between updates of a job's last-use timestamp while an output is being fetched."""

HOLE = 64 << 10
"""Bytes of the smallest hole of a sparse output that is skipped; smaller holes are sent as zeros."""

HOLES = 10_000
"""Maximum number of holes in one reply; the rest of the file is sent in full."""


def fetch(store: Store, request: requests.Fetch) -> Answer:
    """Send an output from an offset to its end. A prune does not remove the job meanwhile.

    Raises:
        RunnerError: the output is not in the store.
    """
    stored = store.job(request.digest)
    offset = request.offset
    path = stored.outputs(request.attempt) / request.name
    with contextlib.ExitStack() as stack:
        stack.enter_context(stored.held_outputs(request.attempt))
        if not path.is_file():
            raise RunnerError(
                f"Output {request.name!r} of job {request.digest[:12]} is no longer on the builder.",
                "Run doit again.",
            )
        size = path.stat().st_size
        holes = _holes(path, offset, size)
        stored.touch()
        held = stack.pop_all()

    def send(reply: Reply) -> None:
        with held:
            _write_file(reply, path, _between(holes, offset, size), stored.touch)
            stored.touch()

    reply: FetchReply = {"size": size}
    if holes:
        reply["holes"] = holes
    return reply, send


def discard(store: Store, request: requests.Discard) -> DiscardReply:
    """Verify a result's outputs, and invalidate the result if they are corrupted."""
    stored = store.job(request.digest)
    attempt = request.attempt
    try:
        lock = stored.lock()
    except FileNotFoundError:  # the job does not exist, or has just been pruned
        return {"discarded": False}
    try:
        if not lock.acquire():
            return {"discarded": False}
        state = stored.written_state()
        if state.get("attempt") != attempt or state["state"] != "done" or stored.output_is_sound(state):
            return {"discarded": False}
        stored.write_state({"state": "lost", "attempt": attempt})
        shutil.rmtree(stored.outputs(attempt), ignore_errors=True)
        return {"discarded": True}
    finally:
        lock.release()


def _pass_on(fd: int, most: int) -> int:
    """Send the next bytes of a file to the client with sendfile(2); return the number of bytes sent."""
    return os.sendfile(1, fd, None, most)


def _holes(path: Path, start: int, end: int) -> list[tuple[int, int]]:
    """Return offset and length of the holes of a file between two offsets that are large enough to skip."""
    holes: list[tuple[int, int]] = []
    with path.open("rb", buffering=0) as file:
        done = start
        for first, last in chain(data_extents(file.fileno(), start, end), [(end, end)]):
            if first - done >= HOLE:
                holes.append((done, first - done))
            if len(holes) == HOLES:
                break
            done = last
    return holes


def _between(holes: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Return start and end of each part of a file between two offsets that is not in a hole."""
    parts = []
    for offset, length in (*holes, (max(start, end), 0)):
        if offset > start:
            parts.append((start, offset))
        start = offset + length
    return parts


def _write_file(reply: Reply, path: Path, parts: list[tuple[int, int]], note_use: Callable[[], None]) -> None:
    """Send a reply whose body is parts of a file.

    Args:
        reply: header of the reply.
        path: the file.
        parts: start and end of each part, in bytes.
        note_use: called every `USE_INTERVAL` seconds.

    Raises:
        OSError: the file cannot be read, or the client has gone.
        SystemExit: the file has become shorter.
    """
    write(wire.encode(reply, sum(end - start for start, end in parts)))
    recorded = time.monotonic()
    with path.open("rb", buffering=0) as file:
        for start, end in parts:
            file.seek(start)
            while start < end:
                if time.monotonic() > recorded + USE_INTERVAL:
                    note_use()
                    recorded = time.monotonic()
                sent = _pass_on(file.fileno(), min(end - start, CHUNK))
                if not sent:
                    raise SystemExit(1)  # the file was truncated: end the stream rather than send wrong bytes
                start += sent
