"""File helpers: hashing, sparse files, atomic writes, file locks, and validation of names that become paths."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .locks import opened_alone

CHUNK = 1 << 20
"""Bytes per read or write."""

COPIED = 64 << 20
"""Maximum bytes of one copy in the kernel, which no signal interrupts."""

ZEROS = bytes(CHUNK)
"""A piece of the content of a hole in a sparse file."""


def sha256(file: BinaryIO) -> str:
    """Return the SHA-256 of the rest of an open file, in lower-case hex."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_of(path: os.PathLike[str] | str) -> str:
    """Return the SHA-256 of a file's content, in lower-case hex.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for data in content(file.fileno()):
            digest.update(data)
    return digest.hexdigest()


def data_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of each data extent between two offsets of a file; the rest is holes (lseek(2)).

    A file without holes, or on a file system that does not report them, is one extent.
    """
    while start < end:
        try:
            first = os.lseek(fd, start, os.SEEK_DATA)
            last = min(os.lseek(fd, first, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: no data after `start`
                yield start, end
            return
        if first < last:
            yield first, last
        start = max(first, last)


def content(fd: int) -> Iterator[bytes]:
    """Yield a file's content in pieces. Holes are not read from the disk. The file's offset changes."""
    size = os.fstat(fd).st_size
    done = 0
    for first, last in data_extents(fd, 0, size):
        yield from zeros(first - done)
        for offset in range(first, last, CHUNK):
            data = os.pread(fd, min(CHUNK, last - offset), offset)
            yield data
            if len(data) < min(CHUNK, last - offset):
                return  # the file was truncated meanwhile
        done = last
    yield from zeros(size - done)


def zeros(count: int) -> Iterator[bytes]:
    """Yield `count` zero bytes, in pieces."""
    for left in range(count, 0, -CHUNK):
        yield ZEROS[:left]


def open_regular(path: os.PathLike[str] | str) -> BinaryIO:
    """Open a regular file, or a symbolic link to one, for reading.

    Opening a FIFO would block until another process writes to it, and a device such as /dev/zero has no end.

    Raises:
        OSError: it is not a regular file (EINVAL, or EISDIR for a folder), or cannot be opened.
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
    """Raise OSError unless a stat result is that of a regular file.

    Args:
        about: stat result to check.
        path: path for the error.

    Raises:
        OSError: EISDIR for a folder, EINVAL for anything else.
    """
    if stat.S_ISDIR(about.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))


def is_sha256(text: object) -> bool:
    """Return whether a value is a SHA-256 in lower-case hex."""
    return isinstance(text, str) and len(text) == 64 and not text.strip("0123456789abcdef")


def is_file_name(name: object) -> bool:
    """Return whether a value can name one entry of a folder: no separator, not `.` or `..`, at most 255 bytes."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return len(name.encode("utf-8", "surrogateescape")) <= 255
    except UnicodeEncodeError:
        return False


def is_relative_path(name: object) -> bool:
    """Return whether a value is a path of valid file names, which stays below the folder that it is joined to."""
    return isinstance(name, str) and all(is_file_name(part) for part in name.split("/"))


def sync_folder(folder: os.PathLike[str] | str) -> None:
    """Make renames and removals in a folder survive a power cut (fsync of the folder).

    Raises:
        OSError: the folder cannot be opened or synced.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def written_aside(path: Path, mode: int = 0o600, sync: bool = True) -> Iterator[BinaryIO]:
    """Yield a temporary file in the same folder that replaces `path` by atomic rename at the end of the block.

    The file is synced before the rename, and the folder after it. If the block raises, the temporary file is removed
    and `path` is unchanged. The temporary file of a killed process is reused by the next one.

    Args:
        path: file to replace.
        mode: permissions of the file.
        sync: if false, nothing is synced: a power cut may leave the old file, an empty one or none.

    Raises:
        OSError: the file cannot be written.
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
    """Write all bytes to an open file or pipe.

    Raises:
        OSError: the file cannot be written.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def copy_content(source: int, target: int, check_stop: Callable[[], None]) -> None:
    """Copy a file in the kernel, which shares the blocks on file systems with reflinks (copy_file_range(2)).

    Args:
        source: descriptor of the file, at its start.
        target: descriptor of an empty file.
        check_stop: called repeatedly; an exception that it raises ends the operation.

    Raises:
        OSError: the file cannot be copied.
    """
    try:
        while os.copy_file_range(source, target, COPIED):
            check_stop()
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            raise
        while data := os.read(source, CHUNK):
            check_stop()
            write_all(target, data)


def write_bytes(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file atomically and sync it; see `written_aside`.

    Raises:
        OSError: the file cannot be written.
    """
    with written_aside(path, mode) as file:
        file.write(data)


def write_json(path: Path, value: Any, sync: bool = True) -> None:
    """Write a value as JSON atomically; see `written_aside`.

    Raises:
        OSError: the file cannot be written.
    """
    with written_aside(path, sync=sync) as file:
        file.write(json.dumps(value, sort_keys=True).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; None if it is missing, unreadable or invalid."""
    try:
        with open_regular(path) as file:
            return json.loads(file.read())
    except (OSError, ValueError, RecursionError, MemoryError):  # the last two: a million nested brackets
        return None
