"""Temporary folders with a file lock while in use, so that those of killed processes can be removed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from ..runner.util.locks import hold, seized


def make_folder(parent: Path, prefix: str, suffix: str = "") -> tuple[Path, int]:
    """Create a folder with a unique name, and lock it.

    Returns:
        The folder, and a descriptor that holds its lock until it is closed, at the latest when the process exits.
        Forked processes hold the lock too.

    Raises:
        OSError: the folder cannot be created.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=parent))
        with contextlib.suppress(FileNotFoundError):  # race: another process removed it as abandoned
            return folder, hold(folder)


def remove_abandoned(parent: Path, prefix: str, suffix: str = "") -> None:
    """Remove this user's folders with such names that no process locks; best effort."""
    ours = re.compile(rf"{re.escape(prefix)}[^.]+{re.escape(suffix)}")  # mkdtemp's random part has no dot
    for folder in parent.iterdir() if parent.is_dir() else ():
        if not ours.fullmatch(folder.name):
            continue
        with seized(folder) as held, contextlib.suppress(OSError):
            if held and folder.lstat().st_uid == os.geteuid():
                shutil.rmtree(folder, ignore_errors=True)
