"""The store on the builder: blobs by SHA-256, jobs by digest, slots. Who holds a job's lock is building it.

<cache>/gamebear/v1/            mode 0700
    blobs/<sha256>              inputs; every use checks the content, so they need no sync
    jobs/<digest>/job.json      the canonical text; its SHA-256 is the digest
                  order.json    what this attempt needs besides: the blobs of the sources, the time limit; and who asked
                  images        the ids of the images that were used, one a line
                  materials.json  what is known of them, see `materials`
                  lock          held (flock) by the supervisor for as long as it lives
                  state.json    see `State`; written aside, synced, renamed
                  log           bytes, only ever appended to within one attempt
                  cancel-<attempt>  there when somebody asked to stop that attempt; empty, for a disk may be full
                  seen-<attempt>  there when a client was told how that attempt ended
                  clients/<id>  touched while that client follows the job; who it is
                  work/         the program's folder while it runs
                  out-<attempt>/<name>  the outputs
    kept/<digest>               there as long as what a failed job left is kept, see `kept`; locked by who looks at it
    live/<digest>               there from before a job starts until it has been cleaned up after
    slots/<n>                   locked by the job that has the slot
    images/                     locks; <id>.used is touched when an image is used, in-use.lock is shared meanwhile;
                                it may hold what the image is for: architecture of its job, OCI's, the variant, the user
    notices.json                what costs this builder much, see `performance_warnings`
    trash/                      what is pruned is renamed to here, and then removed
    storage/, run/, venvs/, ccache/<key>/, runner/<sha256>/
    tmp/                        parts of files; <digest's beginning>/ is a job's own and goes with what else it left
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

VERSION = "v1"
"""The store's layout. A release that lays it out otherwise takes another number and leaves this one alone."""

FINAL = ("done", "failed", "cancelled")
"""The states in which nothing of a job runs any more."""

CLIENT_KEPT = 86400.0
"""Seconds after which a client that was never heard of again is forgotten."""

WHO = 200
"""The most bytes of what a client says of who it is."""

COMPANY = 60.0
"""Seconds for which a client that has asked for a job counts as still waiting for it."""

CLOCK_STEP = 5.0
"""Seconds by which a clock may be put right between two looks at it, and nothing is made of it."""

State = dict[str, Any]
"""A job's state: `state` (queued, running, done, failed, cancelled, lost), `attempt`, `since` (seconds since 1970),
`phases` (name, start and seconds of each, see `phases`), and when done `outputs` by name (`size` in bytes, `sha256`,
`executable`), when failed `failure`: `kind`, `message`, `command`, `status` and `where` where a command failed,
`containers` where there were any, `kept` where they are kept."""


def cache_home() -> Path:
    """Return `$XDG_CACHE_HOME`, by default `~/.cache` (XDG Base Directory Specification: a relative one is ignored)."""
    text = os.environ.get("XDG_CACHE_HOME", "")
    return Path(text) if text.startswith("/") else Path.home() / ".cache"


class StoreError(RunnerError):
    """The store cannot be written or read."""

    kind = "store"


def storage_failure(error: OSError) -> StoreError:
    """Return what a person reads of an error of the store's file system."""
    where = cache_home() / "gamebear"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"The builder's disk is full ({where}).",
            "Make room there (doit prune --older 30 removes what was not used for 30 days), then run doit again.",
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return StoreError(f"The builder lets us open too few files: {error}.", "Allow more there: ulimit -n 1024")
    if error.errno == errno.ENOENT:
        return StoreError(
            f"Something of the builder's store is gone while it is used ({error.filename or where}).",
            "Has somebody removed it? Then run doit again: what is missing is made anew.",
        )
    if error.errno == errno.EROFS:
        return StoreError(f"The builder's disk has become read-only ({where}).", "It may be failing: see dmesg there.")
    return StoreError(
        f"The builder's store cannot be used: {error}.", "See there who owns the folder and what its disk says (dmesg)."
    )


class Lock:
    """An exclusive lock on a file, held until it is released or its last holder dies (flock)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def acquire(self, wait: bool = False) -> bool:
        """Take the lock; say whether it was had. With `wait`, sleep until it is."""
        return self._flock(fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

    def is_free(self) -> bool:
        """Say whether nobody has the lock now. Two that only look do not get in each other's way."""
        return self._flock(fcntl.LOCK_SH | fcntl.LOCK_NB)

    def is_current(self) -> bool:
        """Say whether the file is still at its path; a folder that is pruned takes its lock away with it."""
        return _is_at(self.fd, self.path)

    def _flock(self, operation: int) -> bool:
        try:
            fcntl.flock(self.fd, operation)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Give the lock back; a process that inherited it keeps it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path) -> Iterator[Lock]:
        """Give a lock that is not taken yet, and release it at the end of the block."""
        lock = cls(path)
        try:
            yield lock
        finally:
            lock.release()

    def __enter__(self) -> Lock:
        self.acquire(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


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
        """Make the folders that are missing, closed to other users; raises OSError."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.root.parent, self.root):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
        for folder in (self.blobs, self.jobs, self.live, self.kept, self.slots, self.images, self.tmp, self.trash):
            folder.mkdir(mode=0o700, exist_ok=True)

    def blob(self, sha256: str) -> Path:
        """Return where a blob is, or would be."""
        if not is_sha256(sha256):
            raise ValueError(f"{sha256!r} is not a SHA-256")
        return self.blobs / sha256

    def job(self, digest: str) -> StoredJob:
        """Return a job's place in the store, whether it is there or not."""
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
        """What the names of this job's containers begin with; another store may have the job, and its images here."""
        store = hashlib.sha256(os.fsencode(os.path.realpath(self.store.root))).hexdigest()
        return f"gamebear-{store[:8]}-{self.digest[:16]}-"

    def document(self) -> dict[str, Any]:
        """Return the job's JSON; raises ValueError when what is stored is not what the digest names."""
        path = self.folder / "job.json"
        if sha256_of(path) != self.digest:
            raise ValueError(f"the stored description of job {self.digest} is damaged")
        document: dict[str, Any] = json.loads(path.read_bytes())
        return document

    def lock(self) -> Lock:
        """Return the lock that whoever builds the job holds."""
        return Lock(self.folder / "lock")

    def is_locked(self) -> bool:
        """Say whether somebody builds the job now."""
        try:
            lock = self.lock()
        except FileNotFoundError:
            return False
        try:
            return not lock.is_free()
        finally:
            lock.release()

    def state(self) -> State:
        """Return the job's state; `state` is `absent` when it was never asked for, `lost` when its supervisor died."""
        state = self.written_state()
        if state["state"] in ("queued", "running") and not self.is_locked():
            state = self.written_state()  # it may have ended between the two looks
            if state["state"] in ("queued", "running"):
                state["state"] = "lost"
        return state

    def written_state(self) -> State:
        """Return the state as it was last written, without a look at the lock."""
        state = read_json(self.folder / "state.json")
        return state if _is_state(state) else {"state": "absent"}

    def write_state(self, state: State) -> None:
        """Replace the job's state; raises OSError.

        Only an end is synced, for a power cut makes a lost job of any that has not ended; syncing is what a small
        card is slowest at.
        """
        ended = state["state"] in FINAL
        write_json(self.folder / "state.json", {**state, "since": time.time()}, sync=ended)

    def begin_attempt(self, order: dict[str, Any]) -> str:
        """Lay down a new attempt under the lock, which the caller holds, and return its name; raises OSError.

        The state comes last: until it is there, the job is what it was, and less whatever was removed here.
        """
        attempt = os.urandom(8).hex()
        after_lost = self.mark.exists()
        self.mark.touch()
        sync_folder(self.mark.parent)
        for pattern in ("cancel-*", "seen-*", ".*.tmp", "images", "phase", "materials.json"):
            for left in self.folder.glob(pattern):
                left.unlink(missing_ok=True)
        for old in self.folder.glob("out-*"):
            shutil.rmtree(old, ignore_errors=True)
        write_json(self.folder / "order.json", {**order, "after_lost": after_lost}, sync=False)
        self.log.unlink(missing_ok=True)  # a session that reads it goes on reading the old one
        self.log.touch(mode=0o600)
        self.write_state({"state": "queued", "attempt": attempt})
        return attempt

    def begun_by(self) -> str:
        """Return whom people know the client as that began the attempt; empty where it did not say."""
        order = read_json(self.folder / "order.json")
        return str(order.get("who") or "")[:WHO] if isinstance(order, dict) else ""

    def is_kept(self) -> bool:
        """Say whether what the last attempt left is kept (see `kept`)."""
        return self.kept.exists() and not self.mark.exists()

    @contextlib.contextmanager
    def held_kept(self) -> Iterator[bool]:
        """Keep what is kept from being removed for the block; give whether it is there."""
        while True:
            try:
                fd = os.open(self.kept, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                yield False
                return
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)  # who removes it holds it for a moment
                if not _is_at(fd, self.kept):
                    continue  # that is of an attempt before this one
                os.utime(fd)
                yield self.is_kept()
                return
            finally:
                os.close(fd)

    def release_kept(self) -> bool:
        """Have what is kept cleaned up after as any attempt is; say whether nobody looks at it, without which it stays.

        The caller holds the job's lock. Raises OSError.
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
        """Return the folder of an attempt's outputs."""
        if not is_file_name(attempt):
            raise ValueError(f"{attempt!r} is not an attempt")
        return self.folder / f"out-{attempt}"

    @contextlib.contextmanager
    def held_outputs(self, attempt: str) -> Iterator[None]:
        """Keep an attempt's outputs from being pruned for the block, where they are there."""
        fd = -1
        try:
            with contextlib.suppress(OSError):
                fd = os.open(self.outputs(attempt), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(fd, fcntl.LOCK_SH)  # a prune holds it for a moment
            yield
        finally:
            if fd >= 0:
                os.close(fd)

    @contextlib.contextmanager
    def seized_outputs(self) -> Iterator[bool]:
        """Keep every output from being held for the block; give whether nobody holds any."""
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
                    pass  # a file system without locks on folders: nobody can hold one
            yield free

    def output_is_sound(self, state: State) -> bool:
        """Say whether a done job's outputs still are what they were (size and SHA-256 of each)."""
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
        """Ask the supervisor to end an attempt; raises OSError."""
        if is_file_name(attempt):
            (self.folder / f"cancel-{attempt}").touch()

    def is_asked_to_stop(self, attempt: str) -> bool:
        """Say whether somebody asked to end an attempt."""
        return (self.folder / f"cancel-{attempt}").exists()

    def note_seen(self, attempt: str) -> None:
        """Note that a client was told how an attempt ended; in an empty file, for which a full disk has room."""
        if is_file_name(attempt):
            with contextlib.suppress(OSError):
                (self.folder / f"seen-{attempt}").touch()

    def was_seen(self, attempt: str) -> bool:
        """Say whether a client was told how an attempt ended."""
        return (self.folder / f"seen-{attempt}").exists()

    def touch_client(self, client: str, who: str = "") -> None:
        """Note that a client follows the job now, where there is room to; and who it is, as people know it."""
        if is_file_name(client):
            folder = self.folder / "clients"
            with contextlib.suppress(OSError):
                folder.mkdir(mode=0o700, exist_ok=True)
                if who:
                    (folder / client).write_text(who, "utf-8", "backslashreplace")
                else:
                    (folder / client).touch()
                os.utime(folder)  # by which a prune sees that the job was used

    def touch(self) -> None:
        """Note that the job is used now."""
        with contextlib.suppress(OSError):
            (self.folder / "clients").mkdir(mode=0o700, exist_ok=True)
            os.utime(self.folder / "clients")

    def forget_client(self, client: str) -> None:
        """Note that a client follows the job no more."""
        if is_file_name(client):
            with contextlib.suppress(OSError):
                (self.folder / "clients" / client).unlink()

    def other_clients(self, client: str, within: float) -> list[str]:
        """Return who else followed the job within the last `within` seconds; "" for one that did not say who it is.

        A stamp from the future is from before somebody put the clock back, and says nothing.
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
        """Return when the job was last asked for, followed, or changed its state, in seconds since 1970."""
        return max(map(stamp, self.stamps()))

    def stamps(self) -> list[Path]:
        """Return the files whose times tell when the job was last used."""
        return [self.folder / name for name in ("clients", "state.json", "job.json")]

    def forget_old_clients(self) -> None:
        """Forget the clients that were not heard of for long, or will be."""
        with contextlib.suppress(OSError):
            for path in (self.folder / "clients").iterdir():
                if abs(time.time() - stamp(path)) > CLIENT_KEPT:
                    path.unlink(missing_ok=True)


def runner_folder() -> Path:
    """Return the folder that Python starts the runner from: the one that its package is in."""
    return Path(__file__).resolve().parents[2]


def hold_runner() -> None:
    """Note that the runner whose code this is was used now, and keep it from being pruned while this process lives."""
    folder = runner_folder()
    with contextlib.suppress(OSError):
        fcntl.flock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.utime(folder)


def _is_at(fd: int, path: Path) -> bool:
    """Say whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def stamp(path: Path) -> float:
    """Return when a file was last changed, in seconds since 1970; 0 where it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def size_of(path: Path) -> int:
    """Return the bytes of a file; 0 where it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _is_state(state: object) -> bool:
    """Say whether what was read is a whole state; anything else is taken for none."""
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
