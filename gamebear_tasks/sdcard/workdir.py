"""Temporary work folder of an image build, beside the target. Folders of killed builds are removed by the next one."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..util.temporary_folders import make_folder, remove_abandoned

SUFFIX = ".bake"

TRIES = 3
"""Attempts to remove a folder into which another thread may still write."""

_open: set[Path] = set()


def _remove_open() -> None:
    """Remove the work folders of running threads at exit: the threads of `doit -P thread` die without cleaning up."""
    for folder in tuple(_open):
        for _ in range(TRIES):  # a thread may create another file during the removal
            shutil.rmtree(folder, ignore_errors=True)


atexit.register(_remove_open)


@contextlib.contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """Yield a new work folder beside the target and remove it at the end. Abandoned ones are removed first."""
    folder, fd = make_folder(target.parent, _prefix(target), SUFFIX)
    _open.add(folder)
    try:
        remove_work_folders(target)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)
        _open.discard(folder)


def _prefix(target: Path) -> str:
    return f".{target.name.encode('utf-8', 'surrogateescape')[:60].decode('utf-8', 'ignore')}."


def remove_work_folders(target: Path) -> None:
    """Remove the work folders of killed builds of a target."""
    remove_abandoned(target.parent, _prefix(target), SUFFIX)
