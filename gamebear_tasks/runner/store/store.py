"""The store on the builder: blobs by SHA-256, jobs by digest, file locks. A running job's lock is always held.

<cache>/gamebear/v1/            mode 0700
    blobs/<sha256>              inputs; every use verifies the content, so they are not synced
    jobs/<digest>/job.json      the canonical JSON; its SHA-256 is the digest
                  order.json    parameters of this attempt: blobs of the sources, time limit, who submitted it
                  images        ids of the images that were used, one a line
                  materials.json  what is known of these images, see `server/materials.py`
                  lock          held (flock) by the supervisor for as long as it lives
                  state.json    see `State`; atomic rename, synced when final
                  log           bytes, append-only within one attempt
                  cancel-<attempt>  exists when a client requested to stop it; empty, because the disk may be full
                  seen-<attempt>  exists when a client has acknowledged how that attempt ended
                  clients/<id>  touched while that client follows the job; contains the user's display name
                  work/         the program's working directory while it runs
                  out-<attempt>/<name>  the outputs
    kept/<digest>               exists while a failed job's containers are retained, see `retained_containers`; locked
                                (shared) by open shells
    live/<digest>               exists from before a job starts until it has been cleaned up after
    slots/<n>                   locked by the job that occupies the slot
    images/                     locks; <id>.used is touched when an image is used, in-use.lock is held (shared) then;
                                <id>.used may contain architecture of the job, OCI architecture, variant and user
    notices.json                what makes this builder slow, see `performance_warnings`
    trash/                      pruned entries are renamed to here, then removed
    storage/, run/, venvs/, runner/<sha256>/
    ccache/, caches/            see `caches`
    tmp/                        partial files; <digest[:16]>/ is a job's scratch folder, removed with its leftovers
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..util.atomic_files import is_file_name, is_sha256, read_json, sha256_of, sync_folder, write_json
from ..util.errors import RunnerError
from ..util.free_space import FULL
from ..util.locks import Lock, hold

VERSION = "v1"
"""Version of the store's layout. A release with another layout uses another version and leaves this store untouched."""

FINAL = ("done", "failed", "cancelled")
"""States in which nothing of a job runs any more."""

CLIENT_KEPT = 86400.0
"""Seconds of silence after which a client is forgotten."""

WHO = 200
"""Maximum length of a client's display name, in bytes."""

COMPANY = 60.0
"""Seconds after its last request for which a client still counts as waiting for a job."""

CLOCK_STEP = 5.0
"""Seconds that a clock may be set back between two checks without effect."""

State = dict[str, Any]
"""State of a job: `state` (queued, running, done, failed, cancelled, lost), `attempt`, `since` (seconds since 1970),
`phases` (name, start and seconds of each, see `phases`). When done: `outputs` by name (`size` in bytes, `sha256`,
`executable`). When failed: `failure` with `kind`, `message`, `command`, `status` and `where` if a command failed,
`containers` if there were any, `kept` if they are retained."""


def cache_home() -> Path:
    """Return `$XDG_CACHE_HOME`, by default `~/.cache`.

    A relative path is ignored, as the XDG Base Directory Specification requires.
    """
    text = os.environ.get("XDG_CACHE_HOME", "")
    return Path(text) if text.startswith("/") else Path.home() / ".cache"


class StoreError(RunnerError):
    """The store cannot be written or read."""

    kind = "store"


def storage_failure(error: OSError) -> StoreError:
    """Return the error to report to the user for an OSError of the store's file system, classified by errno."""
    where = cache_home() / "gamebear"
    if error.errno in FULL:
        return StoreError(
            f"The builder's disk is full ({where}).",
            "Free space there (gamebear prune --older 30 removes files unused for 30 days), then run doit again.",
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return StoreError(f"The builder has too many open files: {error}.", "Run there: ulimit -n 1024")
    if error.errno == errno.ENOENT:
        return StoreError(
            f"A file of the builder's store was removed while in use ({error.filename or where}).",
            "Run doit again: missing files are created again.",
        )
    if error.errno == errno.EROFS:
        return StoreError(f"The builder's disk is read-only ({where}).", "Check the disk there: dmesg")
    return StoreError(
        f"The builder's store cannot be used: {error}.", f"Check there the owner of {where}, and the disk (dmesg)."
    )


class Store:
    """The folders of one builder's store."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_home() / "gamebear" / VERSION
        self.blobs = self.root / "blobs"
        self.jobs = self.root / "jobs"
        self.live = self.root / "live"
        self.kept = self.root / "kept"
        self.slots = self.root / "slots"
        self.images = self.root / "images"
        self.tmp = self.root / "tmp"
        self.trash = self.root / "trash"
        self.notices = self.root / "notices.json"

    def prepare(self) -> None:
        """Create missing folders with mode 0700.

        Raises:
            OSError: a folder cannot be created.
        """
        self.root.parent.parent.mkdir(parents=True, exist_ok=True)
        folders = (self.blobs, self.jobs, self.live, self.kept, self.slots, self.images, self.tmp, self.trash)
        for folder in (self.root.parent, self.root, *folders):
            folder.mkdir(mode=0o700, exist_ok=True)

    def blob(self, sha256: str) -> Path:
        """Return the path of a blob, whether it exists or not.

        Raises:
            ValueError: the argument is not a SHA-256.
        """
        if not is_sha256(sha256):
            raise ValueError(f"{sha256!r} is not a SHA-256")
        return self.blobs / sha256

    def job(self, digest: str) -> StoredJob:
        """Return a job's entry in the store, whether it exists or not.

        Raises:
            ValueError: the argument is not a digest.
        """
        if not is_sha256(digest):
            raise ValueError(f"{digest!r} is not a digest")
        return StoredJob(self, digest)


class StoredJob:
    """One job's folder in the store."""

    def __init__(self, store: Store, digest: str) -> None:
        self.store = store
        self.digest = digest
        self.folder = store.jobs / digest
        self.log = self.folder / "log"
        self.work = self.folder / "work"
        self.scratch = store.tmp / digest[:16]
        self.mark = store.live / digest
        self.kept = store.kept / digest

    @property
    def container_prefix(self) -> str:
        """Name prefix of this job's containers.

        It contains a hash of the store's path, because another store may have the same job and share the image store.
        """
        store = hashlib.sha256(os.fsencode(os.path.realpath(self.store.root))).hexdigest()
        return f"gamebear-{store[:8]}-{self.digest[:16]}-"

    def document(self) -> dict[str, Any]:
        """Return the job's JSON.

        Raises:
            OSError: it cannot be read.
            ValueError: the stored text does not match the digest.
        """
        path = self.folder / "job.json"
        if sha256_of(path) != self.digest:
            raise ValueError(f"the stored description of job {self.digest[:12]} is damaged")
        document: dict[str, Any] = json.loads(path.read_bytes())
        return document

    def lock(self) -> Lock:
        """Return the lock that the builder of this job holds, not acquired.

        Raises:
            OSError: it cannot be opened; FileNotFoundError if the job does not exist.
        """
        return Lock(self.folder / "lock")

    def is_locked(self) -> bool:
        """Return whether the job is being built now."""
        try:
            lock = self.lock()
        except FileNotFoundError:
            return False
        try:
            return not lock.is_free()
        finally:
            lock.release()

    def state(self) -> State:
        """Return the job's state; `state` is `absent` if it was never submitted, `lost` if its supervisor died."""
        state = self.written_state()
        if state["state"] in ("queued", "running") and not self.is_locked():
            state = self.written_state()  # race: it may have ended after the first read
            if state["state"] in ("queued", "running"):
                state["state"] = "lost"
        return state

    def written_state(self) -> State:
        """Return the state as it was last written, without a check of the lock."""
        state = read_json(self.folder / "state.json")
        return state if _is_state(state) else {"state": "absent"}

    def write_state(self, state: State) -> None:
        """Replace the job's state by atomic rename.

        Only a final state is synced: after a power cut, a job that has not ended is lost in any case, and syncing is
        the slowest operation of a small memory card.

        Raises:
            OSError: it cannot be written.
        """
        ended = state["state"] in FINAL
        write_json(self.folder / "state.json", {**state, "since": time.time()}, sync=ended)

    def begin_attempt(self, order: dict[str, Any], fresh: str = "") -> str:
        """Prepare a new attempt and return its name. The caller holds the job's lock.

        The state is written last. Until then the job has its previous state, minus what has been removed here.

        Args:
            order: parameters of the attempt, stored as `order.json`.
            fresh: token of the run that forces this attempt; empty if it is not forced. See `is_attempt_of`.

        Raises:
            OSError: the store cannot be written.
        """
        attempt = os.urandom(8).hex() + (f"-{fresh}" if fresh else "")
        after_lost = self.mark.exists()
        self.mark.touch()
        sync_folder(self.mark.parent)
        for pattern in ("cancel-*", "seen-*", ".*.tmp", "images", "phase", "materials.json"):
            for left in self.folder.glob(pattern):
                left.unlink(missing_ok=True)
        for old in self.folder.glob("out-*"):
            shutil.rmtree(old, ignore_errors=True)
        write_json(self.folder / "order.json", {**order, "after_lost": after_lost}, sync=False)
        self.log.unlink(missing_ok=True)  # a session that is reading it still has the old file
        self.log.touch(mode=0o600)
        self.write_state({"state": "queued", "attempt": attempt})
        return attempt

    def begun_by(self) -> str:
        """Return the display name of the client that began the attempt; empty if it did not send one."""
        order = read_json(self.folder / "order.json")
        return str(order.get("who") or "")[:WHO] if isinstance(order, dict) else ""

    def is_kept(self) -> bool:
        """Return whether the last attempt's containers are retained (see `retained_containers`)."""
        return self.kept.exists() and not self.mark.exists()

    @contextlib.contextmanager
    def held_kept(self) -> Iterator[bool]:
        """Prevent the removal of retained containers for the block; yield whether there are any."""
        try:
            fd = hold(self.kept, shared=True)  # blocks briefly while another process removes it
        except FileNotFoundError:
            yield False
            return
        try:
            os.utime(fd)
            yield self.is_kept()
        finally:
            os.close(fd)

    def release_kept(self) -> bool:
        """Mark retained containers for normal cleanup; return False, and retain them, if a shell is open in one.

        The caller holds the job's lock.

        Raises:
            OSError: the store cannot be written.
        """
        if not self.kept.exists():
            return True
        with Lock.opened(self.kept) as lock:
            if not lock.acquire():
                return False
            self.mark.touch()
            sync_folder(self.mark.parent)
            self.kept.unlink(missing_ok=True)
        return True

    def outputs(self, attempt: str) -> Path:
        """Return the folder of an attempt's outputs.

        Raises:
            ValueError: the argument cannot be the name of an attempt.
        """
        if not is_file_name(attempt):
            raise ValueError(f"{attempt!r} is not an attempt")
        return self.folder / f"out-{attempt}"

    @contextlib.contextmanager
    def held_outputs(self, attempt: str) -> Iterator[None]:
        """Prevent pruning of an attempt's outputs for the block, if they exist."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                stack.callback(os.close, hold(self.outputs(attempt), shared=True))  # blocks briefly during a prune
            yield

    @contextlib.contextmanager
    def seized_outputs(self) -> Iterator[bool]:
        """Lock all outputs exclusively for the block; yield whether nobody else holds any."""
        with contextlib.ExitStack() as stack:
            free = True
            for path in self.folder.glob("out-*"):
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except OSError:
                    continue
                stack.callback(os.close, fd)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    free = False
                except OSError:
                    pass  # the file system has no locks on folders: nobody can hold one
            yield free

    def output_is_sound(self, state: State) -> bool:
        """Return whether a finished job's outputs still match their recorded size and SHA-256."""
        try:
            folder = self.outputs(state["attempt"])
            for name, about in state["outputs"].items():
                path = folder / name
                if path.stat().st_size != about["size"] or sha256_of(path) != about["sha256"]:
                    return False
        except (OSError, KeyError, TypeError, ValueError):
            return False
        return True

    def ask_to_stop(self, attempt: str) -> None:
        """Request the supervisor to stop an attempt.

        Raises:
            OSError: the request cannot be written.
        """
        if is_file_name(attempt):
            (self.folder / f"cancel-{attempt}").touch()

    def is_asked_to_stop(self, attempt: str) -> bool:
        """Return whether a client requested to stop an attempt."""
        return (self.folder / f"cancel-{attempt}").exists()

    def note_seen(self, attempt: str) -> None:
        """Record that a client acknowledged how an attempt ended. The file is empty, so that it fits on a full disk."""
        if is_file_name(attempt):
            with contextlib.suppress(OSError):
                (self.folder / f"seen-{attempt}").touch()

    def was_seen(self, attempt: str) -> bool:
        """Return whether a client acknowledged how an attempt ended."""
        return (self.folder / f"seen-{attempt}").exists()

    def touch_client(self, client: str, who: str = "") -> None:
        """Record that a client follows the job now, and its display name if set. Best effort: the disk may be full."""
        if is_file_name(client):
            folder = self.folder / "clients"
            with contextlib.suppress(OSError):
                folder.mkdir(mode=0o700, exist_ok=True)
                if who:
                    (folder / client).write_text(who, "utf-8", "backslashreplace")
                else:
                    (folder / client).touch()
                os.utime(folder)  # the last use, for garbage collection

    def touch(self) -> None:
        """Update the job's last use. Best effort."""
        with contextlib.suppress(OSError):
            (self.folder / "clients").mkdir(mode=0o700, exist_ok=True)
            os.utime(self.folder / "clients")

    def forget_client(self, client: str) -> None:
        """Record that a client no longer follows the job."""
        if is_file_name(client):
            with contextlib.suppress(OSError):
                (self.folder / "clients" / client).unlink()

    def other_clients(self, client: str, within: float) -> list[str]:
        """Return the display names of other clients that followed the job within `within` seconds; "" if unknown.

        A timestamp in the future was written before the clock was set back; it is ignored.
        """
        found = []
        with contextlib.suppress(OSError):
            for path in (self.folder / "clients").iterdir():
                age = time.time() - path.stat().st_mtime
                if path.name != client and -CLOCK_STEP <= age < within:
                    with path.open("rb") as file:
                        found.append(file.read(WHO).decode("utf-8", "replace"))
        return found

    def last_use(self) -> float:
        """Return when the job was last submitted, followed, or changed its state, in seconds since 1970."""
        return max(map(stamp, self.stamps()))

    def stamps(self) -> list[Path]:
        """Return the files whose timestamps define the job's last use."""
        return [self.folder / name for name in ("clients", "state.json", "job.json")]

    def forget_old_clients(self) -> None:
        """Forget clients whose timestamp is more than `CLIENT_KEPT` seconds in the past or in the future."""
        with contextlib.suppress(OSError):
            for path in (self.folder / "clients").iterdir():
                if abs(time.time() - stamp(path)) > CLIENT_KEPT:
                    path.unlink(missing_ok=True)


def is_attempt_of(attempt: str, fresh: str) -> bool:
    """Return whether the run with a token forced an attempt.

    The attempt's name contains the token, so that it is stored atomically with the state.
    """
    return attempt.endswith(f"-{fresh}")


def runner_folder() -> Path:
    """Return the folder from which Python runs the runner: the one that contains its package."""
    return Path(__file__).resolve().parents[2]


def hold_runner() -> None:
    """Update the last use of this runner, and prevent its removal by garbage collection while this process lives."""
    folder = runner_folder()
    with contextlib.suppress(OSError):
        fcntl.flock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.utime(folder)


def stamp(path: Path) -> float:
    """Return a file's modification time in seconds since 1970; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def version(about: os.stat_result) -> list[int]:
    """Return numbers that change whenever a blob may have changed: inode, bytes, and mtime and ctime in nanoseconds."""
    return [about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]


def size_of(path: Path) -> int:
    """Return a file's size in bytes; 0 if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _is_state(state: object) -> bool:
    """Validate a state that was read from disk; an invalid one is treated as absent."""
    if not isinstance(state, dict) or not isinstance(state.get("state"), str):
        return False
    if not is_file_name(state.get("attempt")):
        return False
    if state["state"] != "done":
        return state["state"] in (*FINAL, "queued", "running", "lost")
    outputs = state.get("outputs")
    return isinstance(outputs, dict) and all(
        is_file_name(name)
        and isinstance(about, dict)
        and isinstance(about.get("size"), int)
        and is_sha256(about.get("sha256"))
        for name, about in outputs.items()
    )
