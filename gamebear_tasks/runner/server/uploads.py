"""What clients send: blobs, small ones whole, large ones from where they broke off; each checked against its name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import select
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..protocol.wire import NOT_OURS, Reply
from ..store.store import Lock, Store, size_of
from ..util.atomic_files import CHUNK, is_sha256, write_all
from ..util.errors import RunnerError

SILENCE = 300.0
"""Seconds for which a client may be silent in the middle of a request."""

AHEAD = 64 << 10
"""Bytes that are read at once where there are many small files."""

TAKE_OVER = 20.0
"""Seconds for which a file that another session is receiving is waited for; below what a client waits for an answer."""


class Body:
    """What is left of a request's body."""

    def __init__(self, size: int) -> None:
        self.left = size
        self._ahead = memoryview(b"")
        """What is read of that already."""

    def read(self, size: int, is_wanted: Callable[[], bool] | None = None) -> bytes:
        """Return some of it; end the session where the client is silent, at once if somebody wants its place."""
        if not self.left:
            return b""
        if not self._ahead:
            data = self._receive(min(max(size, AHEAD), self.left), is_wanted)
            if len(data) <= size:
                self.left -= len(data)
                return data
            self._ahead = memoryview(data)
        data = bytes(self._ahead[:size])
        self._ahead = self._ahead[size:]
        self.left -= len(data)
        return data

    def _receive(self, size: int, is_wanted: Callable[[], bool] | None) -> bytes:
        until = time.monotonic() + SILENCE
        while not select.select([0], [], [], 1.0)[0]:
            if time.monotonic() > until or (is_wanted is not None and is_wanted()):
                raise SystemExit(0)
        data = os.read(0, size)
        if not data:
            raise SystemExit(0)  # the client is gone in the middle of a request
        return data

    def read_all(self, size: int) -> bytes:
        """Return the next `size` bytes of it; raises RunnerError where there are fewer."""
        if size > self.left:
            raise RunnerError("A request's body is shorter than it says.", NOT_OURS)
        parts = []
        while size:
            parts.append(self.read(size))
            size -= len(parts[-1])
        return b"".join(parts)

    def skip(self) -> None:
        """Read it to its end."""
        while self.read(CHUNK):
            pass


def _has(store: Store, sha256: str) -> bool:
    return store.blob(sha256).is_file()


def _part(store: Store, sha256: str) -> Path:
    if not is_sha256(sha256):
        raise ValueError(f"{sha256!r} is not a SHA-256")
    return store.tmp / f"{sha256}.part"


def size_so_far(store: Store, sha256: str) -> int:
    """Return the bytes that are here of a blob that is not whole yet."""
    return size_of(_part(store, sha256))


def have(store: Store, sha256: str) -> Reply:
    """Say how many bytes of a blob are here."""
    blob = store.blob(sha256)
    return {"have": blob.stat().st_size if blob.is_file() else size_so_far(store, sha256)}


def take_blob(store: Store, body: Body, sha256: str, size: int) -> None:
    """Take a whole small blob from the body."""
    data = body.read_all(size)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise RunnerError(f"A file arrived damaged: its content is not {sha256}.", "Run doit again.")
    blob = store.blob(sha256)
    part = _part(store, sha256)
    while not use(blob):
        with Lock(part) as lock:
            if not lock.is_current():
                continue  # another session has made the blob of it
            try:
                write_all(lock.fd, data)
                os.ftruncate(lock.fd, size)  # a broken-off upload may have left more
                os.replace(part, blob)
            except BaseException:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise
        return


def put(store: Store, body: Body, blobs: list[list[Any]] | None = None, **one: Any) -> Reply:
    """Take blobs: several small ones whole, or one from an offset on.

    Args:
        store: where they go.
        body: their content.
        blobs: SHA-256 and size of each, when they are whole.
        one: `sha256`, `size` (the whole's) and `offset` of one that may have been begun before.
    """
    if blobs is not None:
        for sha256, size in blobs:
            take_blob(store, body, sha256, size)
        return {}
    sha256, size, offset = str(one["sha256"]), int(one["size"]), int(one["offset"])
    part = _part(store, sha256)
    if not is_sha256(sha256) or offset < 0 or size < offset:
        raise RunnerError("The request to store a file makes no sense.", NOT_OURS)
    lock = _take_over(store, part, sha256)
    if lock is None:
        return {"have": size}
    wanted = _wanted(part)
    with contextlib.suppress(FileNotFoundError):
        wanted.unlink()
    try:
        have = os.fstat(lock.fd).st_size
        if have < offset:
            return {"have": have}
        os.ftruncate(lock.fd, offset)
        os.lseek(lock.fd, 0, os.SEEK_SET)
        digest = hashlib.sha256()
        while chunk := os.read(lock.fd, CHUNK):
            digest.update(chunk)
        if shutil.disk_usage(store.tmp).free < size - offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        while chunk := body.read(CHUNK, wanted.exists):
            write_all(lock.fd, chunk)
            digest.update(chunk)
        if os.fstat(lock.fd).st_size != size:
            return {"have": os.fstat(lock.fd).st_size}
        if digest.hexdigest() != sha256:
            part.unlink()
            return {"have": 0, "damaged": True}
        os.replace(part, store.blob(sha256))
    finally:
        lock.release()
    return {"have": size}


def _take_over(store: Store, part: Path, sha256: str) -> Lock | None:
    """Return the lock on the part of a blob, None where the blob is here already.

    Another session may have it: one whose client is sending the same, or has reconnected and is now our own; the
    latter, which hears nothing any more, leaves when it sees that somebody wants the part.
    """
    until = time.monotonic() + TAKE_OVER
    while not _has(store, sha256):
        lock = Lock(part)
        with contextlib.suppress(FileNotFoundError):
            if lock.acquire() and os.path.samestat(os.fstat(lock.fd), part.stat()):
                if not _has(store, sha256):
                    return lock
                part.unlink()
        lock.release()
        if time.monotonic() > until:
            raise SystemExit(0)  # the client asks how much there is now, and comes again
        _wanted(part).touch()
        time.sleep(0.1)
    with contextlib.suppress(FileNotFoundError):
        _wanted(part).unlink()
    return None


def use(blob: Path) -> bool:
    """Say whether a blob is here; if so it counts as used now."""
    try:
        os.utime(blob)
    except FileNotFoundError:
        return False
    return True


def _wanted(part: Path) -> Path:
    """Return the file that tells whoever receives a part that another session wants to."""
    return part.with_suffix(".wanted")
