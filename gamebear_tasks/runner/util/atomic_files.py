"""Files as the runner handles them: hashing, writing aside and renaming, names that are safe to join to a path."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 1 << 20
"""Bytes read or written at once."""

ZEROS = bytes(CHUNK)
"""The content of a hole of a sparse file, a piece of it."""


def sha256(file: BinaryIO) -> str:
    """Return the SHA-256 of what is left to read of a file, in lower-case hex."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_of(path: os.PathLike[str] | str) -> str:
    """Return the SHA-256 of a file's content, in lower-case hex; raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for data in content(file.fileno()):
            digest.update(data)
    return digest.hexdigest()


def data_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of each extent of data between two offsets of a file; the rest is holes (lseek(2)).

    A file without holes, or on a file system that does not report them, is one extent.
    """
    while start < end:
        try:
            first = os.lseek(fd, start, os.SEEK_DATA)
            last = min(os.lseek(fd, first, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: there is no data behind `start`
                yield start, end
            return
        if first < last:
            yield first, last
        start = max(first, last)


def content(fd: int) -> Iterator[bytes]:
    """Yield a file's content in pieces; holes are not read from the disk. The file's offset moves."""
    size = os.fstat(fd).st_size
    done = 0
    for first, last in data_extents(fd, 0, size):
        yield from zeros(first - done)
        for offset in range(first, last, CHUNK):
            data = os.pread(fd, min(CHUNK, last - offset), offset)
            yield data
            if len(data) < min(CHUNK, last - offset):
                return  # somebody has cut it
        done = last
    yield from zeros(size - done)


def zeros(count: int) -> Iterator[bytes]:
    """Yield a number of zero bytes, in pieces."""
    for left in range(count, 0, -CHUNK):
        yield ZEROS[:left]


def open_regular(path: os.PathLike[str] | str) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    A FIFO would block until somebody writes to it, and a device such as /dev/zero never ends.

    Raises:
        OSError: it is something else (EINVAL, or EISDIR for a folder), or cannot be opened.
    """
    check_regular(os.stat(path), path)  # before open(), which has side effects on some devices
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        check_regular(os.fstat(fd), path)
        return open(fd, "rb", buffering=0)
    except BaseException:
        os.close(fd)
        raise


def check_regular(about: os.stat_result, path: os.PathLike[str] | str) -> None:
    """Raise OSError unless a status is that of a regular file."""
    if stat.S_ISDIR(about.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))


def is_sha256(text: object) -> bool:
    """Say whether something is a SHA-256 in lower-case hex."""
    return isinstance(text, str) and len(text) == 64 and not text.strip("0123456789abcdef")


def is_file_name(name: object) -> bool:
    """Say whether something can name one entry of a folder: no separator, not `.` or `..`, at most 255 bytes."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return len(name.encode("utf-8", "surrogateescape")) <= 255
    except UnicodeEncodeError:
        return False


def is_relative_path(name: object) -> bool:
    """Say whether something is a path of safe names that stays below the folder it is joined to."""
    return isinstance(name, str) and all(is_file_name(part) for part in name.split("/"))


def sync_folder(folder: os.PathLike[str] | str) -> None:
    """Make renames and removals in a folder survive a power cut (fsync of the folder)."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened_alone(path: os.PathLike[str] | str, shared: bool = False) -> Iterator[int]:
    """Open a file, made where there is none, and hold it for the length of the block, waiting for it; raises OSError.

    Whoever held it may have renamed or removed it by then: what is given is what is at the path. A holder's death frees
    it.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    try:
        yield fd
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # close() alone would not, if another thread has forked meanwhile
        os.close(fd)


@contextlib.contextmanager
def locked(path: os.PathLike[str] | str, shared: bool = False) -> Iterator[None]:
    """Hold a lock file for the length of the block, waiting for it; a holder's death frees it. Raises OSError.

    Who holds it alone may remove the file at the end of the block: others that wait for it then take a new one.
    """
    with opened_alone(path, shared):
        yield


@contextlib.contextmanager
def written_aside(path: Path, mode: int = 0o600, sync: bool = True) -> Iterator[BinaryIO]:
    """Give a temporary file in the same folder that becomes `path` when the block ends well.

    It is synced before it is renamed, the folder after; when the block raises, nothing of it is left and `path` is
    as it was. Without `sync`, a power cut may leave the old one, an empty one or none. What a writer that was killed
    has left is used by the next one.
    """
    aside = path.with_name(f".{os.fsencode(path.name)[:100].decode('utf-8', 'ignore')}.tmp")
    with opened_alone(aside) as fd:
        try:
            os.ftruncate(fd, 0)
            with open(fd, "wb", closefd=False) as file:
                yield file
            os.fchmod(fd, mode)
            if sync:
                os.fsync(fd)
            os.rename(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise
    if sync:
        sync_folder(path.parent)


def write_all(fd: int, data: bytes) -> None:
    """Write all of some bytes to an open file or pipe; raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_bytes(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a whole file, aside, synced and renamed; raises OSError."""
    with written_aside(path, mode) as file:
        file.write(data)


def write_json(path: Path, value: Any, sync: bool = True) -> None:
    """Write a value as JSON as `written_aside` does; raises OSError."""
    with written_aside(path, sync=sync) as file:
        file.write(json.dumps(value, sort_keys=True).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; None where there is none or where it is damaged."""
    try:
        with open_regular(path) as file:
            return json.loads(file.read())
    except (OSError, ValueError, RecursionError, MemoryError):  # the last two: a million brackets
        return None
