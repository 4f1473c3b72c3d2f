"""Warnings about conditions that slow builds down on this builder or make them fail, each with its remedy.

The supervisor checks them when a job begins and stores the texts in `notices.json`, from which every client receives
them. The texts contain no changing figures, because a client shows each text once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

from ..host.capabilities import Facts, boot
from ..store import builder_config
from ..store.store import Store
from ..util.atomic_files import read_json, write_json

LITTLE_ROOM = 1 << 30
"""Free bytes below which a disk counts as nearly full; one package image needs that much."""

FEW_INODES = 20_000
"""Number of free inodes below which a warning is shown; one Debian base image has about ten thousand files."""

SLOW_SYNC = 1.0
"""Seconds to sync a small file above which a disk counts as slow; memory cards and hard disks need 0.01 to 0.2."""

SYNC_TRIES = 3
"""Maximum number of measurements of a sync; the fastest counts, because other programs write too."""

DAY = 86400.0


def notices(root: Path, known: Facts) -> dict[str, str]:
    """Return the warnings that apply, by topic, each worded to follow "on this builder".

    Args:
        root: the versioned store folder.
        known: capabilities of the builder.

    Raises:
        OSError: the file system cannot be queried or written.
    """
    found = {}
    said = builder_config.read()
    if said.wrong:
        found["builder.json"] = f"{said.wrong}: {said.remedy}"
    if known.driver == "vfs":
        found["storage"] = (
            "the image store uses the vfs driver, which copies the whole base image for every container: run there"
            " sudo apt install fuse-overlayfs"
        )
    if not known.pid_namespace:
        found["processes"] = (
            "PID namespaces are unavailable, so a killed build may leave processes: if the builder is a container,"
            " start it with --privileged"
        )
    if shutil.disk_usage(root).free < LITTLE_ROOM:
        found["room"] = (
            f"the disk of {root.parent} has less than {LITTLE_ROOM >> 30} GiB left: free space, for example with"
            " gamebear prune --older 30 --images"
        )
    about = os.statvfs(root)
    if about.f_files and about.f_favail < FEW_INODES:
        found["inodes"] = (
            f"the file system of {root.parent} has few free inodes (df -i): remove files, for example with gamebear"
            " prune --older 30 --images"
        )
    if sync_seconds(root) > SLOW_SYNC:
        found["disk speed"] = (
            f"syncing a small file to the disk of {root.parent} takes more than {SLOW_SYNC:g} second, as on a worn"
            " memory card: move the store to a USB disk (XDG_CACHE_HOME=/its/folder in /etc/environment there)"
        )
    return found


def keep_notices(store: Store, known: Facts) -> None:
    """Store the warnings for clients. Best effort: an error of the file system is ignored."""
    with contextlib.suppress(OSError):
        found = list(notices(store.root, known).values())
        if found != read_json(store.notices):
            write_json(store.notices, found)


def sync_seconds(root: Path) -> float:
    """Return the seconds that a small file needs to reach the disk; measured once per boot and day.

    Raises:
        OSError: the file cannot be written.
    """
    path = root / "sync.json"
    known = read_json(path)
    with contextlib.suppress(TypeError, KeyError, ValueError):
        if known["boot"] == boot() and 0 <= time.time() - known["at"] < DAY:
            return float(known["seconds"])
    best = float("inf")
    for _ in range(SYNC_TRIES):
        best = min(best, _sync_once(root / "tmp"))
        if best < SLOW_SYNC / 4:
            break
    write_json(path, {"boot": boot(), "at": time.time(), "seconds": best})
    return best


def _sync_once(folder: Path) -> float:
    path = folder / "sync"  # a fixed name: the next measurement removes the file of a killed one
    try:
        with path.open("wb") as file:
            file.write(os.urandom(4096))
            file.flush()
            start = time.monotonic()
            os.fsync(file.fileno())
            return time.monotonic() - start
    finally:
        path.unlink(missing_ok=True)
