"""The client's cache of fetched sources, in the user's cache folder, and its garbage collection.

The modification time of an entry is the time of its last use::

    <name>.<sha256>.tar         a source's tree; `.<name>.lock` is held while it is fetched
    <sha256>                    another file for builders
    git/<hash>.git              a bare repository; `git/<hash>.lock` is held while it is fetched
    apt/<suite>/                lists of a private apt; `.lock` in it is held while it runs
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ..runner.util.atomic_files import write_bytes
from ..runner.util.locks import locked
from ..util.locations import cache_folder
from .base import storage_error

HOUR = 3600.0
"""Minimum age in seconds of entries to remove: a job that is being sent may still need newer ones."""


def sources_folder() -> Path:
    """Return the folder of cached sources."""
    return cache_folder() / "sources"


def keep(data: bytes) -> Path:
    """Store bytes in a file named by their SHA-256 and return its path.

    Raises:
        SourceError: The file cannot be written.
    """
    path = sources_folder() / hashlib.sha256(data).hexdigest()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_file() and path.read_bytes() == data:
            os.utime(path)
        else:
            write_bytes(path, data)
    except OSError as error:
        raise storage_error(path.parent, error) from error
    return path


def prune(older: float) -> tuple[int, int]:
    """Remove entries that were not used for `older` seconds. Return their number and the bytes freed."""
    until = time.time() - max(older, HOUR)
    count = freed = 0
    for path, lock in _kept(sources_folder()):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime > until:
                continue
            with locked(lock):
                if path.stat().st_mtime <= until:
                    freed += _removed(path, but=lock)
                    count += 1
    return count, freed


def _kept(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each cache entry with its lock file."""
    for path in sorted(folder.glob("[!.]*")):
        if path.is_file():
            name = path.name.rsplit(".", 2)[0] if path.suffix == ".tar" else path.name
            yield path, folder / f".{name}.lock"
    for path in sorted(folder.glob("git/*.git")):
        yield path, path.with_suffix(".lock")
    for path in sorted(folder.glob("apt/*")):
        yield path, path / ".lock"


def _removed(path: Path, but: Path) -> int:
    """Remove a file, or a folder recursively except for a lock file in it. Return the bytes freed."""
    if not path.is_dir():
        size = path.stat().st_size
        path.unlink()
        return size
    size = 0
    for parent, folders, files in os.walk(path, topdown=False):
        for each in (Path(parent, name) for name in files):
            if each != but:
                size += each.lstat().st_size
                each.unlink()
        for each in (Path(parent, name) for name in folders):
            each.unlink() if each.is_symlink() else each.rmdir()
    if but.parent != path:
        path.rmdir()
    return size
