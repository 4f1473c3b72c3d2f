"""The folder that an image is baked in: beside its target, gone at the end, even after a baking that was killed."""

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
"""How often a folder is removed in which somebody may still write."""

_open: set[Path] = set()


def _remove_open() -> None:
    """Remove what threads still work in: those of `doit -P thread` die with the process, and clear nothing away."""
    for folder in tuple(_open):
        for _ in range(TRIES):  # a thread may write another file meanwhile
            shutil.rmtree(folder, ignore_errors=True)


atexit.register(_remove_open)


@contextlib.contextmanager
def workshop(target: Path) -> Iterator[Path]:
    """Give a folder beside the target to work in; it goes at the end, and what killed ones have left goes before."""
    folder, fd = make_folder(target.parent, _prefix(target), SUFFIX)
    _open.add(folder)
    try:
        remove_workshops(target)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)
        _open.discard(folder)


def _prefix(target: Path) -> str:
    return f".{target.name.encode('utf-8', 'surrogateescape')[:60].decode('utf-8', 'ignore')}."


def remove_workshops(target: Path) -> None:
    """Remove the folders of bakings of a target that were killed."""
    remove_abandoned(target.parent, _prefix(target), SUFFIX)
