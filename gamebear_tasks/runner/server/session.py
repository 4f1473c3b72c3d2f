"""One client's session: answers requests on standard input and output until the client disconnects.

A session does not build anything and holds no state that a job needs, so the connection may be cut at any byte.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..protocol import requests, wire
from ..protocol.requests import Request, received
from ..protocol.wire import NOT_OURS
from ..store.expiry import seconds_left, why_expired
from ..store.phases import noted
from ..store.slots import line
from ..store.store import (
    COMPANY,
    FINAL,
    WHO,
    State,
    Store,
    StoredJob,
    hold_runner,
    runner_folder,
    size_of,
    storage_failure,
)
from ..util.atomic_files import CHUNK, data_extents, read_json, sync_folder, write_all, write_bytes
from ..util.errors import RunnerError
from ..util.locks import Lock
from .uploads import Body, have, put, put_small, size_so_far, take_blob, use

if TYPE_CHECKING:
    from typing import Optional

    from ..protocol.pty import Attended
    from ..protocol.replies import (
        CancelReply,
        DiscardReply,
        FetchReply,
        HelloReply,
        JobReply,
        KeptReply,
        ListReply,
        MaterialsReply,
        PruneReply,
        RefusalReply,
        Reply,
    )
    from .diagnostics import Examination

    Answer = tuple[Reply, Optional[Callable[[Reply], None]]]
    """A reply, and the function that sends it if it has a body."""

IDLE_LIMIT = 3600.0
"""Seconds without a request after which a session ends: the client has gone, even if TCP does not report it."""

SMALL = 64 << 10
"""Maximum bytes of outputs sent inline with the final state, and maximum log size that a submit reply includes
unrequested."""

LOG_CHUNK = 256 << 10
"""Maximum bytes of log in one reply."""

PRUNE_SECONDS = 15.0
"""Seconds after which a prune replies, whether it is complete or not."""

CANCEL_SECONDS = 30.0
"""Seconds after which a cancel replies, whether the job has ended or not. Shorter than the client's reply timeout."""

USE_NOTED = 10.0
"""Seconds between updates of a job's last-use timestamp while an output is being fetched."""

HOLE = 64 << 10
"""Bytes of the smallest hole of a sparse output that is skipped; smaller holes are sent as zeros."""

HOLES = 10_000
"""Maximum number of holes in one reply; the rest of the file is sent in full."""

SKIPPED = 64 << 20
"""Maximum bytes of a refused upload that are read and dropped. For a longer one the session ends."""

MEANING_SECONDS = 5.0
"""Timeout in seconds for buildah to resolve all image names of a result, after which the result is returned unchecked.
Shorter than another client's wait for the job's lock."""

PIPE = 1 << 20
"""Bytes of pipe buffer between the runner and sshd, in each direction. Only root may set more (pipe(7))."""

F_SETPIPE_SZ = 1031
"""Operation of fcntl(2) that sets a pipe's capacity; Python 3.9 has no constant for it."""


class Session:
    """The operations of a client: each is a method.

    Args:
        store: the builder's store.
        umask: umask of the programs that a person runs through this session; -1 for the runner's umask.
    """

    def __init__(self, store: Store, umask: int = -1) -> None:
        self.store = store
        self._umask = umask
        self._alive: dict[str, int] = {}
        """Per attempt, a pipe from each supervisor that this session started. It reaches end of file when the job has
        ended."""
        self._examination: Examination | None = None

    def run(self) -> None:
        """Answer requests until the client closes the stream."""
        while self._wait_for_request():
            message = wire.decode(_read_exactly)
            if message is None:
                return
            header, body = message
            reader = Body(body)
            try:
                reply, send = self._answer(received(header), reader)
            except (RunnerError, OSError, ValueError, KeyError, TypeError) as error:
                reply, send = _refusal(error), None
                if reader.left > SKIPPED:
                    _write(wire.encode(reply))
                    return  # the client cannot send the rest; it reads this reply
            reader.skip()
            if send is None:
                _write(wire.encode(reply))
            else:
                send(reply)

    def _wait_for_request(self) -> bool:
        ready, _, _ = select.select([0], [], [], IDLE_LIMIT)
        return bool(ready)

    def _answer(self, request: Request, body: Body) -> Answer:
        if isinstance(request, requests.Hello):
            return self._hello(), None
        if isinstance(request, requests.Submit):
            return self._submit_and_wait(request, body)
        if isinstance(request, requests.Put):
            return put(self.store, request, body), None
        if isinstance(request, requests.PutSmall):
            return put_small(self.store, request, body), None
        if isinstance(request, requests.Have):
            return have(self.store, request), None
        if isinstance(request, requests.Follow):
            return self._follow(request)
        if isinstance(request, requests.Fetch):
            return self._fetch(request)
        if isinstance(request, requests.Cancel):
            return self._cancel(request), None
        if isinstance(request, requests.Discard):
            return self._discard(request), None
        if isinstance(request, requests.Prune):
            return self._prune(request), None
        if isinstance(request, requests.Examine):
            return self._examine(request), None
        if isinstance(request, requests.Run):
            return self._run(request)
        if isinstance(request, requests.Kept):
            return self._kept(request), None
        if isinstance(request, requests.Enter):
            return self._enter(request)
        if isinstance(request, requests.List):
            return self._list(request), None
        if isinstance(request, requests.Materials):
            return self._materials(request), None
        raise AssertionError(f"the operation {request.op} is not implemented")

    def _hello(self) -> HelloReply:
        """Describe this builder, without running buildah."""
        import platform  # slow to import, and rarely needed

        return {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "host": platform.node(),
            "buildah": shutil.which("buildah") is not None,
            "store": str(self.store.root),
            "free": shutil.disk_usage(self.store.root).free,
            **self._known(),
        }

    def _known(self) -> HelloReply:
        """Return the builder facts that the last job stored."""
        probed = read_json(self.store.root / "facts.json")
        found = probed.get("facts") if isinstance(probed, dict) else None
        known: HelloReply = {}
        if isinstance(found, dict):
            known = {"driver": found.get("driver"), "isolation": found.get("isolation")}
        costs = read_json(self.store.notices)
        if costs:
            known["costs"] = "; ".join(map(str, costs))
        return known

    # jobs

    def _submit_and_wait(self, request: requests.Submit, body: Body) -> Answer:
        """Accept a job, and include its end if it finishes within `wait` seconds: see `_submit` and `_with_end`."""
        reply = self._submit(request, body)
        stored = self.store.job(request.digest)
        attempt = reply.get("attempt", "")
        if reply.get("started"):
            until = time.monotonic() + min(request.wait, 60.0)
            state = self._wait(stored, attempt, until, lambda _: False)
            if state.get("attempt") == attempt and state["state"] in FINAL:
                reply.update(_told(state))
        if reply["state"] in ("queued", "running"):
            reply["now"] = self._now(stored, attempt)
        if reply["state"] not in FINAL or size_of(stored.log) > SMALL:
            return reply, None
        return self._with_end(reply, stored, attempt, 0, request.client)

    def _submit(self, request: requests.Submit, body: Body) -> JobReply:
        """Accept a job: start it, attach to it if it is running, or report the blobs that are missing.

        Raises:
            RunnerError: the job does not match its digest, needs another Python, or a shell is open in a retained
                container.
        """
        for sha256, size in request.blobs:
            take_blob(self.store, body, sha256, size)
        stored = self.store.job(request.digest)
        text = request.job.encode("ascii")
        if hashlib.sha256(text).hexdigest() != request.digest:
            raise RunnerError(
                f"The description of job {request.digest} is not the one that its name stands for.", NOT_OURS
            )
        lock = _take_or_join(stored)
        who = request.who[:WHO]
        stored.touch_client(request.client, who)
        stored.forget_old_clients()
        if lock is None:
            return _told(stored.written_state())
        try:
            state = stored.written_state()
            expired = ""
            if state["state"] == "done" and self._has_outputs(stored, state):
                until = time.monotonic() + MEANING_SECONDS
                expired = why_expired(state, lambda name, arch: self._meaning(name, arch, request.base, until))
                if not expired:
                    return _told(state)
            has_failed = state["state"] in ("failed", "cancelled")
            if has_failed and not request.again and not stored.was_seen(state["attempt"]):
                return _told(state)
            own_python = "{}.{}".format(*sys.version_info[:2])
            if request.python is not None and request.python != own_python:
                import platform

                raise RunnerError(
                    f"The function was pickled by Python {request.python}, and the builder's python3 is"
                    f" {platform.python_version()}: neither reads the other's functions.",
                    f"Run doit with Python {own_python}, or make the function a buildscript.",
                )
            trees = request.trees
            wanted = [*request.needs, *(trees or {}).values()]
            missing = [
                (sha256, size_so_far(self.store, sha256))
                for sha256 in sorted(set(wanted))
                if not use(self.store.blob(sha256))
            ]
            if missing or trees is None:
                return {"state": "absent", "missing": missing, "trees_wanted": trees is None}
            if not stored.release_kept():
                raise RunnerError(
                    "Somebody has a shell open in a container that the last attempt of this very job has left.",
                    "Leave that shell (gamebear shell), then run doit again.",
                )
            write_bytes(stored.folder / "job.json", text)
            order = {
                "trees": trees,
                "time_limit": request.time_limit,
                "base": request.base,
                "who": who,
                "keep": request.keep,
            }
            attempt = stored.begin_attempt(order)
            self._start_supervisor(stored, attempt, lock)
            return {"state": "queued", "attempt": attempt, "started": True, "expired": expired}
        finally:
            lock.release()

    def _start_supervisor(self, stored: StoredJob, attempt: str, lock: Lock) -> None:
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

    def _meaning(self, name: str, arch: str, base: str, until: float) -> str:
        """Return the id of the image that a name resolves to on this builder now; empty if unknown or timed out."""
        from ..host.buildah import outside
        from ..host.probe import facts
        from ..images.base_images import meaning  # slow to import, and rarely needed

        def ask(*words: str) -> str:
            return outside(self.store.root, known, *words, timeout=max(0.1, until - time.monotonic()))

        try:
            known = facts(self.store.root)
            return meaning(ask, name, arch, base)
        except (RunnerError, OSError, ValueError):
            return ""  # unknown: the result stays valid

    def _has_outputs(self, stored: StoredJob, state: State) -> bool:
        folder = stored.outputs(state["attempt"])
        with contextlib.suppress(OSError):
            return all((folder / name).stat().st_size == about["size"] for name, about in state["outputs"].items())
        return False

    def _now(self, stored: StoredJob, attempt: str) -> list[str | int | None]:
        """Return a job's current phase and, while it waits for a slot, the number of jobs ahead of it in the queue."""
        phase = noted(stored.folder)
        waiting = line(self.store) if phase == "queue" else []
        return [phase, waiting.index(attempt) if attempt in waiting else None]

    def _follow(self, request: requests.Follow) -> Answer:
        """Return the log from an offset and the state; wait up to `wait` seconds for a change of either or of `now`.

        The state is read before the log, so that a final state is sent with the complete log. An observer (`client` is
        empty) does not count as waiting for the job, does not acknowledge how it ended, and receives no outputs.
        """
        stored = self.store.job(request.digest)
        stored.touch_client(request.client)
        attempt, offset = request.attempt, request.offset

        def has_news(log_size: int) -> bool:
            return log_size > offset or (request.now is not None and self._now(stored, attempt) != request.now)

        state = self._wait(stored, attempt, time.monotonic() + min(request.wait, 60.0), has_news)
        reply = _told(state)
        if state.get("attempt") != attempt:
            reply["log_size"] = 0
            return reply, None
        if state["state"] in ("queued", "running"):
            reply["now"] = self._now(stored, attempt)
        return self._with_end(reply, stored, attempt, offset, request.client)

    def _wait(self, stored: StoredJob, attempt: str, until: float, is_enough: Callable[[int], bool]) -> State:
        """Wait until an attempt is over, its log is long enough, or the deadline passes; return the state.

        The supervisor's end wakes the session that started it. Everything else is polled, with backoff up to 0.25
        seconds.

        Args:
            stored: the job.
            attempt: the attempt to wait for.
            until: deadline, by the monotonic clock.
            is_enough: returns whether a log of the passed size in bytes ends the wait.
        """
        pause = 0.005
        while True:
            state = stored.state()
            over = state.get("attempt") != attempt or state["state"] not in ("queued", "running")
            if over or is_enough(size_of(stored.log)) or time.monotonic() >= until:
                return state
            alive = self._alive.get(attempt, -1)
            ready, _, _ = select.select([0] if alive < 0 else [0, alive], [], [], pause)
            if 0 in ready:
                return state  # a client sends nothing while it waits: its end of the stream is closed
            if ready:
                os.close(self._alive.pop(attempt))
            pause = min(pause * 1.5, 0.25)

    def _with_end(self, reply: JobReply, stored: StoredJob, attempt: str, offset: int, client: str) -> Answer:
        """Return a reply with the log from an offset and, if the log and the job are complete, the small outputs.

        The body is `log` bytes of log, followed by the concatenated outputs; `contents` has the name and the size in
        bytes of each. The client then no longer counts as waiting for the job. An observer (`client` is empty) receives
        the log only.
        """
        size = size_of(stored.log)
        log = _part_of(stored.log, offset, min(size - offset, LOG_CHUNK)) if size > offset else b""
        reply.update({"log": len(log), "log_size": size})
        body = [log]
        if client and reply["state"] in FINAL and offset + len(log) >= size:
            stored.note_seen(attempt)
            stored.forget_client(client)
            reply["notices"] = read_json(self.store.notices)
            contents = _small_outputs(stored, reply)
            reply["contents"] = [(name, len(data)) for name, data in contents]
            body += [data for _, data in contents]
            stored.touch()
        return reply, lambda reply: _write(b"".join([wire.encode(reply, sum(map(len, body))), *body]))

    def _fetch(self, request: requests.Fetch) -> Answer:
        """Send an output from an offset to its end. A prune does not remove the job meanwhile.

        Raises:
            RunnerError: the output is not in the store.
        """
        stored = self.store.job(request.digest)
        offset = request.offset
        path = stored.outputs(request.attempt) / request.name
        with contextlib.ExitStack() as stack:
            stack.enter_context(stored.held_outputs(request.attempt))
            if not path.is_file():
                raise RunnerError(
                    f"The builder no longer has the output {request.name!r} of job {request.digest[:12]}.",
                    "Run doit again.",
                )
            size = path.stat().st_size
            holes = _holes(path, offset, size)
            stored.touch()
            held = stack.pop_all()

        def send(reply: Reply) -> None:
            with held:
                _write_file(reply, path, _between(holes, offset, size), stored.touch)
                stored.touch()

        reply: FetchReply = {"size": size}
        if holes:
            reply["holes"] = holes
        return reply, send

    def _cancel(self, request: requests.Cancel) -> CancelReply:
        """Stop an attempt unless another client waits for the same job; wait up to `CANCEL_SECONDS` for its end.

        The state in the reply is `running` if the attempt has not ended in time.
        """
        stored = self.store.job(request.digest)
        stored.forget_client(request.client)
        others = stored.other_clients(request.client, COMPANY)
        if others and not request.force and (state := stored.state())["state"] in ("queued", "running"):
            return {"state": state["state"], "others": others}
        asked = ""
        until = time.monotonic() + CANCEL_SECONDS
        while True:
            running = stored.is_locked()  # read before the state, so that the state is not older
            state = stored.written_state()
            current = state.get("attempt", "")
            wanted = request.attempt or current
            if wanted != asked and (running or request.attempt):
                with contextlib.suppress(FileNotFoundError):  # race: the job was pruned
                    stored.ask_to_stop(wanted)
                asked = wanted
            if not running or current != wanted or time.monotonic() >= until:
                break
            time.sleep(0.05)
        if current != wanted:
            return {"state": "lost" if current else "absent", "others": []}  # another attempt took its place
        state = stored.state()
        if state["state"] == "cancelled" and not others and request.who in ("", stored.begun_by()):
            stored.note_seen(wanted)
        return {"state": "running" if state["state"] == "queued" else state["state"], "others": []}

    def _discard(self, request: requests.Discard) -> DiscardReply:
        """Verify a result's outputs, and invalidate the result if they are corrupted."""
        stored = self.store.job(request.digest)
        attempt = request.attempt
        if not stored.folder.is_dir():
            return {"discarded": False}
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

    def _list(self, request: requests.List) -> ListReply:
        """List the jobs in the store; see `job_list.listing`."""
        from .job_list import listing  # rarely needed

        return listing(self.store, request.skip, request.limit, request.prefix)

    def _materials(self, request: requests.Materials) -> MaterialsReply:
        """Return the images and packages that a result was built in; see `materials`."""
        from .materials import materials  # rarely needed

        return materials(self.store, request.digest, request.attempt)

    def _prune(self, request: requests.Prune) -> PruneReply:
        """Prune the store for a bounded time; if the reply has `more`, the client requests the rest."""
        from ..maintenance.garbage_collection import Policy, Prune  # slow to import, and rarely needed

        policy = Policy(request.older, request.size, request.keep, request.images)
        pruned = Prune(self.store, policy, PRUNE_SECONDS).run()
        return {
            "jobs": pruned.jobs,
            "blobs": pruned.blobs,
            "images": pruned.images,
            "others": pruned.others,
            "freed": pruned.freed,
            "left": pruned.left,
            "more": pruned.more,
        }

    # interactive programs

    def _kept(self, request: requests.Kept) -> KeptReply:
        """Return the retained containers of a job."""
        from ..maintenance.retained_containers import listed

        return listed(self.store.job(request.digest))

    def _run(self, request: requests.Run) -> Answer:
        """Start a program on this machine; see `pty`."""
        from ..protocol.pty import started

        environment = dict(os.environ)
        return self._attended(started(request.words, environment, Path.home(), request.terminal, umask=self._umask))

    def _enter(self, request: requests.Enter) -> Answer:
        """Start a command in a retained container of a job; see `retained_containers`."""
        from ..maintenance.retained_containers import entered

        stored = self.store.job(request.digest)
        return self._attended(entered(stored, request.container, request.words, request.terminal))

    def _attended(self, program: Attended) -> Answer:
        """Reply that a program is running. From then on the session carries its input and output, and ends with it."""

        def attend(reply: Reply) -> None:
            _write(wire.encode(reply))
            program.attend(0, 1)
            raise SystemExit(0)

        return {}, attend

    def _examine(self, request: requests.Examine) -> Reply:
        """Return a description of this builder for `doctor`; see `diagnostics`."""
        from .diagnostics import Examination  # slow to import, and rarely needed

        if self._examination is None or self._examination.asked != (tuple(request.arches), request.base):
            self._examination = Examination(self.store, request.arches, request.base)
        asked, self._examination = self._examination, None
        reply = asked.answer(min(request.wait, 30.0))
        if reply.get("more"):
            self._examination = asked
        return reply


def _part_of(path: Path, offset: int, length: int) -> bytes:
    """Return part of a file, shorter at its end.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(length)


def _small_outputs(stored: StoredJob, state: JobReply) -> list[tuple[str, bytes]]:
    """Return names and contents of a finished job's smallest outputs, up to `SMALL` bytes in total."""
    found: list[tuple[str, bytes]] = []
    left = SMALL
    with stored.held_outputs(state["attempt"]), contextlib.suppress(OSError):
        for name, about in sorted((state.get("outputs") or {}).items(), key=lambda item: item[1]["size"]):
            left -= about["size"]
            if left < 0:
                break
            data = _part_of(stored.outputs(state["attempt"]) / name, 0, about["size"] + 1)
            if len(data) == about["size"]:  # otherwise the client detects the corruption when it fetches
                found.append((name, data))
    return found


def _told(state: State) -> JobReply:
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
            raise RunnerError(f"Job {stored.digest[:12]} is held by a process that does nothing.", "Run doit again.")
        time.sleep(0.02)
    return True


def _refusal(error: Exception) -> RefusalReply:
    if isinstance(error, RunnerError):
        return {"error": error.message, "hint": error.hint, "kind": error.kind}
    if isinstance(error, OSError):
        failure = storage_failure(error)
        return {"error": failure.message, "hint": failure.hint, "kind": failure.kind}
    return {"error": f"The runner cannot answer a request ({error!r}).", "hint": NOT_OURS, "kind": "request"}


def _read_exactly(size: int) -> bytes:
    parts = []
    while size:
        data = os.read(0, min(size, CHUNK))
        if not data:
            break
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def _write(data: bytes) -> None:
    write_all(1, data)


def _pass_on(fd: int, most: int) -> int:
    """Send the next bytes of a file to the client with sendfile(2); return the number of bytes sent."""
    return os.sendfile(1, fd, None, most)


def _holes(path: Path, start: int, end: int) -> list[tuple[int, int]]:
    """Return offset and length of the holes of a file between two offsets that are large enough to skip."""
    holes: list[tuple[int, int]] = []
    with path.open("rb", buffering=0) as file:
        done = start
        for first, last in chain(data_extents(file.fileno(), start, end), [(end, end)]):
            if first - done >= HOLE:
                holes.append((done, first - done))
            if len(holes) == HOLES:
                break
            done = last
    return holes


def _between(holes: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Return start and end of each part of a file between two offsets that is not in a hole."""
    parts = []
    for offset, length in (*holes, (max(start, end), 0)):
        if offset > start:
            parts.append((start, offset))
        start = offset + length
    return parts


def _write_file(reply: Reply, path: Path, parts: list[tuple[int, int]], note_use: Callable[[], None]) -> None:
    """Send a reply whose body is parts of a file.

    Args:
        reply: header of the reply.
        path: the file.
        parts: start and end of each part, in bytes.
        note_use: called every `USE_NOTED` seconds.

    Raises:
        OSError: the file cannot be read, or the client has gone.
        SystemExit: the file has become shorter.
    """
    _write(wire.encode(reply, sum(end - start for start, end in parts)))
    noted = time.monotonic()
    with path.open("rb", buffering=0) as file:
        for start, end in parts:
            file.seek(start)
            while start < end:
                if time.monotonic() > noted + USE_NOTED:
                    note_use()
                    noted = time.monotonic()
                sent = _pass_on(file.fileno(), min(end - start, CHUNK))
                if not sent:
                    raise SystemExit(1)  # the file was truncated: end the stream rather than send wrong bytes
                start += sent


def _widen(pipe: int) -> None:
    """Enlarge a pipe's buffer beyond the usual 64 KiB, so that its two ends wait for each other less."""
    with contextlib.suppress(OSError):  # not a pipe, or the user's limit of pipe memory is reached
        fcntl.fcntl(pipe, F_SETPIPE_SZ, PIPE)


def main() -> int:
    """Serve the client on standard input and output until it disconnects; return the exit status."""
    umask = os.umask(0o077)
    _widen(0)
    _widen(1)
    store = Store()
    hold_runner()
    try:
        store.prepare()
    except OSError as error:
        _write(wire.PREAMBLE + b" failed\n" + wire.encode(_refusal(error)))
        return 1
    _write(wire.PREAMBLE + b" ready\n")
    with contextlib.suppress(BrokenPipeError, wire.WireError):
        Session(store, umask).run()
    return 0
