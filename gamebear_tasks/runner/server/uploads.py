"""Uploads of blobs: small ones in full, large ones resumable. The SHA-256 of each is verified."""

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
from typing import TYPE_CHECKING

from ..protocol import requests
from ..protocol.requests import RequestError
from ..protocol.wire import INVALID_REQUEST
from ..store.store import Store, size_of
from ..util.atomic_files import CHUNK, write_all
from ..util.errors import RunnerError
from ..util.locks import Lock

if TYPE_CHECKING:
    from ..protocol.replies import EmptyReply, HaveReply, PutReply

SILENCE = 300.0
"""Seconds for which a client may be silent within a request."""

AHEAD = 64 << 10
"""Minimum size of a read, in bytes, to reduce system calls when there are many small files."""

TAKE_OVER = 20.0
"""Seconds to wait for a blob that another session is receiving. Shorter than the client's reply timeout."""


class Body:
    """The unread rest of a request's body.

    Args:
        size: length of the body in bytes.
    """

    def __init__(self, size: int) -> None:
        self.left = size
        self._ahead = memoryview(b"")
        """Bytes that were read ahead."""

    def read(self, size: int, is_wanted: Callable[[], bool] | None = None) -> bytes:
        """Return up to `size` bytes; empty at the end of the body.

        Args:
            size: maximum number of bytes.
            is_wanted: polled while the client is silent; returns whether another session wants to receive the same
                blob.

        Raises:
            SystemExit: the client has gone, is silent for `SILENCE` seconds, or is silent while another session waits.
        """
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
            raise SystemExit(0)  # the client disconnected within a request
        return data

    def read_all(self, size: int) -> bytes:
        """Return the next `size` bytes.

        Raises:
            RunnerError: the body is shorter.
        """
        if size > self.left:
            raise RunnerError("The body of a request is too short.", INVALID_REQUEST)
        parts = []
        while size:
            parts.append(self.read(size))
            size -= len(parts[-1])
        return b"".join(parts)

    def skip(self) -> None:
        """Read and discard the rest."""
        while self.read(CHUNK):
            pass


def _has(store: Store, sha256: str) -> bool:
    return store.blob(sha256).is_file()


def _part(store: Store, sha256: str) -> Path:
    return store.tmp / f"{sha256}.part"


def size_so_far(store: Store, sha256: str) -> int:
    """Return how many bytes of an incomplete blob are stored."""
    return size_of(_part(store, sha256))


def have(store: Store, request: requests.Have) -> HaveReply:
    """Return how many bytes of a blob are stored."""
    blob = store.blob(request.sha256)
    return {"have": blob.stat().st_size if blob.is_file() else size_so_far(store, request.sha256)}


received: set[str] = set()
"""SHA-256 of each blob that this session has received and verified since the last job (see `submission`)."""


def take_blob(store: Store, body: Body, sha256: str, size: int) -> None:
    """Receive a small blob in full.

    Raises:
        RunnerError: the content does not match the SHA-256.
        OSError: it cannot be stored.
    """
    data = body.read_all(size)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise RunnerError(f"A file was damaged during the upload: its SHA-256 is not {sha256}.", "Run doit again.")
    blob = store.blob(sha256)
    part = _part(store, sha256)
    while not use(blob):
        with Lock(part) as lock:
            if not lock.is_current():
                continue  # another session has just completed the blob
            try:
                write_all(lock.fd, data)
                os.ftruncate(lock.fd, size)  # an interrupted upload may have left more
                os.replace(part, blob)
                received.add(sha256)
            except BaseException:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise
        return


def put_small(store: Store, request: requests.PutSmall, body: Body) -> EmptyReply:
    """Receive several small blobs in full.

    Raises:
        RunnerError: a content does not match its SHA-256, or the body is too short.
        OSError: a blob cannot be stored.
    """
    for sha256, size in request.blobs:
        take_blob(store, body, sha256, size)
    return {}


def put(store: Store, request: requests.Put, body: Body) -> PutReply:
    """Receive the rest of a blob that may be partially stored.

    Raises:
        RequestError: the offset is larger than the size.
        OSError: the blob cannot be stored.
    """
    sha256, size, offset = request.sha256, request.size, request.offset
    part = _part(store, sha256)
    if size < offset:
        raise RequestError("Invalid request put: offset is larger than size.", INVALID_REQUEST)
    lock = _take_over(store, part, sha256)
    if lock is None:
        return {"have": size}
    wanted = _wanted(part)
    wanted.unlink(missing_ok=True)
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
        received.add(sha256)
    finally:
        lock.release()
    return {"have": size}


def _take_over(store: Store, part: Path, sha256: str) -> Lock | None:
    """Return the acquired lock of an incomplete blob; None if the blob is complete.

    Another session may hold the lock: another client sends the same blob, or this client has reconnected. After a
    reconnect the old session receives no more data, and exits when it detects that another one wants the blob.
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
            _wanted(part).unlink(missing_ok=True)  # otherwise the other session would end when it is silent
            raise SystemExit(0)  # the client queries the stored size and retries
        _wanted(part).touch()
        time.sleep(0.1)
    _wanted(part).unlink(missing_ok=True)
    return None


def use(blob: Path) -> bool:
    """Return whether a blob is stored; if so, update its last use."""
    try:
        os.utime(blob)
    except FileNotFoundError:
        return False
    return True


def _wanted(part: Path) -> Path:
    """Return the file that notifies the session receiving a blob that another session waits for it."""
    return part.with_suffix(".wanted")
