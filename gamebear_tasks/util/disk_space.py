"""Find out whether a disk is full, independent of the messages of the program that failed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..runner.util.free_space import FULL

PROBE = 4 << 20
"""Bytes that must fit. The failed program may leave a little space free."""


def room_hint(folder: Path) -> str:
    """Return the fix for a full disk or an exhausted quota, or an empty string if files can be written.

    Args:
        folder: Folder in which a program failed. A temporary file is written to it.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(PROBE))  # a file system may compress other data to nothing
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"Make room in {folder}, then run doit again." if error.errno in FULL else ""
    return ""
