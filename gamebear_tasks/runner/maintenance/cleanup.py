"""Cleanup after builds: remove containers, folders and scratch files that a build left, and mark lost jobs as lost."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection

from ..host.buildah import remove_containers, remove_tree
from ..host.probe import facts
from ..store.store import FINAL, Store, StoredJob
from ..util.atomic_files import is_sha256
from ..util.errors import RunnerError


def clean_up(stored: StoredJob, containers: bool = True) -> None:
    """Remove everything that a build may have left and, if all of it is gone, its `live` mark.

    The caller holds the job's lock.

    Args:
        stored: the job.
        containers: whether there may be containers.
    """
    if remove_leftovers(stored, containers):
        with contextlib.suppress(OSError):
            stored.kept.unlink(missing_ok=True)
            stored.mark.unlink()


def remove_leftovers(stored: StoredJob, containers: bool = True, but: Collection[str] = ()) -> bool:
    """Remove a build's containers, working directory and scratch files; return whether all of them are gone.

    Args:
        stored: the job.
        containers: whether there may be containers.
        but: containers to retain. The working directory, which their mounts refer to, is then retained too.
    """
    root = stored.store.root
    gone = True
    try:
        if containers:
            remove_containers(root, facts(root), stored.container_prefix, but, stored.scratch)
    except (RunnerError, OSError):
        gone = False
    with contextlib.suppress(RunnerError, OSError):
        if stored.scratch.exists():
            remove_tree(root, facts(root), stored.scratch)
    names = ["source.tar", "function.pickle", "function.lines", "cloudpickle.zip", "result.json", "phase"]
    if not but:
        names.append("kept.json")
        shutil.rmtree(stored.work, ignore_errors=True)
        with contextlib.suppress(RunnerError, OSError):
            if stored.work.exists():  # it contains files owned by other users of a container
                remove_tree(root, facts(root), stored.work)
    for path in (*(stored.folder / name for name in names), *stored.folder.glob(".*.tmp")):
        with contextlib.suppress(OSError):
            path.unlink()
    return gone and not stored.scratch.exists() and (bool(but) or not stored.work.exists())


def clean_up_after_lost_jobs(store: Store, but: str) -> None:
    """Clean up after jobs whose supervisor died, mark them as lost, and empty the trash. Best effort.

    Args:
        store: store to clean up.
        but: digest of a job to skip.
    """
    with contextlib.suppress(OSError):
        for mark in list(store.live.iterdir()):
            if mark.name != but and is_sha256(mark.name):
                with contextlib.suppress(OSError):  # another process may be removing the same
                    _clean_up_if_lost(store.job(mark.name))
        for path in store.trash.iterdir():  # left by a prune that was killed
            with contextlib.suppress(OSError, RunnerError):
                remove_tree(store.root, facts(store.root), path)


def _clean_up_if_lost(stored: StoredJob) -> None:
    if not stored.folder.is_dir():
        stored.mark.unlink()
        return
    lock = stored.lock()
    try:
        if lock.acquire() and lock.is_current() and stored.mark.exists():
            state = stored.written_state()
            clean_up(stored)
            if state["state"] not in (*FINAL, "absent"):
                stored.write_state({**state, "state": "lost"})
    finally:
        lock.release()
