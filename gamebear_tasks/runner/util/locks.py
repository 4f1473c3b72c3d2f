"""File locks (flock(2)). A lock is released at the latest when the last process that holds its descriptor ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def hold(path: os.PathLike[str] | str, shared: bool = False, create: bool = False) -> int:
    """Wait for the lock of a file or folder, and return a descriptor that holds it.

    A previous holder may have renamed or removed the file meanwhile; then the file that is now at the path is locked.

    Args:
        path: path of the file or folder.
        shared: acquire a shared lock instead of an exclusive one.
        create: create a missing file.

    Raises:
        OSError: it cannot be opened or locked.
    """
    while True:
        fd = _opened(path, os.O_CREAT if create else 0)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            if is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


@contextlib.contextmanager
def opened_alone(path: os.PathLike[str] | str, shared: bool = False) -> Iterator[int]:
    """Open a file, creating it if it is missing, and hold its lock for the block; see `hold`.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    fd = hold(path, shared, create=True)
    try:
        yield fd
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # close() alone does not unlock if another thread has forked meanwhile
        os.close(fd)


@contextlib.contextmanager
def locked(path: os.PathLike[str] | str, shared: bool = False) -> Iterator[None]:
    """Hold a lock file for the block. Blocks until the lock is free.

    An exclusive holder may remove the file at the end of the block; waiting processes then create a new one.

    Args:
        path: path of the lock file.
        shared: acquire a shared lock instead of an exclusive one.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    with opened_alone(path, shared):
        yield


@contextlib.contextmanager
def seized(path: os.PathLike[str] | str) -> Iterator[bool]:
    """Hold an existing file or folder exclusively for the block, without waiting.

    Yields:
        Whether it is held. It is not if it is missing, was replaced meanwhile, or another process holds it.
    """
    fd = -1
    held = False
    try:
        with contextlib.suppress(OSError):
            fd = _opened(path)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = is_at(fd, path)
        yield held
    finally:
        if fd >= 0:
            os.close(fd)


def is_at(fd: int, path: os.PathLike[str] | str) -> bool:
    """Return whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _opened(path: os.PathLike[str] | str, flags: int = 0) -> int:
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_RDWR, 0o600)  # NFS grants an exclusive lock only to a writer
    except IsADirectoryError:
        return os.open(path, flags & ~os.O_CREAT | os.O_RDONLY | os.O_DIRECTORY)


class Lock:
    """An exclusive file lock, held until it is released or its last holder dies (flock(2))."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def acquire(self, wait: bool = False) -> bool:
        """Try to acquire the lock, or block until it is acquired if `wait`; return whether it is acquired."""
        return self._flock(fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

    def is_free(self) -> bool:
        """Return whether nobody holds the lock now. Concurrent checks use a shared lock and do not block each other."""
        return self._flock(fcntl.LOCK_SH | fcntl.LOCK_NB)

    def is_current(self) -> bool:
        """Return whether the file is still at its path: pruning a folder moves its lock file away."""
        return is_at(self.fd, self.path)

    def _flock(self, operation: int) -> bool:
        try:
            fcntl.flock(self.fd, operation)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Release the lock; a process that inherited it still holds it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path) -> Iterator[Lock]:
        """Yield a lock that is not acquired yet, and release it at the end of the block."""
        lock = cls(path)
        try:
            yield lock
        finally:
            lock.release()

    def __enter__(self) -> Lock:
        self.acquire(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
