"""Garbage collection of the store, also while jobs run: prunes unused results, blobs and images by age, count and size.

Every entry is first moved to the trash by an atomic rename under its lock, and then removed. A prune that is killed
leaves a consistent store and some trash, which the next prune or the next job removes. A job whose lock is held is
skipped. Race: a blob may be removed between a job's submission and its start. That job fails with the kind `blob`, and
the client submits it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..host.buildah import IMAGES_IN_USE, BuildahError, outside, remove_tree
from ..host.capabilities import Facts
from ..host.probe import facts
from ..images.apt import POOL, trim
from ..store import caches, folder_sources
from ..store.store import Store, StoredJob, runner_folder, stamp
from ..util.atomic_files import is_sha256
from ..util.errors import RunnerError
from ..util.locks import Lock, locked, seized
from .cleanup import clean_up, clean_up_after_lost_jobs

RECENT = 60.0
"""Seconds after its last use during which a job is not removed: a client may be about to fetch its outputs."""

FRESH = 3600.0
"""Seconds after its last use during which an unreferenced blob is not removed: the job that needs it may be on its
way."""

DAY = 86400.0
"""Minimum seconds for which a runner, an incomplete upload or a virtual environment is retained."""

TRIES = 5
"""Attempts to acquire a busy lock, because another process may only be checking whether it is free."""


@dataclass(frozen=True)
class Policy:
    """Limits that select the entries to remove.

    Attributes:
        older: seconds since the last use after which an entry is removed; None: no age limit.
        size: maximum bytes of jobs, blobs and caches together. Failed jobs with retained containers are
            removed first, then the least recently used entries.
        keep: number of latest results to retain per target (architecture, program and outputs).
        images: also remove images made by the runner that no remaining job has used and that are unused for `older`
            seconds.
    """

    older: float | None = None
    size: int | None = None
    keep: int | None = None
    images: bool = False


@dataclass
class Pruned:
    """Result of a prune.

    Attributes:
        jobs: number of jobs removed.
        blobs: number of blobs and incomplete uploads removed.
        images: number of images removed.
        others: number of other runner versions, caches, virtual environments and temporary files removed.
        freed: bytes freed.
        left: reasons why entries were not removed, one sentence each.
        more: the time limit expired before everything was processed.
    """

    jobs: int = 0
    blobs: int = 0
    images: int = 0
    others: int = 0
    freed: int = 0
    left: list[str] = field(default_factory=list)
    more: bool = False


_sizes: dict[tuple[str, float], int] = {}
"""Bytes of each job that is not running, by folder and last use. A cache, so that the next prune in the same process
does not walk a slow disk again."""


class InUse(RunnerError):
    """A job is running, or a client uses it."""

    kind = "use"


class _TimeIsUp(Exception):
    pass


@dataclass(frozen=True)
class _Entry:
    """A candidate for removal: a job or a file."""

    last_use: float
    size: int
    path: Path
    job: StoredJob | None = None


class Prune:
    """One prune of a store.

    Args:
        store: store to prune.
        policy: limits that select the entries to remove.
        seconds: time limit, after which the rest is left to another call.
    """

    def __init__(self, store: Store, policy: Policy, seconds: float) -> None:
        self.store = store
        self.policy = policy
        self.pruned = Pruned()
        self._now = time.time()
        self._until = time.monotonic() + seconds
        self._busy: set[str] = set()

    def run(self) -> Pruned:
        """Prune the store and return what was removed.

        Raises:
            RunnerError: buildah failed.
            OSError: the store cannot be read or written.
        """
        try:
            clean_up_after_lost_jobs(self.store, but="")
            self._empty_trash()
            self._jobs()
            self._blobs()
            self._down_to_size()
            self._others()
            if self.policy.images:
                self._images()
        except _TimeIsUp:
            self.pruned.more = True
        if self._busy:
            self.pruned.left.append(f"Kept jobs that are in use or were used a moment ago: {len(self._busy)}.")
        return self.pruned

    def _go_on(self) -> None:
        """Stop at the time limit, but not before something was removed: every call progresses, even on a slow disk."""
        pruned = self.pruned
        went = pruned.jobs or pruned.blobs or pruned.images or pruned.others or pruned.freed
        if went and time.monotonic() > self._until:
            raise _TimeIsUp

    # jobs

    def _all_jobs(self) -> list[StoredJob]:
        return [self.store.job(path.name) for path in self.store.jobs.iterdir() if is_sha256(path.name)]

    def _jobs(self) -> None:
        """Remove jobs by age and by count."""
        going: dict[str, StoredJob] = {}
        results: dict[str, list[StoredJob]] = {}
        for job in self._all_jobs():
            state = job.written_state()
            for path in job.stamps():
                self._age(stamp(path), path)
            if self.policy.older is not None and self._age(job.last_use()) > self.policy.older:
                going[job.digest] = job
            if state["state"] == "done":
                results.setdefault(target_of(job), []).append(job)
            elif self.policy.keep is not None and not self._is_news(job, state):
                going[job.digest] = job
        if self.policy.keep is not None:
            for jobs in results.values():
                jobs.sort(key=StoredJob.last_use, reverse=True)
                going.update({job.digest: job for job in jobs[self.policy.keep :]})
        for job in going.values():
            self._go_on()
            self._remove_job(job)

    def _is_news(self, job: StoredJob, state: dict[str, Any]) -> bool:
        """Return whether a job without a result is running, or its end is not acknowledged by a client yet."""
        if state["state"] in ("queued", "running"):
            return job.is_locked()
        if state["state"] in ("failed", "cancelled"):
            return not job.was_seen(state["attempt"])
        return False

    def _remove_job(self, job: StoredJob) -> bool:
        """Remove a job that was not used recently; return whether it was removed."""
        try:
            away = _taken_out(job, RECENT)
        except InUse:
            self._busy.add(job.digest)
            return False
        except RunnerError as error:
            self.pruned.left.append(error.message)
            return False
        if away is None:
            return False
        self.pruned.jobs += 1
        self.remove(away)
        return True

    # blobs

    def _blobs(self) -> None:
        """Remove unreferenced blobs by age."""
        if self.policy.older is None and self.policy.keep is None:
            return
        limit = min(
            self.policy.older if self.policy.older is not None else FRESH,
            FRESH if self.policy.keep is not None else float("inf"),
        )
        named = _blobs_of(self._all_jobs())
        for path in self.store.blobs.iterdir():
            self._go_on()
            self._age(stamp(path), path)
            if path.name not in named:
                self._remove_file(path, limit)

    def _remove_file(self, path: Path, unused_for: float) -> bool:
        """Remove a blob or an incomplete upload unless it is in use; return whether it is gone.

        Args:
            path: the file.
            unused_for: minimum seconds since its last use.
        """
        with contextlib.suppress(FileNotFoundError):
            about = path.stat()
            if self._age(about.st_mtime, path) < unused_for:
                return False
            with Lock.opened(path) as lock:
                if not lock.acquire():  # held by a session that receives the upload
                    return False
                path.unlink()
                self.pruned.blobs += 1
                self.pruned.freed += about.st_blocks * 512
        return True

    # size

    def _down_to_size(self) -> None:
        """Remove the least recently used jobs, blobs and caches until the rest fits into `Policy.size`."""
        if self.policy.size is None:
            return
        jobs = self._all_jobs()
        needed = _blobs_of(job for job in jobs if job.is_locked())
        entries = [self._entry(job) for job in jobs]
        for path in [*self.store.blobs.iterdir(), *self.store.tmp.glob("*.part")]:
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                entries.append(_Entry(about.st_mtime, about.st_blocks * 512, path))
        entries += [_Entry(stamp(path), _allocated(path), path) for path in caches.all_of(self.store.root)]
        total = sum(entry.size for entry in entries)
        for entry in sorted(entries, key=lambda entry: (entry.job is None or not entry.job.is_kept(), entry.last_use)):
            if total <= self.policy.size:
                return
            self._go_on()
            if entry.job is not None:
                if self._remove_job(entry.job):
                    total -= entry.size
            elif entry.path.is_dir():
                if self._remove_unheld(entry.path):
                    total -= entry.size
            elif entry.path.name not in needed and self._remove_file(entry.path, 0.0):
                total -= entry.size

    def _entry(self, job: StoredJob) -> _Entry:
        last_use = job.last_use()
        if job.is_locked():
            return _Entry(last_use, _allocated(job.folder), job.folder, job)
        key = (str(job.folder), last_use)
        if key not in _sizes:
            _sizes[key] = _allocated(job.folder)
        return _Entry(last_use, _sizes[key], job.folder, job)

    # other entries

    def _others(self) -> None:
        """Remove unused runners, caches, virtual environments, temporary files and cached packages."""
        limit = max(self.policy.older or 0.0, DAY)
        self.pruned.freed += trim(self.store.root / POOL, self._now - limit if self.policy.older is not None else None)
        own = runner_folder()
        for path in _entries(self.store.root / "runner"):
            if path != own and self._age(stamp(path), path) > limit:
                self._remove_unheld(path)
        for path in caches.all_of(self.store.root):
            if self._age(stamp(path), path) > limit:
                self._remove_unheld(path)
        for path in self.store.tmp.glob("*.part"):
            self._go_on()
            self._remove_file(path, limit)
        idle = not any(job.is_locked() for job in self._all_jobs())
        for path in _entries(self.store.tmp):
            if idle and path.suffix != ".part" and self._age(stamp(path), path) > limit:
                self._throw_out(path)
        for path in _entries(self.store.root / "venvs"):
            used = max(stamp(path), stamp(path / "complete"))
            if idle and path.suffix != ".lock" and self._age(used, path) > limit:
                lock = path.with_name(f"{path.name}.lock")
                with locked(lock):
                    self._throw_out(path)
                    lock.unlink(missing_ok=True)

    def _remove_unheld(self, path: Path) -> bool:
        """Remove a folder that is not in use; return whether it was removed.

        A process that runs from a runner's folder, or uses a cache, holds its lock.
        """
        with seized(caches.lock_file(path)) as held:
            if held:
                self._throw_out(path)
        return held

    def _throw_out(self, path: Path) -> None:
        self._go_on()
        self.pruned.others += 1
        self.remove(_thrown_away(self.store, path))

    # images

    def _images(self) -> None:
        """Remove unused images made by the runner, unless a job is resolving or making an image."""
        in_use = self.store.images / IMAGES_IN_USE
        try:
            known = facts(self.store.root)
        except RunnerError:
            return  # without buildah there are no images
        locks = [path for path in self.store.images.glob("*.lock") if path != in_use]
        with contextlib.ExitStack() as held:
            for path in [in_use, *locks]:
                lock = held.enter_context(Lock.opened(path))
                if not _acquired(lock):
                    self.pruned.left.append("The images were kept: a job is resolving or building one.")
                    return
            before = _free(self.store.root)
            try:
                self._unused_images(known)
            finally:
                self.pruned.freed += max(0, _free(self.store.root) - before)
            for path in locks:  # held by nobody else, and created again on demand
                path.unlink(missing_ok=True)

    def _unused_images(self, known: Facts) -> None:
        root = self.store.root
        used = {line for job in self._all_jobs() for line in _lines(job.folder / "images")}
        own_store = "--root" in known.storage
        there = set()
        for image in json.loads(outside(root, known, "images", "--all", "--no-trunc", "--json") or "null") or []:
            self._go_on()
            identity = str(image["id"]).rpartition(":")[2]
            there.add(identity)
            names = [str(name) for name in image.get("names") or ()]
            ours = [name for name in names if name.startswith("localhost/gamebear-")]
            used_at = stamp(self.store.images / f"{identity}.used")
            if not used_at or (names and not ours):
                continue  # not made by the runner
            if identity in used or self._age(used_at) < (self.policy.older or 0.0):
                continue
            try:
                outside(root, known, "rmi", *((names if own_store else ours) or [identity]))
            except BuildahError as error:
                self.pruned.left.append(f"Image {(ours or [identity])[0]} was kept: {error}")
            else:
                there.discard(identity)
                self.pruned.images += 1
        for path in self.store.images.glob("*.used"):
            if path.stem not in there:
                path.unlink(missing_ok=True)

    # removing

    def _age(self, last_use: float, path: Path | None = None) -> float:
        """Return the seconds since a last use, at least 0.

        A time in the future was written before the clock was set back.

        Args:
            last_use: the time, in seconds since 1970.
            path: file whose timestamp is reset to now if it is more than a day in the future.
        """
        if last_use > self._now + DAY and path is not None:
            with contextlib.suppress(OSError):
                os.utime(path)  # otherwise it would never expire
        return max(0.0, self._now - last_use)

    def remove(self, path: Path) -> None:
        """Remove an entry of the trash, including files owned by other users of a container."""
        self.pruned.freed += _allocated(path)
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            try:
                remove_tree(self.store.root, facts(self.store.root), path)
            except RunnerError as error:
                self.pruned.left.append(str(error))

    def _empty_trash(self) -> None:
        for path in _entries(self.store.trash):
            self._go_on()
            self.remove(path)


def forget(store: Store, digest: str) -> int | None:
    """Remove a job with its outputs and log; return the bytes freed, or None if there is no such job.

    Its inputs and images stay.

    Raises:
        InUse: the job is running, or a client uses it.
        RunnerError: a shell is open in a retained container, or its containers cannot be removed.
        OSError: the store cannot be written.
    """
    away = _taken_out(store.job(digest), recent=0.0)
    if away is None:
        return None
    prune = Prune(store, Policy(), 0.0)
    prune.remove(away)
    return prune.pruned.freed


def _taken_out(job: StoredJob, recent: float) -> Path | None:
    """Move a job to the trash under its lock; return its path there, or None if there is no such job.

    Args:
        job: the job.
        recent: seconds since its last use during which it counts as in use.

    Raises:
        InUse, RunnerError: as in `forget`.
    """
    name = f"Job {job.digest[:12]}"
    try:
        lock = job.lock()
    except FileNotFoundError:
        return None
    try:
        with job.seized_outputs() as unused:
            if not unused:
                raise InUse(f"{name} was kept: a client downloads its outputs.", "Retry after the download.")
            if not _acquired(lock) or not lock.is_current():
                raise InUse(
                    f"{name} was kept: it is running.", f"Cancel it first: gamebear jobs cancel {job.digest[:12]}"
                )
            if 0 <= time.time() - job.last_use() < recent:
                raise InUse(f"{name} was kept: it was used a moment ago.", "Retry in a minute.")
            if not job.release_kept():
                raise RunnerError(
                    f"{name} was kept: a shell is open in its container.", "Exit that shell (gamebear shell)."
                )
            if job.mark.exists():
                clean_up(job)
            if job.mark.exists():
                raise RunnerError(
                    f"{name} was kept: its containers could not be removed.", "See `buildah containers` on the builder."
                )
            return _thrown_away(job.store, job.folder)
    finally:
        lock.release()


def _thrown_away(store: Store, path: Path) -> Path:
    away = store.trash / f"{path.name[:100]}-{secrets.token_hex(4)}"
    os.rename(path, away)
    return away


def target_of(job: StoredJob) -> str:
    """Return a key that all results of one target share: architecture, program and outputs."""
    try:
        document = job.document()
        program = document.get("script") or document["function"]
        return json.dumps([document["arch"], program["name"], sorted(document["outputs"])])
    except (OSError, ValueError, KeyError, TypeError):
        return job.digest


def _blobs_of(jobs: Iterable[StoredJob]) -> set[str]:
    """Return every SHA-256 that any of the jobs refers to."""
    named: set[str] = set()
    read: set[str] = set()
    for job in jobs:
        for name in ("job.json", "order.json"):
            with contextlib.suppress(OSError):
                named.update(re.findall("[0-9a-f]{64}", (job.folder / name).read_text("utf-8", "replace")))
        with contextlib.suppress(OSError, ValueError, AttributeError):
            for sha256 in set(folder_sources.manifests(job.document()).values()) - read:
                read.add(sha256)
                named.update(folder_sources.files(job.store, sha256))
    return named


def _acquired(lock: Lock) -> bool:
    for _ in range(TRIES):
        if lock.acquire():
            return True
        time.sleep(0.05)
    return False


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _allocated(path: Path) -> int:
    """Return the bytes that a file or folder occupies on the disk. Unreadable parts are not counted."""
    total = 0
    with contextlib.suppress(OSError):
        total += path.lstat().st_blocks * 512
    for folder, folders, names in os.walk(path):
        for name in (*folders, *names):
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def _free(root: Path) -> int:
    about = os.statvfs(root)
    return about.f_bfree * about.f_frsize


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("ascii", "replace").splitlines()
    except FileNotFoundError:
        return []
