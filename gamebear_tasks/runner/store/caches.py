"""Caches of buildscripts in the store: folders that persist across builds and are mounted into containers.

    ccache/<key>/           compiler cache; jobs share it, each holds its lock (flock, shared)
    caches/<key>-<n>/       instance n of a folder for `Container.cache`; one job at a time uses it
        lock                held (flock) by that job until it ends, however it ends
        files/              the folder; belongs to the builder's user, who is root in containers

The modification time of `<key>/` and `<key>-<n>/` is the time of last use.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from pathlib import Path

from ..util.locks import Lock

FORMAT = 1
"""Version of the key of `caches/`; a new number starts new caches."""

FOLDERS = ("ccache", "caches")
"""Folders of caches, in the store."""


class Instance:
    """An instance of a cache, locked until it is released or this process ends.

    Attributes:
        files: The folder to mount.
    """

    def __init__(self, files: Path, lock: Lock) -> None:
        self.files = files
        self._lock = lock

    def release(self) -> None:
        """Leave the instance to other jobs."""
        self._lock.release()


def key_of(name: str, image: str, arch: str) -> str:
    """Return the key of a cache.

    Args:
        name: The cache's name, or its path in the container.
        image: Id of the container's image.
        arch: Debian's name of its architecture.
    """
    return hashlib.sha256(json.dumps([FORMAT, name, image, arch]).encode()).hexdigest()


def acquire(root: Path, key: str) -> Instance:
    """Return the first instance of a cache that no other job uses, created if necessary. Never waits.

    Args:
        root: The versioned store folder.
        key: See `key_of`.

    Raises:
        OSError: It cannot be created or locked.
    """
    for number in itertools.count():
        folder = root / "caches" / f"{key}-{number}"
        lock = _acquired(folder)
        if lock is not None:
            files = folder / "files"
            with contextlib.suppress(FileExistsError):
                files.mkdir()
                files.chmod(0o755)  # independent of the umask
            os.utime(folder)
            return Instance(files, lock)
    raise AssertionError


def _acquired(folder: Path) -> Lock | None:
    """Return the lock of an instance, or None if another job holds it."""
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # race: garbage collection removed the folder
            lock = Lock(folder / "lock")
            if not lock.acquire():
                lock.release()
                return None
            if lock.is_current():
                return lock
            lock.release()


def instance_of(root: Path, files: Path) -> Path | None:
    """Return the instance that a mounted folder belongs to, or None if it belongs to none."""
    return files.parent if files.name == "files" and files.parent.parent == root / "caches" else None


def lock_file(folder: Path) -> Path:
    """Return the file or folder whose lock is held while a cache, one of `all_of`, is in use."""
    lock = folder / "lock"
    return lock if folder.parent.name == "caches" and lock.exists() else folder


def all_of(root: Path) -> list[Path]:
    """Return every compiler cache and every instance of another cache."""
    found: list[Path] = []
    for name in FOLDERS:
        with contextlib.suppress(FileNotFoundError):
            found += sorted((root / name).iterdir())
    return found
