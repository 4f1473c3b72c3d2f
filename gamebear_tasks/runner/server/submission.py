"""Submission of a job: attach to it, return its stored result, or start its supervisor."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import subprocess
import sys
import time
from typing import TYPE_CHECKING, cast

from ..protocol import requests
from ..protocol.manifest import ManifestError
from ..protocol.wire import INVALID_REQUEST
from ..store import folder_sources
from ..store.expiry import seconds_left, why_expired
from ..store.store import WHO, State, Store, StoredJob, is_attempt_of, runner_folder, version
from ..util.atomic_files import sync_folder, write_bytes
from ..util.errors import RunnerError
from ..util.locks import Lock
from .uploads import Body, received, size_so_far, take_blob, use

if TYPE_CHECKING:
    from ..protocol.replies import JobReply

MEANING_SECONDS = 5.0
"""Timeout in seconds for buildah to resolve all image names of a result, after which the result is returned unchecked.
Shorter than another client's wait for the job's lock."""


LACKS = 20_000
"""Maximum number of missing blobs that a reply names; the client asks again when it has sent them."""


class Supervisors:
    """The supervisors that this session started.

    Args:
        store: the builder's store.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._alive: dict[str, int] = {}
        """Per attempt, a pipe from its supervisor. It reaches end of file when the job has ended."""

    def start(self, stored: StoredJob, attempt: str, lock: Lock) -> None:
        """Start the job's detached supervisor in its own process session. It inherits the lock, so there is no gap."""
        for name, fd in list(self._alive.items()):
            if select.select([fd], [], [], 0)[0]:  # that job has ended, and another session followed it
                os.close(self._alive.pop(name))
        runner = runner_folder()
        ours, theirs = os.pipe()
        try:
            with (stored.folder / "supervisor.log").open("wb") as errors:
                subprocess.Popen(
                    [
                        sys.executable,
                        "-I",
                        "-S",
                        runner,
                        "supervise",
                        stored.digest,
                        attempt,
                        str(lock.fd),
                        str(theirs),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    cwd=self.store.root,
                    pass_fds=[lock.fd, theirs],
                    start_new_session=True,
                )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._alive[attempt] = ours

    def wait(self, attempt: str, seconds: float) -> bool:
        """Wait until an attempt has ended, at most for some seconds; return False if the client sends something."""
        alive = self._alive.get(attempt, -1)
        ready, _, _ = select.select([0] if alive < 0 else [0, alive], [], [], seconds)
        if 0 in ready:
            return False
        if ready:
            os.close(self._alive.pop(attempt))
        return True


def submit(supervisors: Supervisors, request: requests.Submit, body: Body) -> JobReply:
    """Accept a job: start it, attach to it if it is running, or report the blobs that are missing.

    Raises:
        RunnerError: the job does not match its digest, needs another Python, or a shell is open in a retained
            container.
    """
    store = supervisors.store
    for sha256, size in request.blobs:
        take_blob(store, body, sha256, size)
    stored = store.job(request.digest)
    text = request.job.encode("ascii")
    if hashlib.sha256(text).hexdigest() != request.digest:
        raise RunnerError(f"The description of job {request.digest[:12]} does not match its digest.", INVALID_REQUEST)
    lock = _take_or_join(stored)
    who = request.who[:WHO]
    stored.touch_client(request.client, who)
    stored.forget_old_clients()
    if lock is None:
        return told(stored.written_state())
    try:
        state = stored.written_state()
        expired = ""
        is_ours = is_attempt_of(state.get("attempt", ""), request.fresh)
        if state["state"] == "done" and (is_ours or not request.fresh) and _has_outputs(stored, state):
            until = time.monotonic() + MEANING_SECONDS
            expired = why_expired(state, lambda name, arch: _meaning(store, name, arch, request.base, until))
            if not expired:
                return told(state)
        has_failed = state["state"] in ("failed", "cancelled")
        if has_failed and not request.again:
            is_answer = is_ours if request.fresh else not stored.was_seen(state["attempt"])
            if is_answer:
                return told(state)
        own_python = "{}.{}".format(*sys.version_info[:2])
        if request.python is not None and request.python != own_python:
            import platform

            raise RunnerError(
                f"The function cannot be loaded: Python {request.python} pickled it, and the builder has Python"
                f" {platform.python_version()}.",
                f"Run doit with Python {own_python}, or use a buildscript.",
            )
        trees = request.trees
        missing = _missing(store, request)
        if missing or trees is None:
            return {"state": "absent", "missing": missing, "trees_wanted": trees is None}
        if not stored.release_kept():
            raise RunnerError(
                f"Job {request.digest[:12]} cannot start: a shell is open in a container of its last attempt.",
                "Exit that shell (gamebear shell), then run doit again.",
            )
        write_bytes(stored.folder / "job.json", text)
        order = {
            "trees": trees,
            "time_limit": request.time_limit,
            "base": request.base,
            "who": who,
            "keep": request.keep,
            "verified": _received(store),
        }
        attempt = stored.begin_attempt(order, request.fresh)
        supervisors.start(stored, attempt, lock)
        return {"state": "queued", "attempt": attempt, "started": True, "expired": expired}
    finally:
        lock.release()


def _missing(store: Store, request: requests.Submit) -> list[tuple[str, int]]:
    """Return the SHA-256 of blobs that a job needs and the store lacks, and the bytes of each that it has."""
    wanted = {*request.needs, *(request.trees or {}).values()}
    for manifest in set(folder_sources.manifests(json.loads(request.job)).values()):
        wanted.add(manifest)
        try:
            wanted.update(folder_sources.files(store, manifest))
        except FileNotFoundError:
            pass  # the client sends it first, and then the files that it names
        except ManifestError:
            store.blob(manifest).unlink()  # damaged
    missing = [sha256 for sha256 in sorted(wanted) if not use(store.blob(sha256))]
    return [(sha256, size_so_far(store, sha256)) for sha256 in missing[:LACKS]]


def _received(store: Store) -> dict[str, list[int]]:
    """Return the version of each blob that this session has received since the last job, and forget them."""
    versions = {}
    while received:
        sha256 = received.pop()
        with contextlib.suppress(FileNotFoundError):
            versions[sha256] = version(store.blob(sha256).stat())
    return versions


def _meaning(store: Store, name: str, arch: str, base: str, until: float) -> str:
    """Return the id of the image that a name resolves to on this builder now; empty if unknown or timed out."""
    from ..host.buildah import outside
    from ..host.probe import facts
    from ..images.base_images import meaning  # slow to import, and rarely needed

    def ask(*words: str) -> str:
        return outside(store.root, known, *words, timeout=max(0.1, until - time.monotonic()))

    try:
        known = facts(store.root)
        return meaning(ask, name, arch, base)
    except (RunnerError, OSError, ValueError):
        return ""  # unknown: the result stays valid


def _has_outputs(stored: StoredJob, state: State) -> bool:
    folder = stored.outputs(state["attempt"])
    with contextlib.suppress(OSError):
        return all((folder / name).stat().st_size == about["size"] for name, about in state["outputs"].items())
    return False


def told(state: State) -> JobReply:
    """Return a state for the client. Its expiry is in seconds from now, because clocks differ."""
    told = cast("JobReply", {name: value for name, value in state.items() if name != "policies"})
    left = seconds_left(state)
    if left is not None:
        told["valid"] = left
    return told


def _take_or_join(stored: StoredJob) -> Lock | None:
    """Return a job's acquired lock, creating the job's folder if it is missing; None if the job is running."""
    while True:
        if not stored.folder.is_dir():
            with contextlib.suppress(FileExistsError):
                stored.folder.mkdir(mode=0o700)
            sync_folder(stored.store.jobs)
        try:
            lock = stored.lock()
        except FileNotFoundError:
            continue  # race: it has just been pruned
        try:
            runs = not _acquire_or_join(stored, lock)
        except BaseException:
            lock.release()
            raise
        if not runs and lock.is_current():
            return lock
        lock.release()
        if runs:
            return None


def _acquire_or_join(stored: StoredJob, lock: Lock) -> bool:
    """Acquire a job's lock and return True, or return False if the job is running.

    The lock is also busy briefly while another session checks or starts the job, or while its supervisor exits after it
    has written the final state. Neither means that the job is running, so acquiring is retried for up to 10 seconds.

    Raises:
        RunnerError: the lock stays busy although the job is not running.
    """
    until = time.monotonic() + 10.0
    while not lock.acquire():
        if stored.written_state()["state"] in ("queued", "running") and time.monotonic() > until - 9.5:
            return False
        if time.monotonic() > until:
            raise RunnerError(f"Job {stored.digest[:12]} is locked by another process.", "Run doit again.")
        time.sleep(0.02)
    return True
