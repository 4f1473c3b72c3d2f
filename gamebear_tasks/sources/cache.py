"""What this machine keeps between runs: the trees of sources, what builders have said; in the user's cache folder.

The time of a file or folder among the sources says when it was last used::

    <name>.<sha256>.tar         a source's tree; `.<name>.lock` is held while it is fetched
    <sha256>                    other files for builders
    git/<hash>.git              what was fetched of a repository; `git/<hash>.lock` while it is
    apt/<suite>/                a private apt's lists; `.lock` in it while it runs
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import SourceError
from ..runner.util.atomic_files import locked, write_bytes
from ..util.locations import cache_folder

HOUR = 3600.0
"""Seconds for which what was used is kept in any case: a job that is being sent may still need it."""


def sources_folder() -> Path:
    """Return where sources are kept."""
    return cache_folder() / "sources"


def keep(data: bytes) -> Path:
    """Keep some bytes in a file named by their SHA-256, and return it; raises SourceError."""
    path = sources_folder() / hashlib.sha256(data).hexdigest()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_file() and path.read_bytes() == data:
            os.utime(path)
        else:
            write_bytes(path, data)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}.", "Is there space, and is it yours?") from error
    return path


def prune(older: float) -> tuple[int, int]:
    """Remove what was not used for so many seconds; return how many things that were, and their bytes."""
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
    """Give each thing that is kept, and its lock."""
    for path in sorted(folder.glob("[!.]*")):
        if path.is_file():
            name = path.name.rsplit(".", 2)[0] if path.suffix == ".tar" else path.name
            yield path, folder / f".{name}.lock"
    for path in sorted(folder.glob("git/*.git")):
        yield path, path.with_suffix(".lock")
    for path in sorted(folder.glob("apt/*")):
        yield path, path / ".lock"


def _removed(path: Path, but: Path) -> int:
    """Remove a file, or a folder with all that is in it but a lock; return the bytes."""
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
