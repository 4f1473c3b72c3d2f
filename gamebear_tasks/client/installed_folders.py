"""Installation of folder outputs: the new folder is swapped in by rename.

The entries that were installed are listed in `build/logs/.folders`. Only these are ever removed: `doit clean`, and the
next installation, never delete a file that somebody else has put into the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..errors import JobError
from ..runner.util.atomic_files import read_json, write_json
from ..runner.util.folder_archive import entries
from ..util.locations import LOGS

LISTS = LOGS / ".folders"
"""Folder of the lists of installed entries, each named by a hash of the target's path."""


def check_replaceable(target: Path) -> None:
    """Check that a folder holds nothing but what was installed there.

    Raises:
        JobError: it holds something else, or is not a folder.
    """
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise JobError(f"{target} is not a folder, and the task creates a folder there.", f"Move it: mv {target} …")
    known = _listed(target)
    foreign = [path for path in entries(str(target)) if path not in known]
    if foreign:
        raise JobError(
            f"{target} holds {foreign[0]!r}, which this task did not create.",
            f"Move it elsewhere, or give the task a folder that only it writes to. `doit clean` leaves {target}.",
        )


def is_complete(target: str) -> bool:
    """Return whether all entries that were installed in a folder still exist."""
    return all(os.path.lexists(f"{target}/{path}") for path in _listed(target))


def swap_in(new: Path, target: Path, old: Path) -> None:
    """Replace a folder with a new one: the target has the old content, none, or the new content, never a mixture.

    Args:
        new: the new folder, on the same file system.
        target: its place.
        old: path for the previous folder, which is then removed.

    Raises:
        JobError: the target holds something that was not installed.
        OSError: it cannot be replaced.
    """
    check_replaceable(target)
    installed = entries(str(new))
    _write(target, {*installed, *_listed(target)})  # whichever of the two is there after a crash
    with contextlib.suppress(FileNotFoundError):
        os.rename(target, old)
    os.rename(new, target)
    _write(target, installed)
    remove_tree(old)


def remove(target: Path) -> None:
    """Remove what was installed in a folder, and the folder if nothing else is in it; raises OSError."""
    for path in sorted(_listed(target), reverse=True):
        place = target / path
        if place.is_dir() and not place.is_symlink():
            with contextlib.suppress(OSError):  # it holds something else
                place.rmdir()
        else:
            place.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        target.rmdir()
    _list_of(target).unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Remove a folder that this module created, read-only folders in it too. Best effort."""
    for parent, folders, _ in os.walk(folder):
        for path in (os.path.join(parent, name) for name in folders):
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _list_of(target: Path | str) -> Path:
    name = os.path.relpath(target)
    return LISTS / hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def _listed(target: Path | str) -> frozenset[str]:
    data = read_json(_list_of(target))
    found = data.get("entries") if isinstance(data, dict) else None
    return frozenset(map(str, found)) if isinstance(found, list) else frozenset()


def _write(target: Path, installed: Iterable[str]) -> None:
    LISTS.mkdir(parents=True, exist_ok=True)
    write_json(_list_of(target), {"target": os.path.relpath(target), "entries": sorted(installed)})
