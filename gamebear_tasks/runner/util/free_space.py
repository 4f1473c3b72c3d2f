"""Detect a full disk from the file system, because programs report it only as text."""

from __future__ import annotations

import contextlib
import errno
import os

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of an exhausted disk or quota."""

NO_ROOM = 1 << 20
"""Free bytes below which a disk counts as full."""


def is_full(*folders: str | os.PathLike[str]) -> bool:
    """Return whether the file system of one of the folders has no free space or no free inodes.

    A program that removes its files when it fails frees the space again, so the result is reliable only if it is True.
    """
    for folder in folders:
        with contextlib.suppress(OSError):
            found = os.statvfs(folder)
            # Some file systems report no sizes.
            too_small = found.f_blocks and found.f_bavail * found.f_frsize < NO_ROOM
            if too_small or (found.f_files and not found.f_favail):
                return True
    return False
