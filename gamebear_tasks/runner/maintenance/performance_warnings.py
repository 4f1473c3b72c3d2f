"""What costs a builder much time, or will cost it a build, in words for whoever builds there: each with its remedy.

The supervisor looks when a job begins and leaves the words in `notices.json`, from which every client is told. They
hold no figures that change, because a client repeats nothing that it has said before.
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
"""Free bytes below which a disk counts as nearly full; one package image takes that much."""

FEW_INODES = 20_000
"""Files that can still be made, below which there are few; one Debian base image has about ten thousand."""

SLOW_SYNC = 1.0
"""Seconds for a small file to reach the disk that are too many; cards and hard disks need 0.01 to 0.2."""

SYNC_TRIES = 3
"""How often that is measured at most; the best counts, for other programs write too."""

DAY = 86400.0


def notices(root: Path, known: Facts) -> dict[str, str]:
    """Return what costs much here, by what it is about, each as what may follow "on this builder"; raises OSError.

    Args:
        root: the versioned store folder.
        known: what the builder can do.
    """
    found = {}
    said = builder_config.read()
    if said.wrong:
        found["builder.json"] = f"{said.wrong}: {said.remedy}"
    if known.driver == "vfs":
        found["storage"] = (
            "the image store uses the vfs driver, which copies the whole base image for every container: install"
            " fuse-overlayfs there (sudo apt install fuse-overlayfs)"
        )
    if not known.pid_namespace:
        found["processes"] = (
            "there is no PID namespace to be had, so a killed build may leave processes behind: it is likely a"
            " container itself, and should be started with --privileged"
        )
    if shutil.disk_usage(root).free < LITTLE_ROOM:
        found["room"] = (
            f"the disk of {root.parent} has less than {LITTLE_ROOM >> 30} GiB left: make room there, say with"
            " doit prune --older 30 --images"
        )
    about = os.statvfs(root)
    if about.f_files and about.f_favail < FEW_INODES:
        found["inodes"] = (
            f"the file system of {root.parent} can hold only few more files (df -i), whatever room it has: make room"
            " there, say with doit prune --older 30 --images"
        )
    if sync_seconds(root) > SLOW_SYNC:
        found["disk speed"] = (
            f"a small file takes more than {SLOW_SYNC:g} second to reach the disk of {root.parent}, as on a worn memory"
            " card: have the store on a USB disk (XDG_CACHE_HOME=/its/folder in /etc/environment there)"
        )
    return found


def keep_notices(store: Store, known: Facts) -> None:
    """Leave what costs much here for clients to be told; what cannot be found out or written is not said."""
    with contextlib.suppress(OSError):
        found = list(notices(store.root, known).values())
        if found != read_json(store.notices):
            write_json(store.notices, found)


def sync_seconds(root: Path) -> float:
    """Return for how long a small file takes to reach the disk; measured once a day and boot. Raises OSError."""
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
    path = folder / "sync"  # always the same, so that one who was killed leaves no more than the next removes
    try:
        with path.open("wb") as file:
            file.write(os.urandom(4096))
            file.flush()
            start = time.monotonic()
            os.fsync(file.fileno())
            return time.monotonic() - start
    finally:
        path.unlink(missing_ok=True)
