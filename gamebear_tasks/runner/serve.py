"""One client's session: answers requests on standard input and output until the client goes away.

A session builds nothing itself and holds nothing that a job needs: it may end at any byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import wire
from .files import CHUNK, RunnerError, is_file_name, is_sha256, write_bytes
from .store import FINAL, Lock, State, Store, StoredJob

IDLE_LIMIT = 3600.0
"""Seconds without a request after which a session ends: its client is gone, whatever TCP says."""

LOG_CHUNK = 256 << 10
"""The most bytes of log in one reply."""

COMPANY = 60.0
"""Seconds for which a client that has asked for a job counts as still waiting for it."""

Reply = dict[str, Any]


class Session:
    """What a client may ask; each public method is an operation, its parameters the request's fields."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def run(self) -> None:
        """Answer requests until the client closes the stream."""
        while self._wait_for_request():
            message = wire.decode(_read_exactly)
            if message is None:
                return
            header, body = message
            reader = _Body(body)
            try:
                reply, send = self._answer(header, reader)
            except (RunnerError, OSError, ValueError, KeyError, TypeError) as error:
                reply, send = _refusal(error), None
            reader.skip()
            if send is None:
                _write(wire.encode(reply))
            else:
                send(reply)

    def _wait_for_request(self) -> bool:
        ready, _, _ = select.select([0], [], [], IDLE_LIMIT)
        return bool(ready)

    def _answer(self, header: wire.Header, body: _Body) -> tuple[Reply, Callable[[Reply], None] | None]:
        operation = header.pop("op")
        header.pop("body", None)
        if operation == "hello":
            return self._hello(), None
        if operation == "submit":
            return self._submit(body=body, **header), None
        if operation == "put":
            return self._put(body=body, **header), None
        if operation == "have":
            return self._have(**header), None
        if operation == "follow":
            return self._follow(**header)
        if operation == "fetch":
            return self._fetch(**header)
        if operation == "cancel":
            return self._cancel(**header), None
        if operation == "leave":
            return self._leave(**header), None
        if operation == "discard":
            return self._discard(**header), None
        raise RunnerError(f"The runner does not know the operation {operation!r}.")

    def _hello(self) -> Reply:
        """Say what this builder is, without touching buildah."""
        return {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "host": platform.node(),
            "buildah": shutil.which("buildah") is not None,
            "store": str(self.store.root),
            "free": shutil.disk_usage(self.store.root).free,
        }

    def facts(self) -> Any:
        """Return what is known of buildah here, probing it where it is not known yet."""
        from .buildah import facts

        return facts(self.store.root)

    # jobs

    def _submit(
        self,
        body: _Body,
        digest: str,
        job: str,
        client: str,
        blobs: list[list[Any]],
        trees: dict[str, str] | None,
        needs: list[str],
        time_limit: float,
        base: str = "auto",
        python: str | None = None,
        again: bool = False,
    ) -> Reply:
        """Take a job: start it, join it where it runs already, or say what it still lacks.

        Args:
            body: the content of `blobs`, one after the other.
            digest: the job's name.
            job: its canonical text.
            client: a name for this client, the same for all of its sessions.
            blobs: SHA-256 and size of each blob in the body.
            trees: the blobs of the sources, by source name; None when the client has not looked yet.
            needs: the SHA-256 of every other blob that the job needs.
            time_limit: seconds after which the job is ended; 0 for none.
            base: where Debian's base images come from.
            python: the version (major.minor) that a pickled function needs.
            again: start anew even if the last attempt failed and nobody has seen it.

        Returns:
            `state` and `attempt`, or `missing` (SHA-256 and bytes already here of each) and `trees_wanted`.
        """
        for sha256, size in blobs:
            self._take_blob(body, sha256, size)
        stored = self.store.job(digest)
        text = job.encode("ascii")
        if hashlib.sha256(text).hexdigest() != digest:
            raise RunnerError(f"The description of job {digest} is not the one that its name stands for.")
        if not stored.folder.is_dir():
            stored.folder.mkdir(mode=0o700)
        stored.touch_client(client)
        lock = stored.lock()
        try:
            if not _acquire_or_join(stored, lock):
                return stored.written_state()
            state = stored.written_state()
            if state["state"] == "done" and self._has_outputs(stored, state):
                return state
            if state["state"] in ("failed", "cancelled") and not again and not self._was_seen(stored, state):
                return state
            own_python = "{}.{}".format(*sys.version_info[:2])
            if python is not None and python != own_python:
                raise RunnerError(
                    f"The function was pickled by Python {python}, and the builder's python3 is"
                    f" {platform.python_version()}: neither reads the other's functions.",
                    f"Run doit with Python {own_python}, or make the function a buildscript.",
                )
            wanted = [*needs, *(trees or {}).values()]
            missing = [[sha256, self._size_so_far(sha256)] for sha256 in sorted(set(wanted)) if not self._has(sha256)]
            if missing or trees is None:
                return {"state": "absent", "missing": missing, "trees_wanted": trees is None}
            write_bytes(stored.folder / "job.json", text)
            attempt = stored.begin_attempt({"trees": trees, "time_limit": time_limit, "base": base})
            self._start_supervisor(stored, attempt, lock)
            return {"state": "queued", "attempt": attempt, "started": True}
        finally:
            lock.release()

    def _start_supervisor(self, stored: StoredJob, attempt: str, lock: Lock) -> None:
        """Start the job's supervisor in a session of its own; it inherits the lock, so there is no gap."""
        runner = Path(__file__).resolve().parent.parent
        with (stored.folder / "supervisor.log").open("ab") as errors:
            subprocess.Popen(
                [sys.executable, "-I", str(runner), "supervise", stored.digest, attempt, str(lock.fd)],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                cwd=self.store.root,
                pass_fds=[lock.fd],
                start_new_session=True,
            )

    def _has_outputs(self, stored: StoredJob, state: State) -> bool:
        folder = stored.outputs(state["attempt"])
        with contextlib.suppress(OSError):
            return all((folder / name).stat().st_size == about["size"] for name, about in state["outputs"].items())
        return False

    def _was_seen(self, stored: StoredJob, state: State) -> bool:
        with contextlib.suppress(OSError):
            return bool((stored.folder / "seen").read_text() == state["attempt"])
        return False

    def _follow(
        self, digest: str, attempt: str, client: str, offset: int, wait: float
    ) -> tuple[Reply, Callable[[Reply], None]]:
        """Give the log from an offset and the state; wait up to `wait` seconds for news.

        The state is read before the log, so that a final state comes with the end of the log.
        """
        stored = self.store.job(digest)
        stored.touch_client(client)
        until = time.monotonic() + min(wait, 60.0)
        pause = 0.005
        while True:
            state = stored.state()
            size = stored.log.stat().st_size if stored.log.exists() else 0
            if (
                state.get("attempt") != attempt
                or size > offset
                or state["state"] in (*FINAL, "lost", "absent")
                or time.monotonic() >= until
            ):
                break
            if select.select([0], [], [], pause)[0]:
                break  # a client asks nothing while it waits: its end of the stream is closed
            pause = min(pause * 1.5, 0.25)
        reply = dict(state)
        if state.get("attempt") != attempt:
            return {**reply, "log_size": 0}, lambda reply: _write(wire.encode(reply))
        length = max(0, min(size - offset, LOG_CHUNK))
        reply["log_size"] = size
        if state["state"] in FINAL and offset + length >= size:
            with contextlib.suppress(OSError):
                (stored.folder / "seen").write_text(attempt)
        return reply, lambda reply: _write_file(reply, stored.log, offset, length)

    def _fetch(self, digest: str, attempt: str, name: str, offset: int) -> tuple[Reply, Callable[[Reply], None]]:
        """Give an output from an offset to its end."""
        stored = self.store.job(digest)
        if not is_file_name(name):
            raise RunnerError(f"{name!r} cannot be the name of an output.")
        path = stored.outputs(attempt) / name
        if not path.is_file():
            raise RunnerError(f"The builder no longer has the output {name!r} of job {digest[:12]}.", "Run doit again.")
        length = max(0, path.stat().st_size - offset)
        return {"size": path.stat().st_size}, lambda reply: _write_file(reply, path, offset, length)

    def _cancel(self, digest: str, attempt: str, client: str) -> Reply:
        """Stop an attempt, unless another client waits for the same job; wait until it has ended."""
        stored = self.store.job(digest)
        stored.forget_client(client)
        others = stored.other_clients(client, COMPANY)
        if others:
            return {"state": stored.state()["state"], "others": others}
        stored.ask_to_stop(attempt)
        until = time.monotonic() + 30.0
        while stored.is_locked() and time.monotonic() < until:
            time.sleep(0.05)
        state = stored.state()
        if state["state"] == "cancelled" and state.get("attempt") == attempt:
            (stored.folder / "seen").write_text(attempt)
        return {"state": state["state"], "others": 0}

    def _leave(self, digest: str, client: str) -> Reply:
        """Note that a client no longer waits for a job."""
        self.store.job(digest).forget_client(client)
        return {}

    def _discard(self, digest: str, attempt: str) -> Reply:
        """Look whether the outputs still are what they were, and forget the result where they are not."""
        stored = self.store.job(digest)
        lock = stored.lock()
        try:
            if not lock.acquire():
                return {"discarded": False}
            state = stored.written_state()
            if state.get("attempt") != attempt or state["state"] != "done" or stored.output_is_sound(state):
                return {"discarded": False}
            stored.write_state({"state": "lost", "attempt": attempt})
            shutil.rmtree(stored.outputs(attempt), ignore_errors=True)
            return {"discarded": True}
        finally:
            lock.release()

    # blobs

    def _has(self, sha256: str) -> bool:
        return self.store.blob(sha256).is_file()

    def _part(self, sha256: str) -> Path:
        return self.store.tmp / f"{self.store.blob(sha256).name}.part"

    def _size_so_far(self, sha256: str) -> int:
        try:
            return self._part(sha256).stat().st_size
        except FileNotFoundError:
            return 0

    def _have(self, sha256: str) -> Reply:
        """Say how many bytes of a blob are here."""
        blob = self.store.blob(sha256)
        return {"have": blob.stat().st_size if blob.is_file() else self._size_so_far(sha256)}

    def _take_blob(self, body: _Body, sha256: str, size: int) -> None:
        """Take a whole small blob from the body."""
        data = body.read_all(size)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RunnerError(f"A file arrived damaged: its content is not {sha256}.", "Run doit again.")
        path = self.store.blob(sha256)
        if path.exists():
            return
        aside = self.store.tmp / f"{sha256}.{os.getpid()}"
        try:
            aside.write_bytes(data)
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise

    def _put(self, body: _Body, blobs: list[list[Any]] | None = None, **one: Any) -> Reply:
        """Take blobs: several small ones whole, or one from an offset on.

        Args:
            body: their content.
            blobs: SHA-256 and size of each, when they are whole.
            one: `sha256`, `size` (the whole's) and `offset` of one that may have been begun before.
        """
        if blobs is not None:
            for sha256, size in blobs:
                self._take_blob(body, sha256, size)
            return {}
        sha256, size, offset = str(one["sha256"]), int(one["size"]), int(one["offset"])
        part = self._part(sha256)
        if not is_sha256(sha256) or offset < 0 or size < offset:
            raise RunnerError("The request to store a file makes no sense.")
        with Lock(part) as lock:
            have = os.fstat(lock.fd).st_size
            if have < offset:
                return {"have": have}
            os.ftruncate(lock.fd, offset)
            os.lseek(lock.fd, offset, os.SEEK_SET)
            while chunk := body.read(CHUNK):
                _write_to(lock.fd, chunk)
            if os.fstat(lock.fd).st_size != size:
                return {"have": os.fstat(lock.fd).st_size}
            os.lseek(lock.fd, 0, os.SEEK_SET)
            digest = hashlib.sha256()
            while chunk := os.read(lock.fd, CHUNK):
                digest.update(chunk)
            if digest.hexdigest() != sha256:
                part.unlink()
                return {"have": 0, "damaged": True}
            os.replace(part, self.store.blob(sha256))
        return {"have": size}


class _Body:
    """What is left of a request's body."""

    def __init__(self, size: int) -> None:
        self.left = size

    def read(self, size: int) -> bytes:
        if not self.left:
            return b""
        data = os.read(0, min(size, self.left))
        if not data:
            raise SystemExit(0)  # the client is gone in the middle of a request
        self.left -= len(data)
        return data

    def read_all(self, size: int) -> bytes:
        if size > self.left:
            raise RunnerError("A request's body is shorter than it says.")
        parts = []
        while size:
            parts.append(self.read(size))
            size -= len(parts[-1])
        return b"".join(parts)

    def skip(self) -> None:
        while self.read(CHUNK):
            pass


def _acquire_or_join(stored: StoredJob, lock: Lock) -> bool:
    """Take a job's lock, or find that the job runs.

    The lock is busy for a moment, too, when another session only looks, starts the job, or when its supervisor has
    written the final state and is about to end: none of that is a running job.
    """
    until = time.monotonic() + 10.0
    while not lock.acquire():
        if stored.written_state()["state"] in ("queued", "running") and time.monotonic() > until - 9.5:
            return False
        if time.monotonic() > until:
            raise RunnerError(f"Job {stored.digest[:12]} is held by a process that does nothing.", "Run doit again.")
        time.sleep(0.02)
    return True


def _refusal(error: Exception) -> Reply:
    if isinstance(error, RunnerError):
        return {"error": error.message, "hint": error.hint, "kind": error.kind}
    if isinstance(error, OSError):
        hint = "Make room there, then run doit again." if error.errno in (28, 122) else ""
        return {"error": f"The builder's store cannot be used: {error}.", "hint": hint, "kind": "store"}
    return {"error": f"The runner cannot make sense of a request ({error!r}).", "hint": "", "kind": "request"}


def _read_exactly(size: int) -> bytes:
    parts = []
    while size:
        data = os.read(0, min(size, CHUNK))
        if not data:
            break
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def _write_to(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _write(data: bytes) -> None:
    _write_to(1, data)


def _write_file(reply: Reply, path: Path, offset: int, length: int) -> None:
    """Send a reply with part of a file as its body."""
    if not length:
        _write(wire.encode(reply))
        return
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        _write(wire.encode(reply, length))
        while length:
            data = file.read(min(length, CHUNK))
            if not data:
                raise SystemExit(1)  # the file has shrunk under us: end the stream rather than send something else
            _write(data)
            length -= len(data)


def main() -> int:
    """Serve the client on standard input and output until it goes away."""
    os.umask(0o077)
    store = Store()
    try:
        store.prepare()
    except OSError as error:
        _write(wire.PREAMBLE + b" failed\n" + wire.encode(_refusal(error)))
        return 1
    _write(wire.PREAMBLE + b" ready\n")
    with contextlib.suppress(BrokenPipeError, wire.WireError):
        Session(store).run()
    return 0
