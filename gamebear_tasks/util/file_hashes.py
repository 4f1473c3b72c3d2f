"""SHA-256 of files, cached by device, inode, size, mtime and ctime, in memory and in a cache file.

The mtime alone is not reliable: `cp -p`, `rsync -a`, tar and `touch` set it. The kernel sets the ctime, and programs
cannot. A file is read again unless all five are unchanged.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from ..runner.util.atomic_files import open_regular, read_json, sha256, write_json
from .locations import LOGS

CACHE_FILE = LOGS / ".hashes"
"""Cache file, in projects with a log folder. It is JSON: a file's version (see `version`) and SHA-256, by path."""

FORMAT = "1"
"""Format version of the cache file."""

SETTLED = 0.1
"""Seconds after a file's last change during which it is not cached: a second write could leave its times unchanged."""

SECOND = 1_000_000_000
"""Nanoseconds per second."""


def version(about: os.stat_result) -> str:
    """Return a file's version: a text that changes whenever the content may have changed. It ends with a space."""
    return f"{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} "


def is_settled(about: os.stat_result) -> bool:
    """Return whether another write would change a file's version, so that its entry may be cached.

    It might not after a recent change, or if the ctime is in whole seconds, as on file systems with coarse timestamps
    (FAT, ISO 9660, SFTP).

    Args:
        about: the current status of the file.
    """
    return about.st_ctime_ns % SECOND != 0 and abs(time.time() - about.st_ctime) > SETTLED


def content_of(path: str) -> tuple[str, bool]:
    """Return the SHA-256 of a file's content, and whether its owner may execute it; raises OSError."""
    about = os.stat(path)
    now = version(about)
    known = (_known or _cached()).get(path, "")
    if known.startswith(now):
        return known[len(now) :], bool(about.st_mode & 0o100)
    return opened_content_of(path)


def opened_content_of(path: str) -> tuple[str, bool]:
    """Return the same as `content_of`, but open the file first, on which NFS revalidates its cached attributes.

    Raises:
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        about = os.fstat(file.fileno())
        now = version(about)
        known = (_known or _cached()).get(path, "")
        if not known.startswith(now):
            is_final = is_settled(about)  # before reading, which takes time
            known = now + sha256(file)
            if is_final:
                _known[path] = known
                _new.add(path)
        return known[len(now) :], bool(about.st_mode & 0o100)


_known: dict[str, str] = {}
"""Version and SHA-256 of each file, by path."""

_new: set[str] = set()
"""Paths whose entries are not in the cache file yet."""


def _cached() -> dict[str, str]:
    """Return all entries, after reading the current folder's cache file on the first call."""
    if not _places:
        place = os.path.abspath(CACHE_FILE)
        _places.append(place)
        atexit.register(_keep, place)
        _known.update(_read(place))
    return _known


_places: list[str] = []
"""Absolute path of the cache file, once it was read."""


def _keep(place: str) -> None:
    """At exit, write new entries to the cache file, and drop files that no longer exist."""
    if _new and os.path.abspath(CACHE_FILE) == place:
        _write(place, {path: known for path, known in _known.items() if os.path.exists(path)})


def _read(place: str) -> dict[str, str]:
    """Read a cache file; empty if it is missing, damaged or of another version."""
    data = read_json(Path(place))
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        if data["version"] == FORMAT and all(isinstance(known, str) for known in data["files"].values()):
            files: dict[str, str] = data["files"]
            return files
    return {}


def _write(place: str, files: Mapping[str, str]) -> None:
    """Write a cache file, in projects with a log folder; best effort."""
    if os.path.isdir(os.path.dirname(place)):
        with contextlib.suppress(OSError):
            write_json(Path(place), {"version": FORMAT, "files": files}, sync=False)
