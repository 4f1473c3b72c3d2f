"""SHA-256 of files, cached by device, inode, size, mtime and ctime; from one doit to the next too.

The mtime alone proves nothing: `cp -p`, `rsync -a`, tar and `touch` set it. The ctime is the kernel's, and no program
sets it. A file is read again unless all five are unchanged.
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

KEPT = LOGS / ".hashes"
"""The cache, in a project that has logs: JSON, by path its version (see `version`) and its SHA-256."""

FORMAT = "1"
"""The version of the cache."""

SETTLED = 0.1
"""Seconds after a change for which the cache does not trust a file: a second write could leave its times unchanged."""

SECOND = 1_000_000_000
"""Nanoseconds."""


def version(about: os.stat_result) -> str:
    """Return a text that differs when a file's content may differ; it ends with a space."""
    return f"{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} "


def is_settled(about: os.stat_result) -> bool:
    """Say whether another write would change the version of a file that was looked at just now.

    A ctime of whole seconds is that of a coarse file system (FAT, ISO 9660, SFTP), where it would not.
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
    """Return what `content_of` does; NFS validates its cached attributes when a file is opened. Raises OSError."""
    with open_regular(path) as file:
        about = os.fstat(file.fileno())
        now = version(about)
        known = (_known or _cached()).get(path, "")
        if not known.startswith(now):
            is_final = is_settled(about)  # as it was before the file is read
            known = now + sha256(file)
            if is_final:
                _known[path] = known
                _new.add(path)
        return known[len(now) :], bool(about.st_mode & 0o100)


_known: dict[str, str] = {}
"""By path, its version and its SHA-256."""

_new: set[str] = set()
"""What of it the file of the cache does not have yet."""


def _cached() -> dict[str, str]:
    """Return what is known, with what an earlier doit has cached; read once, for the folder that doit works in."""
    if not _places:
        place = os.path.abspath(KEPT)
        _places.append(place)
        atexit.register(_keep, place)
        _known.update(read_cache(place, FORMAT))
    return _known


_places: list[str] = []
"""Where the cache is that was read."""


def _keep(place: str) -> None:
    """Write the cache for the next doit, without the files that are gone."""
    if _new and os.path.abspath(KEPT) == place:
        write_cache(place, FORMAT, {path: known for path, known in _known.items() if os.path.exists(path)})


def read_cache(place: str, written_as: str) -> dict[str, str]:
    """Return the texts of a cache by path; none where it is missing, damaged or of another version."""
    data = read_json(Path(place))
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        if data["version"] == written_as and all(isinstance(known, str) for known in data["files"].values()):
            files: dict[str, str] = data["files"]
            return files
    return {}


def write_cache(place: str, written_as: str, files: Mapping[str, str]) -> None:
    """Write the texts of a cache by path, in a project that has logs; best effort."""
    if os.path.isdir(os.path.dirname(place)):
        with contextlib.suppress(OSError):
            write_json(Path(place), {"version": written_as, "files": files}, sync=False)
